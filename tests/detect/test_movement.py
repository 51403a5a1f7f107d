"""A state in which nothing moves may last for good: it becomes information, and then no alert at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator

import pytest

from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.movement import Movement
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.types import Alert, Change, Outcome, Reading, Severity

TAU = 20
NUMERIC = RunContext(beta2=0.95)
BEGINS = 100
"""Step from which on rows absorb."""


def absorbing(delta: Callable[[int], float], steps: int) -> Iterator[Reading]:
    """Yield a healthy run, then one that absorbs and whose feature mean grows by 4% per τ, with this δ."""
    for step in range(1, steps + 1):
        values = {
            "zero_sum_violation": 0.5 if step >= BEGINS else 1e-7,
            "feature_mean_norm": math.exp(5e-3 * step),
            "logit_displacement": delta(step),
            "rms_t_max": 0.9,
            "loss": 1e-7,
        }
        yield Reading(step, values)


def heard(readings: Iterator[Reading]) -> tuple[Detector, list[tuple[int, Change, Alert]]]:
    """Return the detector, and (step, change, alert) of each change."""
    detector, changes = Detector(None, NUMERIC), []
    for reading in readings:
        judgement = detector.update(reading)
        changes += [(reading.step, change, alert) for change, alert in judgement.changes]
    return detector, changes


def test_without_movement_a_warning_becomes_information_after_ten_tau_and_ends_after_thirty() -> None:
    detector, changes = heard(absorbing(lambda step: 0.01, 1000))
    (alert,) = detector.alerts
    began = alert.first_step
    assert BEGINS <= began < BEGINS + TAU
    assert [(change, item.severity) for _, change, item in changes] == [
        (Change.BEGIN, Severity.WARNING), (Change.UPDATE, Severity.INFO), (Change.END, Severity.INFO),
    ]  # fmt: skip
    steps = [step for step, _, _ in changes]
    ten, thirty = (math.floor(times * NUMERIC.tau) + 1 for times in (10, 30))
    assert steps == [began, began + ten, began + thirty]
    assert (alert.unmoved_since, alert.outcome) == (began, Outcome.PASSED)
    assert changes[0][2].unmoved_since is None


def test_a_movement_brings_the_warning_back_and_the_alert_goes_on() -> None:
    """15 τ after the begin δ doubles: the information is a warning again, and becomes information again."""
    moves = BEGINS + 15 * TAU
    detector, changes = heard(absorbing(lambda step: 0.01 if step < moves else 0.02, 700))
    (alert,) = detector.alerts
    told = [(step, item.severity, item.unmoved_since) for step, _, item in changes]
    (_, first, _), (_, second, unmoved), (back, third, moved), (_, fourth, again) = told
    assert (first, second, third, fourth) == (
        Severity.WARNING, Severity.INFO, Severity.WARNING, Severity.INFO,
    )  # fmt: skip
    assert unmoved == alert.first_step and moved is None
    assert moves < back < moves + TAU, "the average over δ has to follow"
    assert again is not None and again >= back


def test_a_movement_after_the_end_begins_a_new_alert() -> None:
    moves = BEGINS + 40 * TAU
    _, changes = heard(absorbing(lambda step: 0.01 if step < moves else 0.02, 1000))
    ids = [(alert.id, change) for _, change, alert in changes]
    assert ids == [
        ("at_risk-1", Change.BEGIN), ("at_risk-1", Change.UPDATE), ("at_risk-1", Change.END),
        ("at_risk-2", Change.BEGIN),
    ]  # fmt: skip


@pytest.mark.parametrize(("rise", "told"), [(1.4, 1), (1.6, 2)])
def test_a_rise_of_half_is_a_movement(rise: float, told: int) -> None:
    moves = BEGINS + 40 * TAU
    detector, _ = heard(absorbing(lambda step: 0.01 if step < moves else 0.01 * rise, 1000))
    assert len(detector.alerts) == told


def test_each_time_that_the_run_has_rested_a_larger_rise_is_needed() -> None:
    """The ratio to the highest value so far is 1.5 at first, then 3, and from then on 6."""
    for rises, counted in (
        ((1.6, 1.6), [True, False]),
        ((1.6, 2.9, 1.2), [True, False, True]),  # 2.9 · 1.2 > 3
        ((1.6, 3.1, 5.9), [True, True, False]),
        ((1.6, 3.1, 6.1, 5.9), [True, True, True, False]),
        ((1.6, 3.1, 6.1, 6.1), [True, True, True, True]),
    ):
        movement, value, found = Movement(), 1.0, []
        movement.update(0, (value,), TAU, at_risk=True)
        for number, rise in enumerate(rises, 1):
            value *= rise
            step = number * 11 * TAU
            movement.update(step, (value,), TAU, at_risk=True)
            found.append(movement.moved_at == step)
        assert found == counted, rises


def test_a_run_that_goes_on_moving_needs_no_larger_rise() -> None:
    movement = Movement()
    for step in range(200):
        movement.update(step, (1.6**step,), TAU, at_risk=True)
    assert movement.needed == 1.5 and movement.moved_at == 199


def test_what_comes_and_goes_below_its_highest_value_is_no_movement() -> None:
    movement = Movement()
    for step in range(40 * TAU):
        movement.update(step, (3.0 if step % 50 == 0 else 0.1, math.nan), TAU, at_risk=True)
    assert movement.moved_at == 0 and movement.is_resting(40 * TAU, TAU)


def test_either_movement_counts_and_one_that_was_not_measured_is_none() -> None:
    for moved in ((2.0, 1.0), (1.0, 2.0), (math.nan, 2.0)):
        movement = Movement()
        movement.update(1, (1.0, 1.0), TAU, at_risk=True)
        movement.update(2, moved, TAU, at_risk=True)
        assert movement.moved_at == 2


def test_it_begins_anew_where_the_run_was_healthy_and_after_a_slingshot() -> None:
    movement = Movement()
    movement.update(1, (1.0,), TAU, at_risk=True)
    movement.update(500, (9.0,), TAU, at_risk=True)
    assert movement.needed == 3.0
    movement.update(501, (9.0,), TAU, at_risk=False)
    assert not movement.is_still(5000, TAU)
    movement.update(502, (1.0,), TAU, at_risk=True)
    assert movement.highest == [1.0] and movement.needed == 3.0, "a healthy step does not reset the ratio"
    movement.forget()
    assert movement.needed == 1.5 and not movement.began


@pytest.mark.parametrize("after", [5, 15, 35])
def test_a_resumed_detector_knows_since_when_nothing_has_moved(after: int) -> None:
    readings = list(absorbing(lambda step: 0.01, 1000))
    at = BEGINS + after * TAU
    first, _ = heard(iter(readings[:at]))
    resumed = Detector(None, NUMERIC)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for reading in readings[at:]:
        resumed.update(reading)
    whole, _ = heard(iter(readings))
    assert resumed.alerts == whole.alerts
    assert json.dumps(resumed.state_dict()) == json.dumps(whole.state_dict())
