from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfi_monitor.detect.forecast import FARTHEST, NEAREST, steps_to_spike, steps_when_imminent


@given(st.floats(1e-5, 0.5), st.floats(0.05, 1.0), st.sampled_from([0.9, 0.95, 0.99, 0.999]))
def test_updates_that_grow_as_the_second_moment_decays_reach_one_nat_at_the_forecast_step(
    displacement: float, violation: float, beta2: float
) -> None:
    tau = 1 / (1 - beta2)
    forecast = steps_to_spike(displacement, violation, 0.0, 0.0, beta2, tau)
    # Simulate step by step: a constant share of the gradient, divided by sqrt(v̂), which decays by sqrt(β2).
    delta, steps = displacement, 0
    while delta < 1.0:
        delta *= beta2 ** (-0.5 * violation)
        steps += 1
    if not NEAREST * tau <= steps <= FARTHEST * tau:
        assert forecast is None or abs(steps / tau - NEAREST) < 0.2 or abs(steps / tau - FARTHEST) < 0.2
        return
    if NEAREST * tau + 1 < steps < FARTHEST * tau - 1:
        assert forecast is not None
    if forecast is not None:
        low, median, high = forecast
        assert median == pytest.approx(steps, abs=1.51)
        assert low <= median <= high


def forecast(
    displacement: float = 0.01, violation: float = 0.9, slope: float = 0.0, loss_rise: float = 0.0
) -> tuple[int, int, int] | None:
    return steps_to_spike(displacement, violation, slope, loss_rise, 0.95, 20.0)


def test_half_the_violation_takes_twice_as_long() -> None:
    full, half = forecast(0.12, violation=0.8), forecast(0.12, violation=0.4)
    assert full is not None and half is not None
    assert half[1] == pytest.approx(2 * full[1], abs=1)


def test_a_growing_displacement_shortens_the_forecast_and_a_falling_one_is_ignored() -> None:
    growing, flat, falling = forecast(slope=0.03), forecast(), forecast(slope=-0.03)
    assert growing is not None and flat is not None
    assert growing[1] < flat[1]
    assert falling == flat == forecast(slope=math.nan)


def test_there_is_no_forecast_near_the_spike() -> None:
    assert forecast(0.7) is None
    assert forecast(0.01) is not None
    assert forecast(0.01, loss_rise=0.8) is None, "the loss is leaving its floor"


def test_there_is_no_forecast_beyond_fifteen_tau() -> None:
    assert forecast(1e-5, violation=0.1) is None


def test_an_unknown_loss_does_not_prevent_a_forecast() -> None:
    assert forecast(loss_rise=math.nan) == forecast()


@pytest.mark.parametrize("displacement", [0.0, -1.0, math.nan, math.inf, 1.0, 5.0])
def test_a_displacement_outside_zero_to_one_nat_gives_no_forecast(displacement: float) -> None:
    assert forecast(displacement) is None


@pytest.mark.parametrize("violation", [0.0, math.nan])
def test_there_is_no_forecast_without_a_violation(violation: float) -> None:
    assert forecast(violation=violation) is None


def test_a_second_moment_as_large_as_epsilon_doubles_the_time() -> None:
    """Updates are m/(sqrt(v̂) + ε_A): where both are equal, a decay of v̂ counts half."""
    full = steps_to_spike(0.12, 0.8, 0.0, 0.0, 0.95, 20.0)
    half = steps_to_spike(0.12, 0.8, 0.0, 0.0, 0.95, 20.0, clock=0.5)
    assert full is not None and half is not None
    assert half[1] == pytest.approx(2 * full[1], abs=1)


def test_there_is_no_forecast_where_only_epsilon_is_left_of_the_denominator() -> None:
    assert steps_to_spike(0.12, 0.8, 0.0, 0.0, 0.95, 20.0, clock=0.0) is None


# --- once a slingshot is imminent -----------------------------------------------------------------------


@given(st.floats(3.0, 1e6), st.sampled_from([10.0, 20.0, 100.0, 1000.0]))
def test_the_time_left_falls_with_the_root_of_the_rise(rise: float, tau: float) -> None:
    found = steps_when_imminent(rise, 0.0, tau)
    assert found is not None
    low, median, high = found
    assert median == max(round(8.2 * tau * rise**-0.5), 1)
    assert 1 <= low <= median <= high <= 3 * median + 2


@pytest.mark.parametrize(
    ("rise", "loss_rise", "given"),
    [(2.9, 0.0, False), (3.0, 0.0, True), (9.0, 0.6, False), (9.0, math.nan, True), (math.nan, 0.0, False)],
)
def test_no_number_is_given_without_a_rise_or_once_the_loss_has_left_its_floor(
    rise: float, loss_rise: float, given: bool
) -> None:
    assert (steps_when_imminent(rise, loss_rise, 20.0) is not None) is given
