from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfi_monitor.detect.forecast import NEAREST, steps_to_spike


@given(st.floats(1e-5, 0.5), st.floats(0.05, 1.0), st.sampled_from([0.9, 0.95, 0.99, 0.999]))
def test_updates_that_grow_as_the_second_moment_forgets_reach_one_nat_when_said(
    displacement: float, violation: float, beta2: float
) -> None:
    tau = 1 / (1 - beta2)
    forecast = steps_to_spike(displacement, violation, 0.0, beta2, tau)
    # A constant share of the gradient on sqrt(v̂) that decays by sqrt(β2) a step, one step at a time.
    delta, steps = displacement, 0
    while delta < 1.0:
        delta *= beta2 ** (-0.5 * violation)
        steps += 1
    if steps < NEAREST * tau:
        assert forecast is None
        return
    if steps > NEAREST * tau + 1:
        assert forecast is not None
    if forecast is not None:
        low, median, high = forecast
        assert median == pytest.approx(steps, abs=1.51)
        assert low <= median <= high


def test_half_the_violation_takes_twice_as_long() -> None:
    full, half = (steps_to_spike(1e-3, violation, 0.0, 0.95, 20.0) for violation in (0.8, 0.4))
    assert full is not None and half is not None
    assert half[1] == pytest.approx(2 * full[1], abs=1)


def test_inside_the_last_tau_it_is_a_state_not_a_number() -> None:
    assert steps_to_spike(0.7, 0.9, 0.0, 0.95, 20.0) is None
    assert steps_to_spike(0.01, 0.9, 0.0, 0.95, 20.0) is not None
    assert steps_to_spike(0.01, 0.9, 0.8, 0.95, 20.0) is None, "the loss is leaving its floor"


def test_a_loss_that_is_not_told_keeps_no_forecast_back() -> None:
    assert steps_to_spike(0.01, 0.9, math.nan, 0.95, 20.0) == steps_to_spike(0.01, 0.9, 0.0, 0.95, 20.0)


@pytest.mark.parametrize("displacement", [0.0, -1.0, math.nan, math.inf, 1.0, 5.0])
def test_what_cannot_be_extrapolated_gives_none(displacement: float) -> None:
    assert steps_to_spike(displacement, 0.5, 0.0, 0.95, 20.0) is None


@pytest.mark.parametrize("violation", [0.0, math.nan])
def test_without_a_violation_nothing_drives_the_displacement(violation: float) -> None:
    assert steps_to_spike(0.01, violation, 0.0, 0.95, 20.0) is None
