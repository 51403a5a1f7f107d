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


@pytest.mark.parametrize("gap", [1, 3])
def test_the_smoothed_violation_is_the_average_of_the_limited_violation(gap: int) -> None:
    """``zero_sum_violation_smoothed``: a reading weighs e^(−distance / window), the window is half of τ."""
    signals, tau, values = Signals(), 40.0, []
    for step in range(1, 200, gap):
        rows, weights = 0.5 + 0.4 * math.sin(step), 0.001 if step % 2 else 0.9
        values.append(min(rows, 10.0 * weights))
        reading = Reading(step, {"zero_sum_violation": rows, "zero_sum_violation_weight": weights})
        found = signals.update(reading, tau, Thresholds())["zero_sum_violation_smoothed"]
        keep = math.exp(-gap / (0.5 * tau))
        powers = [keep ** (len(values) - 1 - index) for index in range(len(values))]
        weighted = [(1 - keep) * power if index else power for index, power in enumerate(powers)]
        assert found == pytest.approx(sum(w * x for w, x in zip(weighted, values, strict=True)), rel=1e-12)
        assert found == signals.violation
    assert "zero_sum_violation_smoothed" not in signals.update(
        Reading(500, {"rms_t_max": 1.0}), tau, Thresholds()
    )


@pytest.mark.parametrize("told", [True, False], ids=["loss", "loss at the head"])
def test_the_reduction_ratio_is_the_predicted_reduction_over_the_loss(told: bool) -> None:
    signals, name = Signals(), "loss" if told else "head_loss"
    for step, (predicted, loss) in enumerate([(0.3, 0.2), (-0.1, 0.4), (2.0, 0.25)], start=1):
        reading = Reading(step, {"predicted_reduction": predicted, name: loss})
        found = signals.update(reading, 20.0, Thresholds())
        assert found["reduction_ratio"] == signals.reduction == predicted / loss
    assert signals.reduction_peak == 8.0


@pytest.mark.parametrize("loss", [0.0, -1.0, math.nan], ids=["zero", "below zero", "unknown"])
def test_the_reduction_ratio_is_absent_where_the_loss_is_not_positive(loss: float) -> None:
    signals = Signals()
    found = signals.update(Reading(1, {"predicted_reduction": 1.0, "loss": loss}), 20.0, Thresholds())
    assert "reduction_ratio" not in found and math.isnan(signals.reduction)
