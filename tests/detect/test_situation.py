"""What rules read of a run: values that are no number must not raise an error in a rule."""

from __future__ import annotations

import math

import pytest

from nfi_monitor.detect.signals import Signals
from nfi_monitor.detect.situation import RunContext, Situation
from nfi_monitor.detect.spike import SpikeDetector
from nfi_monitor.types import Reading, Thresholds


def situation(loss: float) -> Situation:
    """Return what rules see at a reading with this loss, while the gradient grows by half at each step."""
    signals, limits, spike = Signals(), Thresholds(), SpikeDetector()
    for step in range(1, 101):
        signals.update(Reading(step, {"gradient_norm": 1.5**step, "loss": 1.0}), 20.0, limits)
        spike.update(step, 1.0, 20.0, limits)
    now = Situation(limits, RunContext(beta2=0.95), signals, spike, {})
    now.reading = Reading(101, {"loss": loss})
    return now


def test_the_steps_to_a_slingshot_are_counted_while_the_gradient_grows() -> None:
    assert 0.0 < situation(1e-6).steps_to_slingshot < math.inf


@pytest.mark.parametrize("loss", [math.inf, math.nan, 0.0, -1.0])
def test_the_steps_to_a_slingshot_are_unknown_without_a_positive_finite_loss(loss: float) -> None:
    assert math.isnan(situation(loss).steps_to_slingshot)
