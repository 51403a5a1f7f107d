"""Test the detector with readings that come late, twice, broken, out of order, or after a resume."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.types import Alert, AlertKind, AlertState, Change, Phase, Reading
from tests.detect.series import numeric_slingshot, second_moment_slingshot
from tests.spiking import Recorded

NUMERIC = RunContext(beta2=0.95, layer="head")
DECAYED = RunContext(beta2=0.95, decoupled_decay=True, layer="head")
HINGE = RunContext(beta2=0.999, decoupled_decay=True, no_classes=True)

QUANTITIES = (
    "zero_sum_violation", "unexplained_violation_fraction", "feature_mean_norm", "logit_displacement",
    "logit_displacement_rms", "rms_t_max", "head_sqrt_exp_avg_sq_mean", "secant_curvature", "learning_rate",
)  # fmt: skip
"""Quantities that may be NaN in a healthy run; the loss, gradients and weights may not."""


@functools.cache
def quiet(steps: int = 600, violation: float = 1e-4, seed: int = 0) -> Sequence[Reading]:
    """Return ordinary noisy minibatches: nothing grows, RMS_t is around 1, the loss is half a nat."""
    noise = random.Random(seed)
    return [
        Reading(
            step,
            {
                "zero_sum_violation": violation * noise.uniform(0.5, 1.5),
                "unexplained_violation_fraction": 0.0,
                "feature_mean_norm": 5.0 * noise.uniform(0.98, 1.02),
                "logit_displacement": 0.03 * noise.uniform(0.5, 2.0),
                "logit_displacement_rms": 0.01 * noise.uniform(0.5, 2.0),
                "rms_t_max": noise.uniform(0.7, 1.5),
                "head_sqrt_exp_avg_sq_mean": 1e-3 * noise.uniform(0.8, 1.2),
                "secant_curvature": noise.uniform(-1.0, 4.0),
                "weight_norm": 20.0 + 1e-3 * step,
                "gradient_norm": 0.1 * noise.uniform(0.5, 1.5),
                "non_finite_gradients": 0.0,
                "learning_rate": 1e-3,
                "loss": 0.5 * noise.uniform(0.7, 1.4),
            },
        )
        for step in range(1, steps + 1)
    ]


@functools.cache
def numeric() -> Sequence[Reading]:
    """Return a numeric slingshot with all quantities measured."""
    return [
        Reading(r.step, {**r.values, "secant_curvature": 1.5, "learning_rate": 1e-3})
        for r in numeric_slingshot(100, 400)
    ]


def broken() -> Iterator[Reading]:
    """Yield a numeric slingshot whose gradients, loss and single quantities are sometimes NaN or Inf."""
    noise = random.Random(1)
    for r in numeric():
        values = dict(r.values)
        for name in QUANTITIES:
            if noise.random() < 0.05:
                values[name] = noise.choice([math.nan, math.inf, -math.inf])
        if 300 <= r.step < 305:
            values |= {"gradient_norm": math.nan, "non_finite_gradients": 1.0, "loss": math.nan}
        if noise.random() < 0.2:
            values = {"loss": values["loss"]}
        elif noise.random() < 0.1:
            values["head_loss"] = 0.5  # wrong on purpose: it must never replace a loss that the user reports
            del values["loss"]
        yield Reading(r.step, values)


def feed(readings: Iterable[Reading], context: RunContext) -> tuple[Detector, list[tuple[Change, Alert]]]:
    """Return a detector that was fed these readings, and all changes of its alerts."""
    detector = Detector(None, context)
    changes = [change for reading in readings for change in detector.update(reading).changes]
    return detector, changes


def resumed(detector: Detector, context: RunContext) -> Detector:
    """Return a new detector, restored from the state of this one."""
    copy = Detector(None, context)
    copy.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    return copy


def kinds(detector: Detector) -> set[AlertKind]:
    return {alert.kind for alert in detector.alerts}


# --- resumed ----------------------------------------------------------------------------------------

RUNS: dict[str, tuple[Callable[[], Iterable[Reading]], RunContext]] = {
    "numeric": (numeric, NUMERIC),
    "numeric, every 4th step": (lambda: numeric_slingshot(100, 400, every=4), NUMERIC),
    "second moment": (lambda: second_moment_slingshot(60, 700), HINGE),
    "quiet": (lambda: quiet(300), DECAYED),
    "broken": (broken, NUMERIC),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_detector_resumed_after_every_reading_gives_the_same_answers(name: str) -> None:
    """A value that state_dict omits gets lost at each reading. Alerts are compared bit for bit (by repr)."""
    series, context = RUNS[name]
    check_resumed_everywhere(list(series()), context)


def test_a_recorded_run_resumed_after_every_reading_gives_the_same_alerts(
    spiking_run: Recorded,
) -> None:
    check_resumed_everywhere(spiking_run.readings, spiking_run.context)


def check_resumed_everywhere(readings: list[Reading], context: RunContext) -> None:
    """Compare a detector that is resumed before each reading with an uninterrupted one."""
    whole, cut = Detector(None, context), Detector(None, context)
    for reading in readings:
        cut = resumed(cut, context)
        expected, found = whole.update(reading), cut.update(reading)
        assert repr(found) == repr(expected), f"after a resume before step {reading.step}"
        assert cut.attention is whole.attention
    assert repr(cut.alerts) == repr(whole.alerts)
    assert json.dumps(cut.state_dict()) == json.dumps(whole.state_dict())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_resume_does_not_change_a_non_finite_alert(value: float) -> None:
    """The alert's evidence is the value that was not finite: Inf must not become NaN."""
    readings = [Reading(r.step, {**r.values, "loss": value} if r.step >= 50 else r.values) for r in quiet(60)]
    whole, _ = feed(readings, NUMERIC)
    assert repr(resumed(whole, NUMERIC).alerts) == repr(whole.alerts)


@settings(max_examples=8)
@given(at=st.floats(0, 1))
@pytest.mark.parametrize("name", ["numeric", "broken"])
def test_a_run_resumed_once_anywhere_gives_the_same_alerts_as_an_uninterrupted_run(
    name: str, at: float
) -> None:
    series, context = RUNS[name]
    readings = list(series())
    cut = round(at * len(readings))
    whole, changes = feed(readings, context)
    first, early = feed(readings[:cut], context)
    second = resumed(first, context)
    late = [change for reading in readings[cut:] for change in second.update(reading).changes]
    assert repr(early + late) == repr(changes)
    assert repr(second.alerts) == repr(whole.alerts)


# --- gaps -------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), share=st.floats(0, 0.75))
def test_missing_readings_cost_no_warning_and_cause_no_false_alert(seed: int, share: float) -> None:
    chance = random.Random(seed)
    kept = [reading for reading in numeric() if chance.random() >= share]
    detector, _ = feed(kept, NUMERIC)
    first = {alert.kind: alert.first_step for alert in reversed(detector.alerts)}
    assert first[AlertKind.AT_RISK] < first[AlertKind.IMMINENT] <= 400 - 25
    high = sum(reading.values["loss"] > 0.1 for reading in kept)  # of 12 steps, which may all be missing
    assert (AlertKind.SLINGSHOT in first) is (high >= 2), "one high loss is no slingshot"
    for context in (NUMERIC, DECAYED):
        detector, _ = feed((r for r in quiet(seed=seed) if chance.random() >= share), context)
        assert detector.alerts == []


@pytest.mark.parametrize("gap", [50, 1000])
def test_a_long_gap_before_the_build_up_delays_no_alert(gap: int) -> None:
    whole, _ = feed(numeric(), NUMERIC)
    gapped = [
        Reading(r.step + (gap if r.step >= 90 else 0), r.values) for r in numeric() if not 40 < r.step < 90
    ]
    late, _ = feed(gapped, NUMERIC)
    assert [(a.id, a.mechanism) for a in late.alerts] == [(a.id, a.mechanism) for a in whole.alerts]
    for found, expected in zip(late.alerts, whole.alerts, strict=True):
        assert abs(found.first_step - gap - expected.first_step) <= 2


# --- not a number -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("name", QUANTITIES)
def test_thirty_steps_of_a_broken_quantity_cause_no_false_alarm_and_cost_no_warning(
    name: str, value: float
) -> None:
    """In a quiet run there is no alarm. Before a slingshot the warning still comes in time."""
    for context in (NUMERIC, DECAYED):
        readings = [
            Reading(r.step, {**r.values, name: value}) if 150 <= r.step < 180 else r for r in quiet(400)
        ]
        detector, _ = feed(readings, context)
        assert AlertKind.IMMINENT not in kinds(detector)
        assert detector.phase is Phase.HEALTHY
    readings = [Reading(r.step, {**r.values, name: value}) if 150 <= r.step < 180 else r for r in numeric()]
    detector, _ = feed(readings, NUMERIC)
    first = {alert.kind: alert.first_step for alert in reversed(detector.alerts)}
    assert first[AlertKind.IMMINENT] <= first[AlertKind.SLINGSHOT] - 25
    json.dumps([alert.to_json() for alert in detector.alerts], allow_nan=False)


@pytest.mark.parametrize("name", ["loss", "weight_norm", "gradient_norm"])
def test_nan_in_the_loss_a_gradient_or_a_weight_begins_a_non_finite_alert_and_no_other(
    name: str,
) -> None:
    def readings() -> Iterable[Reading]:
        for r in quiet(400):
            if 150 <= r.step < 155:
                extra = {"non_finite_gradients": 1.0} if name == "gradient_norm" else {}
                r = Reading(r.step, {**r.values, name: math.nan, **extra})
            yield r

    detector, _ = feed(readings(), DECAYED)
    (alert,) = detector.alerts
    assert (alert.kind, alert.first_step, alert.state) == (AlertKind.NON_FINITE, 150, AlertState.RESOLVED)


@pytest.mark.parametrize(
    "name", [*QUANTITIES, "loss", "weight_norm", "gradient_norm", "non_finite_gradients"]
)
def test_a_quantity_that_is_never_measured_causes_no_alert(name: str) -> None:
    def without(readings: Iterable[Reading]) -> Iterable[Reading]:
        return (Reading(r.step, {k: v for k, v in r.values.items() if k != name}) for r in readings)

    assert feed(without(quiet()), DECAYED)[0].alerts == []
    feed(without(numeric()), NUMERIC)


def test_empty_readings_change_nothing() -> None:
    detector, changes = feed((Reading(step, {}) for step in range(1, 200)), DECAYED)
    assert changes == [] and detector.phase is Phase.HEALTHY


# --- a step counter that jumps ----------------------------------------------------------------------


@pytest.mark.parametrize("violation", [1e-4, 0.5], ids=["healthy", "absorbing"])
@pytest.mark.parametrize("context", [NUMERIC, DECAYED, HINGE], ids=["adam", "adamw", "adamw-999"])
@settings(max_examples=10)
@given(jumps=st.lists(st.tuples(st.integers(1, 599), st.integers(-2000, 2000)), max_size=4))
def test_a_step_counter_that_jumps_in_a_calm_run_causes_no_imminent_alert(
    jumps: list[tuple[int, int]], context: RunContext, violation: float
) -> None:
    moved = [
        Reading(max(r.step + sum(by for at, by in jumps if r.step >= at), 0), r.values)
        for r in quiet(600, violation)
    ]
    detector, _ = feed(moved, context)
    assert not kinds(detector) & {AlertKind.IMMINENT, AlertKind.SLINGSHOT}


@pytest.mark.parametrize("by", [-1000, -150, -1, 1000])
@pytest.mark.parametrize("at", [200, 300])
def test_a_step_counter_that_jumps_during_the_build_up_costs_no_warning(at: int, by: int) -> None:
    _, changes = feed((Reading(r.step + (by if r.step >= at else 0), r.values) for r in numeric()), NUMERIC)
    begun = [alert for change, alert in changes if change is Change.BEGIN]
    assert [alert.kind for alert in begun][-1] is AlertKind.SLINGSHOT
    assert begun[-1].first_step == 400 + by
    imminent = [alert.first_step for alert in begun if alert.kind is AlertKind.IMMINENT]
    assert imminent and (imminent[-1] <= 400 + by - 25 or imminent[-1] < at)


def test_a_step_counter_that_falls_back_in_a_slingshot_does_not_keep_the_alert_firing() -> None:
    """Recovery is measured in steps. A counter that falls back must not prolong it until it has caught up."""
    raised = [Reading(r.step + 1000, r.values) for r in numeric()]
    shifted = [Reading(r.step - 1000, r.values) if r.step >= 1415 else r for r in raised]
    detector, _ = feed(shifted, NUMERIC)
    slingshot = next(alert for alert in detector.alerts if alert.kind is AlertKind.SLINGSHOT)
    assert slingshot.state is AlertState.RESOLVED


def test_a_reading_that_comes_twice_counts_once() -> None:
    """The alerts are the same, and they begin at most 5 steps earlier or later."""
    doubled = [reading for r in numeric() for reading in (r, r)]
    once, _ = feed(numeric(), NUMERIC)
    twice, _ = feed(doubled, NUMERIC)
    assert [(a.id, a.mechanism) for a in twice.alerts] == [(a.id, a.mechanism) for a in once.alerts]
    for found, expected in zip(twice.alerts, once.alerts, strict=True):
        assert abs(found.first_step - expected.first_step) <= 5
    assert feed([reading for r in quiet() for reading in (r, r)], DECAYED)[0].alerts == []


# --- a learning rate that jumps ---------------------------------------------------------------------


@pytest.mark.parametrize("factor", [10.0, 0.1])
@pytest.mark.parametrize("context", [NUMERIC, DECAYED, HINGE], ids=["adam", "adamw", "adamw-999"])
def test_a_learning_rate_that_jumps_in_a_quiet_run_causes_no_imminent_alert(
    context: RunContext, factor: float
) -> None:
    """Updates jump with the learning rate, and so do displacement and curvature × lr; gradients do not."""
    scaled = ("logit_displacement", "logit_displacement_rms", "secant_curvature", "learning_rate")
    readings = [
        Reading(r.step, {k: v * (factor if k in scaled else 1) for k, v in r.values.items()})
        if r.step >= 300 else r
        for r in quiet()
    ]  # fmt: skip
    assert AlertKind.IMMINENT not in kinds(feed(readings, context)[0])
