"""An alert's evidence is what crossed, as it was when the alert began; and an alert says how it ended."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable

import pytest

from nfi_monitor.detect.alert_book import KEPT, AlertBook, Claim
from nfi_monitor.detect.alert_writer import AlertWriter
from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.judgement import Judgement
from nfi_monitor.detect.rules import RULES, first_evidence, rule_of_alert
from nfi_monitor.detect.signals import Signals
from nfi_monitor.detect.situation import RunContext, Situation
from nfi_monitor.detect.smoothing import Hysteresis
from nfi_monitor.detect.spike import SpikeDetector
from nfi_monitor.report import wording
from nfi_monitor.types import (
    Alert,
    AlertKind,
    AlertState,
    Change,
    Evidence,
    Mechanism,
    Outcome,
    Phase,
    Reading,
    Severity,
    Thresholds,
)
from tests.detect.series import numeric_slingshot, oscillation, second_moment_slingshot
from tests.detect.test_detector import steep_kick
from tests.detect.test_precursors import behind_a_layer_norm, long_memory

NUMERIC = RunContext(beta2=0.95, layer="head")
HINGE = RunContext(beta2=0.999, decoupled_decay=True, no_classes=True)
CONTEXT = RunContext(beta2=0.95, decoupled_decay=True)
RISK = AlertKind.AT_RISK
OWN = Mechanism.NUMERICAL_FEATURE_INFLATION


Series = tuple[Callable[[], Iterable[Reading]], RunContext]
SERIES: dict[str, Series] = {
    "numeric": (lambda: numeric_slingshot(100, 400), NUMERIC),
    "numeric, long memory": (lambda: long_memory(rising=True), RunContext(beta2=0.999)),
    "numeric, behind a LayerNorm": (lambda: behind_a_layer_norm(1e-3), NUMERIC),
    "second moment": (lambda: second_moment_slingshot(300, 2500), HINGE),
    "second moment, steep": (steep_kick, HINGE),
    "edge of stability": (oscillation, NUMERIC),
}
each_series = pytest.mark.parametrize("name", SERIES)


def run(name: str) -> tuple[Detector, list[tuple[Change, Alert]]]:
    """Return the detector after these readings, and the changes of its alerts."""
    readings, context = SERIES[name]
    detector, changes = Detector(None, context), []
    for reading in readings():
        changes += detector.update(reading).changes
    return detector, changes


def begun(changes: list[tuple[Change, Alert]]) -> list[Alert]:
    return [alert for change, alert in changes if change is Change.BEGIN]


# --- evidence ------------------------------------------------------------------------------------------


@each_series
def test_what_stands_first_in_an_alert_has_crossed_its_threshold(name: str) -> None:
    for alert in begun(run(name)[1]):
        evidence = wording.ordered_evidence(alert)
        first = next(iter(evidence.values()))
        assert first.threshold is not None and first.crossed, alert.id
        marks = [item.crossed for item in evidence.values()]
        assert marks == sorted(marks, reverse=True), "what has not crossed comes last"
        for item in evidence.values():
            beyond = item.value <= item.threshold if item.below else item.value >= item.threshold
            assert item.crossed is beyond and item.step is not None


@each_series
def test_evidence_stays_as_it_was_when_the_alert_began(name: str) -> None:
    detector, changes = run(name)
    latest = {alert.id: alert for alert in detector.alerts}
    for first in begun(changes):
        for quantity, item in first.evidence.items():
            if item.crossed:
                kept = latest[first.id].evidence[quantity]
                assert (kept.value, kept.threshold, kept.step) == (item.value, item.threshold, item.step)


@each_series
def test_an_extreme_is_beyond_the_value_at_the_beginning(name: str) -> None:
    for alert in run(name)[0].alerts:
        for item in alert.evidence.values():
            if item.extreme is not None:
                assert item.crossed
                assert item.extreme < item.value if item.below else item.extreme > item.value


def test_an_alert_for_a_growth_gains_the_growth_when_it_becomes_more_severe() -> None:
    _, changes = run("numeric")
    first, risen = [alert for _, alert in changes if alert.kind is RISK][:2]
    assert (first.severity, risen.severity) == (Severity.INFO, Severity.WARNING)
    assert next(iter(wording.ordered_evidence(first))) == "zero_sum_violation_smoothed"
    growth = risen.evidence["feature_mean_growth"]
    limit = Thresholds().inflating_growth / NUMERIC.tau
    assert growth.crossed and growth.step == risen.last_step and growth.threshold == pytest.approx(limit)
    violation = "zero_sum_violation_smoothed"
    assert risen.evidence[violation].value == first.evidence[violation].value
    assert wording.evidence_in_words(risen, 3).startswith("growth of ‖μ_G‖ ")
    assert "violation" not in wording.evidence_in_words(risen, 3), "the line says what is new"


def test_an_alert_for_a_swell_shows_the_swell() -> None:
    _, changes = run("numeric, behind a LayerNorm")
    imminent = next(alert for alert in begun(changes) if alert.kind is AlertKind.IMMINENT)
    name, item = next(iter(wording.ordered_evidence(imminent).items()))
    limits = Thresholds()
    assert name == "feature_displacement" and item.baseline is not None
    assert item.threshold == pytest.approx(max(limits.imminent_exit, limits.imminent_swell * item.baseline))
    assert imminent.evidence["logit_displacement"].crossed is False
    level = wording.number(limits.imminent_displacement)
    assert f"threshold {level}, not crossed" in wording.evidence_in_words(imminent)
    assert "logit displacement" not in wording.evidence_in_words(imminent, 3)


def test_a_rule_claims_each_condition_by_which_it_switches_on() -> None:
    """Readings of each rule → quantities that must have crossed in the alert that it begins."""
    wanted = {
        ("numeric", RISK): {"zero_sum_violation_smoothed"},
        ("numeric", AlertKind.IMMINENT): {
            "logit_displacement", "feature_mean_growth", "zero_sum_violation_smoothed",
        },
        ("second moment", RISK): {"rms_t_max", "second_moment_decay"},
        ("second moment", AlertKind.IMMINENT): {
            "rms_t_max", "second_moment_decay", "secant_curvature", "loss",
        },
        ("edge of stability", AlertKind.IMMINENT): {
            "secant_curvature", "gradient_alignment", "feature_displacement", "loss",
        },
    }  # fmt: skip
    for (name, kind), quantities in wanted.items():
        alert = next(alert for alert in begun(run(name)[1]) if alert.kind is kind)
        assert {quantity for quantity, item in alert.evidence.items() if item.crossed} == quantities


def test_the_growth_that_imminent_requires_is_held_against_its_own_level() -> None:
    _, changes = run("numeric")
    imminent = next(alert for alert in begun(changes) if alert.kind is AlertKind.IMMINENT)
    level = Thresholds().imminent_growth / NUMERIC.tau
    assert imminent.evidence["feature_mean_growth"].threshold == pytest.approx(level)


def test_a_slingshot_keeps_the_loss_at_its_beginning_and_the_peak_besides() -> None:
    def readings() -> Iterable[Reading]:
        for r in numeric_slingshot(100, 400):
            loss = {400: 0.3, 401: 0.2, 402: 4.0}.get(r.step, r.values["loss"])
            yield Reading(r.step, {**r.values, "loss": loss})

    detector = Detector(None, NUMERIC)
    for reading in readings():
        detector.update(reading)
    (loss,) = [a.evidence["loss"] for a in detector.alerts if a.kind is AlertKind.SLINGSHOT]
    assert (loss.value, loss.extreme) == (0.3, 4.0)


# --- the rule ------------------------------------------------------------------------------------------


@each_series
def test_an_alert_keeps_the_name_of_the_rule_that_describes_it(name: str) -> None:
    detector, _ = run(name)
    for alert in detector.alerts:
        rule = next(rule for rule in RULES if rule.name == alert.rule)
        assert rule.mechanism is alert.mechanism
        back = Alert.from_json(json.loads(json.dumps(alert.to_json())))
        assert back == alert and back.rule == alert.rule
        if alert.kind is not AlertKind.SLINGSHOT:
            assert rule_of_alert(alert) is rule


def test_two_rules_of_one_mechanism_have_their_own_words() -> None:
    alerts = {name: begun(run(name)[1])[0] for name in ("numeric", "second moment")}
    for alert in alerts.values():
        record = alert.to_json()
        del record["rule"], record["outcome"]  # as in version 0.2
        assert wording.headline(Alert.from_json(record)) == wording.headline(alert)
    _, changes = run("numeric")
    last = [alert for _, alert in changes if alert.kind is RISK][1]
    assert last.rule == "inflating" and "the feature mean grows" in wording.headline(last)
    assert first_evidence(OWN, AlertKind.IMMINENT, "imminent")[0] == "logit_displacement"


# --- how an alert ends ------------------------------------------------------------------------------------


def test_a_warning_that_is_followed_by_its_spike_ends_as_come_true() -> None:
    detector, changes = run("numeric")
    ended = [alert for change, alert in changes if change is Change.END and alert.kind in (RISK, "imminent")]
    assert [alert.outcome for alert in ended] == [Outcome.SLINGSHOT, Outcome.SLINGSHOT]
    for alert in ended:
        assert alert.outcome_step == 400
        assert wording.headline(alert).startswith("it happened: the loss jumped ×")
        assert f"at step 400, {400 - alert.first_step} steps after" in wording.headline(alert)
    (slingshot,) = [alert for alert in detector.alerts if alert.kind is AlertKind.SLINGSHOT]
    assert slingshot.outcome is None and slingshot.state is AlertState.RESOLVED


def test_a_warning_that_leads_to_nothing_ends_as_passed() -> None:
    detector = Detector(None, NUMERIC)
    for reading in numeric_slingshot(100, 400):
        calm = reading.step > 300
        rest = {"zero_sum_violation": 0.0, "absorbed_fraction": 0.0} if calm else {}
        detector.update(Reading(reading.step, {**reading.values, **rest, "loss": 1e-7}))
    assert {alert.outcome for alert in detector.alerts} == {Outcome.PASSED}
    assert "no slingshot came" in wording.headline(detector.alerts[0])


# --- the book itself --------------------------------------------------------------------------------------


class Book:
    """An alert book over a situation whose violation a test sets."""

    def __init__(self) -> None:
        self.signals = Signals()
        switches = {rule.name: Hysteresis() for rule in RULES}
        self.now = Situation(Thresholds(), CONTEXT, self.signals, SpikeDetector(), switches)
        self.book = AlertBook(AlertWriter(self.now))
        self.switches = switches
        switches["absorbing"].on = True

    def hold(
        self,
        step: int,
        severity: Severity,
        violation: float,
        *,
        may_lower: bool = False,
        unmoved_since: int | None = None,
    ) -> tuple[Alert, list[Change]]:
        self.signals.violation, self.now.reading = violation, Reading(step, {})
        judgement = Judgement(Phase.ABSORBING)
        claim = Claim(RISK, severity, OWN, 0.8, may_lower=may_lower, unmoved_since=unmoved_since)
        self.book.hold(claim, step, judgement)
        assert not judgement.failed
        return self.book.alerts[-1], [change for change, _ in judgement.changes]


def test_a_severity_falls_only_where_the_claim_allows_it() -> None:
    book = Book()
    book.hold(1, Severity.WARNING, 0.2)
    alert, changes = book.hold(2, Severity.INFO, 0.2)
    assert alert.severity is Severity.WARNING and changes == []
    alert, changes = book.hold(900, Severity.INFO, 0.2, may_lower=True, unmoved_since=300)
    assert (alert.severity, alert.unmoved_since, changes) == (Severity.INFO, 300, [Change.UPDATE])
    assert wording.unmoved_in_words(alert) == "since step 300 nothing moved"
    alert, changes = book.hold(901, Severity.INFO, 0.2, may_lower=True, unmoved_since=300)
    assert changes == []
    alert, changes = book.hold(950, Severity.WARNING, 0.3)
    assert (alert.severity, alert.unmoved_since, changes) == (Severity.WARNING, None, [Change.UPDATE])


def test_without_a_step_nothing_has_moved_since_the_severity_fell() -> None:
    book = Book()
    book.hold(1, Severity.WARNING, 0.2)
    alert, _ = book.hold(700, Severity.INFO, 0.2, may_lower=True)
    assert alert.unmoved_since == 700


def test_an_item_that_had_not_crossed_is_replaced_when_the_alert_becomes_more_severe() -> None:
    book = Book()
    first, _ = book.hold(1, Severity.INFO, 0.05)
    assert first.evidence["zero_sum_violation_smoothed"].crossed is False
    book.hold(2, Severity.INFO, 0.4)
    kept, _ = book.hold(3, Severity.INFO, 0.4)
    assert kept.evidence == first.evidence
    risen, _ = book.hold(4, Severity.WARNING, 0.5)
    item = risen.evidence["zero_sum_violation_smoothed"]
    assert (item.value, item.crossed, item.step) == (0.5, True, 4)


def test_a_mean_that_shrank_at_the_warning_and_grows_at_the_slingshot_has_a_threshold_of_each_sign() -> None:
    book = Book()
    book.switches["imminent"].on = True
    judgement = Judgement(Phase.IMMINENT)
    for kind, step, growth in ((AlertKind.IMMINENT, 5, -0.01), (AlertKind.SLINGSHOT, 7, 0.004)):
        book.signals.growth, book.now.reading = growth, Reading(step, {})
        book.book.end(AlertKind.IMMINENT, step, judgement, outcome=(Outcome.SLINGSHOT, step))
        book.book.begin(Claim(kind, Severity.CRITICAL, OWN, 0.8), step, judgement)
    assert not judgement.failed
    warning, slingshot = (alert.evidence["feature_mean_growth"] for alert in book.book.alerts)
    level = Thresholds().imminent_growth / CONTEXT.tau
    assert warning.below and warning.threshold == pytest.approx(-level)
    assert not slingshot.below and slingshot.threshold == pytest.approx(level)
    assert {alert.tau for alert in book.book.alerts} == {CONTEXT.tau}


def test_what_still_fires_when_the_run_ends_says_so_and_goes_on_in_a_resumed_run() -> None:
    book = Book()
    book.hold(5, Severity.INFO, 0.2)
    (open_alert,) = book.book.run_ended(40)
    assert book.book.alerts == [open_alert]
    assert open_alert.state is AlertState.FIRING and open_alert.outcome is Outcome.OPEN
    assert (open_alert.outcome_step, open_alert.last_step) == (40, 40)
    assert wording.headline(open_alert) == (
        "still firing: at risk since step 5 when the run ended at step 40"
    )
    again = Book()
    again.book.load_state_dict(json.loads(json.dumps(book.book.state_dict())))
    resumed, _ = again.hold(41, Severity.INFO, 0.2)
    assert resumed.outcome is None and resumed.outcome_step is None and resumed.first_step == 5


# --- records ----------------------------------------------------------------------------------------------


def test_a_record_of_version_0_2_is_read() -> None:
    record = begun(run("numeric")[1])[0].to_json()
    for name in ("rule", "outcome", "outcome_step", "unmoved_since", "tau"):
        del record[name]
    record["evidence"] = {"zero_sum_violation": {"value": 0.13, "threshold": 0.1, "baseline": 0.0}}
    alert = Alert.from_json(record)
    assert alert.evidence == {"zero_sum_violation_smoothed": Evidence(0.13, 0.1, 0.0)}
    assert alert.outcome is None and alert.rule == ""
    assert wording.evidence_in_words(alert, 3) == "smoothed zero-sum violation 0.13 (threshold 0.1)"


def test_evidence_leaves_out_what_says_nothing() -> None:
    assert Evidence(math.inf, 1.0).to_json() == {"value": None, "threshold": 1.0, "baseline": None}
    full = Evidence(0.4, 0.5, 1.0, crossed=True, below=True, step=7, extreme=0.1)
    assert Evidence.from_json(json.loads(json.dumps(full.to_json()))) == full


def test_a_saved_state_does_not_grow_with_the_number_of_alerts() -> None:
    book = AlertBook(AlertWriter(Detector()._now))
    judgement = Judgement(Phase.HEALTHY)
    at_risk = Claim(AlertKind.AT_RISK, Severity.WARNING, Mechanism.UNKNOWN, 0.5)
    imminent = Claim(AlertKind.IMMINENT, Severity.WARNING, Mechanism.UNKNOWN, 0.5)
    book.begin(at_risk, 1, judgement)  # it fires all the time
    for step in range(2, 5_002):
        book.begin(imminent, step, judgement)
        book.end(AlertKind.IMMINENT, step, judgement)
    state = book.state_dict()
    assert len(json.dumps(state)) < 3_000_000
    assert [record["id"] for record in state["alerts"][:2]] == ["at_risk-1", "imminent-4001"]
    again = AlertBook(AlertWriter(Detector()._now))
    again.load_state_dict(state)
    assert again.alerts == [book.alerts[0], *book.alerts[-KEPT:]]
    firing = again.firing(AlertKind.AT_RISK)
    assert firing is not None and firing.id == "at_risk-1"
    again.begin(imminent, 5_002, judgement)
    assert again.alerts[-1].id == "imminent-5001"
