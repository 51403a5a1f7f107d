from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfi_monitor.detect.smoothing import Ema, Growth, Hysteresis


@given(st.integers(1, 20), st.floats(1.0, 50.0))
def test_an_average_over_a_constant_gap_equals_the_closed_form(gap: int, window: float) -> None:
    ema = Ema()
    ema.update(0, 0.0, window)
    for k in range(1, 30):
        ema.update(k * gap, 1.0, window)
    assert ema.value == pytest.approx(1 - math.exp(-29 * gap / window), rel=1e-9)


@given(st.floats(-0.1, 0.1), st.integers(1, 16))
def test_the_slope_of_a_line_is_found_at_any_cadence(slope: float, gap: int) -> None:
    tracker = Growth()
    for k in range(1000):
        tracker.update(k * gap, 3.0 + slope * k * gap, 100.0)
    # An average over samples lags by the time constant less half a gap: the error is of second order.
    assert tracker.value == pytest.approx(slope, rel=0.02, abs=1e-9)


def test_the_slope_averages_the_noise_of_single_readings() -> None:
    rng = random.Random(0)
    tracker = Growth()
    seen = [tracker.update(step, rng.gauss(0, 0.03), 500.0) for step in range(20_000)]
    spread = statistics.pstdev(seen[2000:])
    assert spread < 1e-5, "the threshold of inflating at τ = 1000 is 1e-5 a step"
    assert spread < 0.2 * 0.03 / 500, "what an average over differences would leave"


def test_nan_and_inf_are_skipped_not_averaged() -> None:
    ema, slope = Ema(), Growth()
    for step, x in enumerate((1.0, math.nan, math.inf, 1.0)):
        ema.update(step, x, 5.0)
        slope.update(step, x, 5.0)
    assert ema.value == 1.0
    assert slope.value == 0.0


def test_hysteresis_holds_between_its_levels() -> None:
    switch = Hysteresis()
    states = [switch.update(t, x >= 0.5, x >= 0.2) for t, x in enumerate((0.3, 0.6, 0.3, 0.1, 0.3))]
    assert states == [False, True, True, False, False]
    assert switch.since == 1
