"""What the host derives from readings, against closed forms."""

from __future__ import annotations

import math

import pytest

from nfi_monitor.detect.signals import REMEMBERED, Signals
from nfi_monitor.types import Reading, Thresholds


@pytest.mark.parametrize("name", ["feature_mean", "classifier_mean"])
@pytest.mark.parametrize("rate", [-0.01, 0.0, 0.02])
@pytest.mark.parametrize("gap", [1, 3])
def test_a_growth_rate_is_the_slope_of_the_logarithm_of_its_norm(name: str, rate: float, gap: int) -> None:
    """``feature_mean_growth`` and ``classifier_mean_growth`` of a norm that grows as e^(rate · step)."""
    signals, found = Signals(), math.nan
    for step in range(1, 1500, gap):
        reading = Reading(step, {f"{name}_norm": math.exp(rate * step)})
        found = signals.update(reading, 20.0, Thresholds())[f"{name}_growth"]
    # Averages over samples lag by half a gap less than averages over time do.
    assert found == pytest.approx(rate, rel=0.006 * gap, abs=1e-12)


@pytest.mark.parametrize("gap", [1, 4])
def test_the_decay_is_in_decades_below_the_fading_maximum(gap: int) -> None:
    """``second_moment_decay`` of a root that falls by half every 10 steps, after a peak at step 0."""
    signals, tau = Signals(), 20.0
    for step in range(0, 200, gap):
        root = 3.0 * 0.5 ** (step / 10)
        values = signals.update(Reading(step, {"head_sqrt_exp_avg_sq_mean": root}), tau, Thresholds())
        faded = [
            3.0 * 0.5 ** (s / 10) * math.exp(-(step - s) / (REMEMBERED * tau))
            for s in range(0, step + 1, gap)
        ]
        assert values["second_moment_decay"] == pytest.approx(
            math.log10(root / max(faded)), rel=1e-9, abs=1e-12
        )
