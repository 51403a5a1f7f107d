from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfi_monitor.detect.forecast import steps_to_spike


@given(st.floats(1e-5, 0.5), st.floats(1e-3, 0.2))
def test_an_exponential_is_extrapolated_to_one_nat(displacement: float, slope: float) -> None:
    """With β2 so close to 1 that the second moment's own clock plays no part."""
    forecast = steps_to_spike(displacement, slope, beta2=0.999999, tau=1.0)
    truth = math.log(1 / displacement) / slope
    if truth >= 1:
        assert forecast is not None
        low, median, high = forecast
        assert median == pytest.approx(truth, abs=0.51)
        assert low <= median <= high


def test_the_second_moments_decay_is_the_slowest_clock() -> None:
    flat = steps_to_spike(0.01, 0.0, beta2=0.95, tau=20.0)
    assert flat is not None
    assert flat[1] == round(math.log(100) / (-0.5 * math.log(0.95)))


def test_inside_the_last_tau_it_is_a_state_not_a_number() -> None:
    assert steps_to_spike(0.7, 0.05, beta2=0.95, tau=20.0) is None


@pytest.mark.parametrize("displacement", [0.0, -1.0, math.nan, math.inf, 1.0, 5.0])
def test_what_cannot_be_extrapolated_gives_none(displacement: float) -> None:
    assert steps_to_spike(displacement, 0.01, beta2=0.95, tau=20.0) is None
