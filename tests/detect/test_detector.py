from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from nfi_monitor.detect.causes import FORGOTTEN
from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.types import (
    Alert,
    AlertKind,
    AlertState,
    Change,
    Mechanism,
    Outcome,
    Phase,
    Reading,
    Severity,
    Thresholds,
)
from tests.detect.series import numeric_slingshot, second_moment_slingshot

NUMERIC = RunContext(beta2=0.95, layer="head")
HINGE = RunContext(beta2=0.999, decoupled_decay=True, no_classes=True)


def run(
    readings: Iterable[Reading], context: RunContext, thresholds: Thresholds | None = None
) -> tuple[Detector, list[tuple[Change, Alert]], list[Phase]]:
    """Return a detector that was fed these readings, its alerts' changes, and the phase at each reading."""
    detector = Detector(thresholds, context)
    changes: list[tuple[Change, Alert]] = []
    phases = []
    for reading in readings:
        judgement = detector.update(reading)
        changes += judgement.changes
        phases.append(judgement.phase)
    return detector, changes, phases


def only(detector: Detector, kind: AlertKind) -> Alert:
    """Return the only alert of this kind; fail if there are none or several."""
    found = [alert for alert in detector.alerts if alert.kind is kind]
    assert len(found) == 1, f"{len(found)} alerts of kind {kind}: one event, one alert"
    return found[0]


def test_a_numeric_slingshot_has_three_alerts_one_for_each_stage() -> None:
    detector, changes, phases = run(numeric_slingshot(100, 400), NUMERIC)
    at_risk, imminent = only(detector, AlertKind.AT_RISK), only(detector, AlertKind.IMMINENT)
    slingshot = only(detector, AlertKind.SLINGSHOT)
    assert 100 < at_risk.first_step < imminent.first_step < slingshot.first_step == 400
    assert imminent.first_step <= 400 - 25, "the cure needs 1.25 τ"
    assert {alert.mechanism for alert in detector.alerts} == {Mechanism.NUMERICAL_FEATURE_INFLATION}
    assert {alert.state for alert in detector.alerts} == {AlertState.RESOLVED}
    seen = list(dict.fromkeys(phases))
    assert seen == [
        Phase.HEALTHY, Phase.ABSORBING, Phase.INFLATING, Phase.IMMINENT, Phase.SLINGSHOT, Phase.RECOVERING,
    ]  # fmt: skip
    begun = [alert.kind for change, alert in changes if change is Change.BEGIN]
    assert begun == [AlertKind.AT_RISK, AlertKind.IMMINENT, AlertKind.SLINGSHOT]


def test_at_risk_has_severity_info_until_the_feature_mean_grows() -> None:
    _, changes, _ = run(numeric_slingshot(100, 400), NUMERIC)
    at_risk = [(change, alert.severity) for change, alert in changes if alert.kind is AlertKind.AT_RISK]
    assert at_risk == [
        (Change.BEGIN, Severity.INFO), (Change.UPDATE, Severity.WARNING), (Change.END, Severity.WARNING),
    ]  # fmt: skip


def test_every_alert_has_evidence_with_a_threshold_and_advice() -> None:
    _, changes, _ = run(numeric_slingshot(100, 400), NUMERIC)
    for _, alert in changes:
        violation = alert.evidence["zero_sum_violation_smoothed"]
        assert violation.threshold == Thresholds().absorbing_enter
        assert alert.advice and alert.layer == "head"
        assert Alert.from_json(json.loads(json.dumps(alert.to_json()))) == alert


def test_the_forecast_when_imminent_begins_contains_the_true_number_of_steps() -> None:
    _, changes, _ = run(numeric_slingshot(100, 400), NUMERIC)
    imminent = next(a for change, a in changes if change is Change.BEGIN and a.kind is AlertKind.IMMINENT)
    assert imminent.steps_to_spike is not None
    low, _, high = imminent.steps_to_spike
    assert low <= 400 - imminent.first_step <= high


def test_a_second_moment_slingshot_is_at_risk_while_coasting_and_imminent_at_the_kick() -> None:
    detector, changes, _ = run(second_moment_slingshot(300, 2500), HINGE)
    at_risk, imminent = only(detector, AlertKind.AT_RISK), only(detector, AlertKind.IMMINENT)
    slingshot = only(detector, AlertKind.SLINGSHOT)
    assert 300 < at_risk.first_step < 2000
    assert imminent.first_step == 2501 and slingshot.first_step == 2503
    assert {alert.mechanism for alert in detector.alerts} == {Mechanism.SECOND_MOMENT}
    assert "Float64 does not help" in " ".join(at_risk.advice)
    begun = next(alert for change, alert in changes if change is Change.BEGIN)
    assert begun.evidence["rms_t_max"].value < begun.evidence["rms_t_max"].threshold == 0.5


def test_without_weight_decay_a_vanished_gradient_is_not_at_risk() -> None:
    detector, _, _ = run(second_moment_slingshot(300, 2400), RunContext(beta2=0.999, no_classes=True))
    assert [
        alert for alert in detector.alerts if alert.kind is AlertKind.AT_RISK and alert.last_step < 2400
    ] == []


def test_a_loss_that_leaps_after_an_ordinary_update_has_an_external_mechanism() -> None:
    def readings() -> Iterable[Reading]:
        for step in range(1, 300):
            bad = 200 <= step < 203
            yield Reading(
                step,
                {
                    "zero_sum_violation": 1e-7,
                    "unexplained_violation_fraction": 0.0,
                    "loss": 5.0 if bad else 1e-3,
                    "rms_t_max": 9.0 if bad else 1.0,
                    "head_sqrt_exp_avg_sq_mean": 1.0,
                    "weight_norm": 1.0,
                    "feature_mean_norm": 1.0,
                    "logit_displacement": 0.01,
                    "secant_curvature": 1.0,
                },
            )

    detector, _, _ = run(readings(), NUMERIC)
    assert [alert.kind for alert in detector.alerts] == [AlertKind.SLINGSHOT]
    assert detector.alerts[0].mechanism is Mechanism.EXTERNAL
    assert detector.alerts[0].severity is Severity.WARNING, "the weights are as good as before"
    assert "Look at the data of this step" in detector.alerts[0].advice[0]


@pytest.mark.parametrize(("read", "named"), [(1, Mechanism.EXTERNAL), (32, Mechanism.UNKNOWN)])
def test_a_kick_from_outside_is_inferred_only_from_the_update_right_before_it(
    read: int, named: Mechanism
) -> None:
    """The loss is known at every step, the other quantities at one in ``read`` steps only.

    With ``read`` = 32 the update right before the event is unknown, so no mechanism is named.
    """

    def readings() -> Iterable[Reading]:
        for step in range(1, 300):
            rest = {"zero_sum_violation": 1e-7, "rms_t_max": 1.0, "update_rms": 1e-4, "weight_norm": 1.0}
            loss = {"loss": 5.0 if step >= 250 else 1e-3}
            yield Reading(step, loss if step % read else {**rest, **loss})

    assert only(run(readings(), NUMERIC)[0], AlertKind.SLINGSHOT).mechanism is named


def test_a_violation_that_rounding_cannot_explain_causes_no_alert() -> None:
    readings = (
        Reading(r.step, {**r.values, "unexplained_violation_fraction": 0.9, "loss": 1e-7})
        for r in numeric_slingshot(100, 400)
    )
    detector, _, phases = run(readings, NUMERIC)
    assert detector.alerts == [] and set(phases) == {Phase.HEALTHY}


def test_the_weight_gradients_violation_is_used_where_the_rows_are_not_measured() -> None:
    def blind() -> Iterable[Reading]:
        for r in numeric_slingshot(100, 400):
            values = dict(r.values)
            values["zero_sum_violation_weight"] = values.pop("zero_sum_violation")
            yield Reading(r.step, values)

    detector, _, _ = run(blind(), NUMERIC)
    assert only(detector, AlertKind.AT_RISK).first_step < 300


@pytest.mark.parametrize("every", [2, 4])
def test_reading_every_second_or_fourth_step_costs_at_most_half_a_tau_of_lead(every: int) -> None:
    dense, _, _ = run(numeric_slingshot(100, 400), NUMERIC)
    sparse, _, _ = run(numeric_slingshot(100, 400, every=every), NUMERIC)
    delay = only(sparse, AlertKind.IMMINENT).first_step - only(dense, AlertKind.IMMINENT).first_step
    assert delay <= 10, "half a τ"


@pytest.mark.parametrize("at", [90, 150, 250, 395, 405, 430])
@pytest.mark.parametrize(
    ("series", "context"),
    [(lambda: numeric_slingshot(100, 400), NUMERIC), (lambda: second_moment_slingshot(60, 380), HINGE)],
    ids=["numeric", "second_moment"],
)
def test_a_resumed_detector_gives_the_alerts_of_an_uninterrupted_one(
    at: int, series: Any, context: RunContext
) -> None:
    readings = list(series())
    whole, whole_changes, _ = run(readings, context)
    first, early, _ = run(readings[:at], context)
    second = Detector(None, context)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    late = [change for reading in readings[at:] for change in second.update(reading).changes]
    assert second.alerts == whole.alerts
    assert early + late == whole_changes
    assert json.dumps(second.state_dict()) == json.dumps(whole.state_dict())


def test_gaps_nan_and_a_step_counter_that_jumps_raise_no_exception() -> None:
    readings = []
    for r in numeric_slingshot(100, 400):
        step = r.step if r.step < 200 else r.step + 10_000
        values = {k: (math.nan if (r.step % 7 == 0 and k != "loss") else v) for k, v in r.values.items()}
        values["non_finite_gradients"] = 0.0
        if r.step % 11:
            readings.append(Reading(step, values))
    detector, _, _ = run(readings, NUMERIC)
    assert AlertKind.SLINGSHOT in {alert.kind for alert in detector.alerts}


def test_a_non_finite_alert_ends_when_the_loss_is_finite_again() -> None:
    def readings() -> Iterable[Reading]:
        for step in range(1, 10):
            loss = math.nan if 4 <= step < 7 else 1.0
            yield Reading(step, {"loss": loss, "non_finite_gradients": 0.0})

    detector, changes, _ = run(readings(), NUMERIC)
    alert = only(detector, AlertKind.NON_FINITE)
    assert (alert.first_step, alert.last_step, alert.state) == (4, 7, AlertState.RESOLVED)
    assert [change for change, _ in changes] == [Change.BEGIN, Change.END]
    assert json.loads(json.dumps(alert.to_json(), allow_nan=False))["evidence"]["loss"]["value"] is None


def test_a_loss_below_zero_ends_a_slingshot_and_later_warnings_still_come() -> None:
    """Earlier, the slingshot fired and every step was read to the end of the run."""

    def readings() -> Iterable[Reading]:
        for r in numeric_slingshot(100, 400):
            yield Reading(r.step, {**r.values, "loss": -1.0 if r.step >= 403 else r.values["loss"]})
        for r in numeric_slingshot(800, 1100):
            if r.step > 600:
                yield Reading(r.step, {**r.values, "loss": -1.0})

    detector, _, phases = run(readings(), NUMERIC)
    assert only(detector, AlertKind.SLINGSHOT).last_step == 403
    assert Phase.HEALTHY in phases[403:]
    assert [alert.kind for alert in detector.alerts[-2:]] == [AlertKind.AT_RISK, AlertKind.IMMINENT]


def test_a_non_finite_loss_is_a_warning_until_gradients_or_weights_are_not_finite_either() -> None:
    whole = {"loss": math.nan, "non_finite_gradients": 0.0, "weight_norm": 1.0}
    readings = [
        Reading(1, {"loss": math.nan}),
        Reading(2, whole),
        Reading(3, {**whole, "weight_norm": math.inf}),
        Reading(4, whole),
    ]
    detector, changes, _ = run(readings, NUMERIC)
    begun, risen = (alert for _, alert in changes)
    assert [change for change, _ in changes] == [Change.BEGIN, Change.UPDATE]
    assert begun.severity is Severity.WARNING and list(begun.evidence) == ["loss"]
    assert "go back" not in " ".join(begun.advice)
    assert risen.severity is Severity.CRITICAL and risen.id == begun.id
    crossed = {name: item.crossed for name, item in risen.evidence.items()}
    assert crossed == {"weight_norm": True, "loss": True, "non_finite_gradients": False}
    assert "go back to the last checkpoint" in risen.advice[0]
    assert only(detector, AlertKind.NON_FINITE) == replace(risen, last_step=4)


def test_a_mechanism_named_during_the_build_up_is_kept_in_the_last_steps() -> None:
    """At the kick the curvature exceeds the stability limit, too. That is an effect of the spike."""
    detector, changes, _ = run(second_moment_slingshot(300, 2500), HINGE)
    assert {alert.mechanism for _, alert in changes} == {Mechanism.SECOND_MOMENT}
    assert only(detector, AlertKind.SLINGSHOT).evidence["secant_curvature"].value > NUMERIC.stability_limit


def steep_kick() -> Iterable[Reading]:
    """Yield a kick whose RMS_t and curvature are each below the usual level, but together enough."""
    for r in second_moment_slingshot(300, 2500):
        kicked = r.step >= 2500
        rest = {"rms_t_max": 1.8, "secant_curvature": 25.0} if kicked else {}
        yield Reading(r.step, {**r.values, **rest})


def test_a_slingshots_evidence_has_the_thresholds_that_named_its_mechanism() -> None:
    """Earlier, the evidence was read after the slingshot's begin had reset it, with other thresholds."""
    detector, changes, _ = run(steep_kick(), HINGE)
    imminent = next(a for change, a in changes if change is Change.BEGIN and a.kind is AlertKind.IMMINENT)
    slingshot = only(detector, AlertKind.SLINGSHOT)
    assert slingshot.mechanism is Mechanism.SECOND_MOMENT
    assert slingshot.evidence["second_moment_decay"].value <= FORGOTTEN
    levels = {name: item.threshold for name, item in slingshot.evidence.items() if name != "loss"}
    assert levels == {name: item.threshold for name, item in imminent.evidence.items() if name != "loss"}
    limits = Thresholds()
    assert levels["rms_t_max"] == limits.rms_t_steep < 1.8 < limits.rms_t_imminent
    steep = limits.kick_curvature * HINGE.stability_limit
    assert levels["secant_curvature"] == pytest.approx(steep) and steep < 25.0 < HINGE.stability_limit


def test_absorption_that_begins_during_coasting_becomes_the_mechanism_of_the_alert() -> None:
    def readings() -> Iterable[Reading]:
        for r in second_moment_slingshot(300, 2500):
            violation = 0.12 if r.step > 1800 else 1e-7
            if r.step < 2400:
                yield Reading(r.step, {**r.values, "zero_sum_violation": violation})

    detector, _, _ = run(readings(), RunContext(beta2=0.999, decoupled_decay=True))
    at_risk = only(detector, AlertKind.AT_RISK)
    assert at_risk.first_step < 1800 and at_risk.state is AlertState.FIRING
    assert at_risk.mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION
    assert "float64" in at_risk.advice[0]


def test_a_violation_of_rows_that_does_not_reach_the_weights_causes_no_alert() -> None:
    """In ordinary minibatches half of the rows are absorbed; the few rows that carry the gradient are not."""
    readings = [
        Reading(r.step, {**r.values, "zero_sum_violation_weight": 1e-5, "loss": 1e-7})
        for r in numeric_slingshot(100, 400)
    ]
    detector, _, phases = run(readings, NUMERIC)
    assert detector.alerts == [] and set(phases) == {Phase.HEALTHY}


def test_the_batchs_violation_decides_where_the_weight_gradient_cannot_be_read() -> None:
    for batch, alarmed in ((1e-6, False), (0.2, True)):
        readings = [
            Reading(r.step, {**r.values, "zero_sum_violation_batch": batch})
            for r in numeric_slingshot(100, 400)
        ]
        detector, _, _ = run(readings, NUMERIC)
        assert (AlertKind.AT_RISK in {alert.kind for alert in detector.alerts}) is alarmed


def test_without_weight_decay_a_high_rms_t_is_no_kick() -> None:
    detector, _, _ = run(second_moment_slingshot(300, 2500), RunContext(beta2=0.999, no_classes=True))
    assert [alert.kind for alert in detector.alerts] == [AlertKind.SLINGSHOT]


def test_a_warning_before_a_slingshot_came_true_and_says_at_which_step() -> None:
    detector, changes, _ = run(numeric_slingshot(100, 400), NUMERIC)
    for kind in (AlertKind.AT_RISK, AlertKind.IMMINENT):
        warning = only(detector, kind)
        assert (warning.outcome, warning.outcome_step) == (Outcome.SLINGSHOT, 400)
    slingshot = only(detector, AlertKind.SLINGSHOT)
    assert (slingshot.outcome, slingshot.outcome_step) == (None, None)
    assert all(alert.outcome is None for change, alert in changes if change is not Change.END)


@pytest.mark.parametrize("peak, outcome", [(2e-4, Outcome.BURST), (1.2e-7, Outcome.PASSED)])
def test_a_warning_without_a_slingshot_ends_with_a_burst_or_passes(peak: float, outcome: Outcome) -> None:
    readings = []
    for reading in numeric_slingshot(100, 400):
        loss = reading.values["loss"]
        readings.append(Reading(reading.step, {**reading.values, "loss": peak if loss == 0.5 else 1e-7}))
    detector, _, _ = run(readings, NUMERIC)
    imminent = only(detector, AlertKind.IMMINENT)
    assert imminent.outcome is outcome
    assert imminent.outcome_step == (400 if outcome is Outcome.BURST else None)
    assert all(alert.kind is not AlertKind.SLINGSHOT for alert in detector.alerts)


def test_imminent_may_begin_at_the_first_loss_of_a_slingshot() -> None:
    """The slingshot is named at its second loss, so a warning at the first one still comes before it."""
    detector = Detector(context=NUMERIC)
    changes = []
    for reading in numeric_slingshot(100, 400):
        if reading.step < 400:
            values = {**reading.values, "logit_displacement": 0.02}
        elif reading.step == 400:
            values = {**reading.values, "logit_displacement": 1e6}
        else:
            values = dict(reading.values)
        judgement = detector.update(Reading(reading.step, values))
        changes += [(reading.step, change, alert.kind) for change, alert in judgement.changes]
    assert (400, Change.BEGIN, AlertKind.IMMINENT) in changes
    assert (401, Change.BEGIN, AlertKind.SLINGSHOT) in changes
    assert only(detector, AlertKind.IMMINENT).outcome_step == 400


@pytest.mark.parametrize("no_classes, unit", [(True, 40.0), (False, 1.0)])
def test_a_loss_without_classes_is_measured_in_its_early_level(no_classes: bool, unit: float) -> None:
    detector = Detector(context=RunContext(no_classes=no_classes))
    for step in range(1, 100):
        detector.update(Reading(step, {"loss": 40.0 if no_classes else 4.0, "weight_norm": 1.0}))
    assert detector.spike.baseline.unit == unit


@pytest.mark.parametrize(
    ("readings", "context"),
    [(numeric_slingshot(100, 400), NUMERIC), (second_moment_slingshot(60, 380), HINGE)],
    ids=["numeric", "second_moment"],
)
def test_the_cause_is_the_same_whether_each_reading_asks_for_it_or_the_slingshot(
    readings: Iterable[Reading], context: RunContext
) -> None:
    late, early = Detector(context=context), Detector(context=context)
    for reading in list(readings):
        late.update(reading)
        early.update(reading)
        early.state_dict()  # asks for the cause
    assert late.alerts and repr(late.alerts) == repr(early.alerts)
    assert repr(late.state_dict()) == repr(early.state_dict())
