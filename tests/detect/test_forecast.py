from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfi_monitor.detect.forecast import FARTHEST, NEAREST, steps_to_spike


@given(st.floats(1e-5, 0.5), st.floats(0.05, 1.0), st.sampled_from([0.9, 0.95, 0.99, 0.999]))
def test_updates_that_grow_as_the_second_moment_forgets_reach_one_nat_when_said(
    displacement: float, violation: float, beta2: float
) -> None:
    tau = 1 / (1 - beta2)
    forecast = steps_to_spike(displacement, violation, 0.0, 0.0, beta2, tau)
    # A constant share of the gradient on sqrt(v̂) that decays by sqrt(β2) a step, one step at a time.
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


def said(
    displacement: float = 0.01, violation: float = 0.9, slope: float = 0.0, loss_rise: float = 0.0
) -> tuple[int, int, int] | None:
    return steps_to_spike(displacement, violation, slope, loss_rise, 0.95, 20.0)


def test_half_the_violation_takes_twice_as_long() -> None:
    full, half = said(0.12, violation=0.8), said(0.12, violation=0.4)
    assert full is not None and half is not None
    assert half[1] == pytest.approx(2 * full[1], abs=1)


def test_a_growing_displacement_arrives_earlier_and_a_falling_one_is_not_believed() -> None:
    growing, flat, falling = said(slope=0.03), said(), said(slope=-0.03)
    assert growing is not None and flat is not None
    assert growing[1] < flat[1]
    assert falling == flat == said(slope=math.nan)


def test_inside_the_last_tau_it_is_a_state_not_a_number() -> None:
    assert said(0.7) is None
    assert said(0.01) is not None
    assert said(0.01, loss_rise=0.8) is None, "the loss is leaving its floor"


def test_the_far_future_is_not_told() -> None:
    assert said(1e-5, violation=0.1) is None


def test_a_loss_that_is_not_told_keeps_no_forecast_back() -> None:
    assert said(loss_rise=math.nan) == said()


@pytest.mark.parametrize("displacement", [0.0, -1.0, math.nan, math.inf, 1.0, 5.0])
def test_what_cannot_be_extrapolated_gives_none(displacement: float) -> None:
    assert said(displacement) is None


@pytest.mark.parametrize("violation", [0.0, math.nan])
def test_without_a_violation_nothing_drives_the_displacement(violation: float) -> None:
    assert said(violation=violation) is None
