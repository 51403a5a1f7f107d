"""Test *overreaching*: a theorem about quadratic losses, and each condition of the alarm."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.rules import RULES
from nfi_monitor.detect.rules.overreach import Overreaching
from nfi_monitor.detect.signals import Signals
from nfi_monitor.detect.situation import RunContext, Situation
from nfi_monitor.detect.smoothing import Hysteresis
from nfi_monitor.detect.spike import SpikeDetector
from nfi_monitor.types import Alert, AlertKind, Mechanism, Reading, Thresholds

CONTEXT = RunContext(beta2=0.98, decoupled_decay=True)


@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 12),
    rank=st.integers(1, 12),
    floor=st.floats(0.0, 10.0),
    length=st.floats(1e-3, 1e3),
)
def test_an_update_predicted_to_lower_a_quadratic_loss_by_over_four_times_raises_it(
    seed: int, size: int, rank: int, floor: float, length: float
) -> None:
    """A loss |Ax − b|² + floor, any update s: L(x + s) ≥ L(1 − p/(2L))², which is above L if p > 4L."""
    generator = np.random.default_rng(seed)
    matrix, goal = generator.normal(size=(rank, size)), generator.normal(size=rank)
    start = generator.normal(size=size)
    update = length * generator.normal(size=size)

    def loss(at: np.ndarray) -> float:
        return float(np.sum((matrix @ at - goal) ** 2)) + floor

    gradient = 2.0 * matrix.T @ (matrix @ start - goal)
    predicted, before, after = -float(gradient @ update), loss(start), loss(start + update)
    rounding = 1e-9 * (before + after + abs(predicted))
    assert after >= before * (1.0 - predicted / (2.0 * before)) ** 2 - rounding
    if predicted > Thresholds().overreach_ratio * before + rounding:
        assert after > before - rounding


def overreach(**changed: float | bool) -> Situation:
    """Return a situation in which the rule switches on, with the changes: the loss is 5 times its average."""
    signals, spike = Signals(), SpikeDetector()
    signals.reduction = signals.reduction_peak = float(changed.get("reduction", 6.0))
    signals.rms_t = signals.rms_t_peak = float(changed.get("rms_t", 3.0))
    signals.same_rows, signals.reduction_usual = (
        bool(changed.get("same_rows")),
        float(changed.get("usual", 0.1)),
    )
    spike.baseline.restart(math.log(0.01), 0.1)
    signals.reduction_before = float(changed.get("before", 2.1))
    spike.baseline.noise = float(changed.get("noise", 0.1))
    spike.baseline.readings = int(changed.get("readings", 100))
    switches = {rule.name: Hysteresis() for rule in RULES}
    switches["absorbing"].on = bool(changed.get("absorbing", False))
    reading = Reading(int(changed.get("step", 400)), {"loss": float(changed.get("loss", 0.05))})
    now = Situation(Thresholds(), CONTEXT, signals, spike, switches, reading=reading)
    now.raised_from_outside = bool(changed.get("outside", False))
    if changed.get("passed"):
        now.record.update(AlertKind.IMMINENT, [Overreaching.name], 390, CONTEXT.tau, loss=0.06, burst=False)
        now.record.update(AlertKind.IMMINENT, [], 395, CONTEXT.tau, loss=0.06, burst=False)
    return now


def test_the_alarm_needs_no_rows() -> None:
    assert Overreaching().enter(overreach()) and Overreaching().enter(overreach(same_rows=True))


def test_between_minibatches_the_loss_must_rise_by_twice_what_it_usually_changes() -> None:
    """1.6 nats above the average."""
    assert Overreaching().enter(overreach(noise=0.8)) and not Overreaching().enter(overreach(noise=0.85))
    assert Overreaching().enter(overreach(noise=0.85, same_rows=True))


def test_between_minibatches_an_update_shortly_before_must_have_been_long_too() -> None:
    assert not Overreaching().enter(overreach(before=1.9))
    assert Overreaching().enter(overreach(before=1.9, same_rows=True))


@pytest.mark.parametrize(
    "changed",
    [
        {"reduction": 3.9}, {"reduction": 4.05}, {"reduction": math.nan}, {"rms_t": 1.4}, {"rms_t": math.nan},
        {"usual": 4.0}, {"loss": 0.04},
        {"outside": True}, {"absorbing": True}, {"step": 2}, {"passed": True},
    ],
    ids=[
        "the update fits", "the loss grows slowly", "no ratio", "an update of usual size",
        "no second moment", "the loss is told in another unit", "the loss stays",
        "the batch did it", "rows are absorbed", "the run begins", "an alarm at a higher loss led to nothing",
    ],
)  # fmt: skip
def test_the_alarm_needs_each_of_its_conditions(changed: dict[str, float]) -> None:
    assert not Overreaching().enter(overreach(**changed))


def test_the_alarm_needs_a_loss_that_is_not_tiny_beside_that_of_a_slingshot() -> None:
    now = overreach(loss=1e-5)
    now.spike.baseline.restart(math.log(1e-6), 0.1)
    now.spike.baseline.readings = 100
    assert now.loss_above_average > now.limits.overreach_rise and now.loss_share < now.limits.kick_loss
    assert not Overreaching().enter(now)


def test_the_alarm_stays_until_the_updates_are_half_as_long() -> None:
    assert Overreaching().stay(overreach(reduction=2.1))
    assert not Overreaching().stay(overreach(reduction=1.9))
    assert not Overreaching().stay(overreach(absorbing=True))


def test_every_step_is_read_when_both_the_ratio_and_the_rise_are_half_way() -> None:
    assert Overreaching().nears(overreach(reduction=2.1, loss=0.022))
    assert not Overreaching().nears(overreach(reduction=1.9, loss=0.022))
    assert not Overreaching().nears(overreach(reduction=2.1, loss=0.02)), "the loss is where it was"


def minibatches(ratio: float = 8.0, *, seed: int = 0) -> list[Reading]:
    """Return readings of minibatches whose updates become too long at step 606; a slingshot follows."""
    generator = np.random.default_rng(seed)
    readings = []
    for step in range(1, 660):
        loss = 1e-3 * math.exp(0.2 * generator.normal())
        values = {"rms_t_max": 1.0, "row_match": 0.0, "gradient_norm": 0.1, "gradient_alignment": 0.05}
        values |= {"predicted_reduction": 0.1 * loss, "update_rms": 1e-4, "weight_norm": 10.0}
        if 606 <= step < 625:
            loss = min(1e-3 * 3.0 ** (step - 605), 2.0)
            values |= {"predicted_reduction": ratio * loss, "rms_t_max": 4.0}
        readings.append(Reading(step, {**values, "loss": loss}))
    return readings


def alarms(readings: list[Reading], **context: bool) -> tuple[Detector, list[Alert]]:
    detector = Detector(None, dataclasses.replace(CONTEXT, **context))
    for reading in readings:
        detector.update(reading)
    return detector, [alert for alert in detector.alerts if alert.kind is AlertKind.IMMINENT]


def test_a_slingshot_between_minibatches_is_imminent_before_it_comes() -> None:
    detector, (alarm,) = alarms(minibatches())
    (slingshot,) = (alert for alert in detector.alerts if alert.kind is AlertKind.SLINGSHOT)
    assert 606 <= alarm.first_step < slingshot.first_step
    assert alarm.mechanism in (Mechanism.EDGE_OF_STABILITY, Mechanism.SECOND_MOMENT)
    assert alarm.evidence["reduction_ratio"].value == pytest.approx(8.0)
    assert alarm.evidence["reduction_ratio"].threshold == Thresholds().overreach_ratio
    assert {name for name, item in alarm.evidence.items() if item.crossed} >= {"reduction_ratio", "rms_t_max"}


def test_the_same_losses_with_updates_that_fit_them_are_not_imminent() -> None:
    _, found = alarms(minibatches(1.0))
    assert found == []
