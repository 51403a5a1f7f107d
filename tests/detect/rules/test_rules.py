"""Test that every rule has all its parts, so that no user's alert is the first to lack one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from nfi_monitor.detect.advice import ADVICE, advice_for
from nfi_monitor.detect.alert_book import AlertBook, Claim
from nfi_monitor.detect.alert_writer import AlertWriter
from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.judgement import Judgement
from nfi_monitor.detect.rules import RULES, Rule, first_evidence, rule_of, rule_of_alert
from nfi_monitor.detect.signals import Signals
from nfi_monitor.detect.situation import RunContext, Situation
from nfi_monitor.detect.smoothing import Hysteresis
from nfi_monitor.detect.spike import SpikeDetector
from nfi_monitor.history import History
from nfi_monitor.quantities import QUANTITIES
from nfi_monitor.report import wording
from nfi_monitor.report.explain import Seen, explain
from nfi_monitor.report.tensorboard.tab_data import CHARTS
from nfi_monitor.types import Alert, AlertKind, Evidence, Mechanism, Phase, Reading, Severity, Thresholds

every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
SHAPES = {
    "rises": lambda step: 1e-3 * 1.1**step,
    "falls": lambda step: 1e3 * 0.9**step,
    "is high": lambda step: 50.0,
    "is low": lambda step: 1e-3,
    "is negative": lambda step: -0.9,
    "is not finite": lambda step: 1.0 if step < 90 else math.nan,
    "jumps": lambda step: 1e-3 if step < 110 else 1.0,
}
"""Courses of a quantity. Every rule's explanation has to name one: add what a new rule looks for."""
CONTEXT = RunContext(beta2=0.95, decoupled_decay=True)


def situation(only: Rule) -> Situation:
    """Return a situation with finite signals, where only this rule is on."""
    signals = Signals()
    for name in Signals.__slots__:
        if not name.startswith("_") and isinstance(getattr(signals, name), float):
            setattr(signals, name, -0.5 if name in ("decay_lowest", "alignment", "turn") else 0.5)
    signals.rms_t_peak = 3.0  # the one sign of some rules
    switches = {rule.name: Hysteresis() for rule in RULES}
    switches.setdefault(only.name, Hysteresis()).on = True
    reading = Reading(100, {"loss": math.nan, "weight_norm": 1.0, "non_finite_gradients": 0.0})
    return Situation(Thresholds(), CONTEXT, signals, SpikeDetector(), switches, reading=reading)


def alerts_of(rule: Rule) -> Iterator[Alert]:
    """Yield the alerts that begin while only this rule is on."""
    for kind, severity in rule.holds.items():
        book, judgement = AlertBook(AlertWriter(situation(rule))), Judgement(rule.phase)
        book.hold(Claim(kind, severity, rule.mechanism, 0.8), 100, judgement)
        assert not judgement.failed
        yield book.alerts[0]


def history(name: str, shape: str) -> History:
    """Return a history in which the quantity ``name`` has this shape."""
    readings = History()
    for step in range(1, 121):
        readings.append(step, {name: SHAPES[shape](step), "learning_rate": 1e-3})
    return readings


# --- the parts of a rule ----------------------------------------------------------------------------------


def demand_evidence(rule: Rule) -> None:
    own = {level.quantity for level in rule.levels} or set(rule.looks_at)
    assert own, f"{rule.name} looks at nothing"
    assert own <= QUANTITIES.keys()
    for alert in alerts_of(rule):
        shown = own & alert.evidence.keys()
        assert shown, f"{rule.name} begins {alert.kind} without evidence of its own"
        assert rule.anytime or any(alert.evidence[name].threshold is not None for name in shown)


def demand_advice(rule: Rule) -> None:
    assert rule.advice in ADVICE, f"{rule.name}: no advice under {rule.advice!r}"
    for alert in alerts_of(rule):
        assert alert.advice
        if rule.mechanism is not Mechanism.UNKNOWN:
            assert alert.advice != advice_for(alert.kind, Mechanism.UNKNOWN, CONTEXT.tau), (
                "this is the advice for an unknown mechanism"
            )


def demand_labels(rule: Rule) -> None:
    assert rule.labels and rule.labels.keys() <= rule.holds.keys()
    for alert in alerts_of(rule):
        found = rule_of_alert(alert)
        assert found is not None, f"no rule of {rule.mechanism} has a label for {alert.kind}: give this one"
        if not rule.anytime:
            assert found.labels[alert.kind] in wording.headline(alert)
            shown, wanted = (
                next(iter(wording.ordered_evidence(alert))),
                first_evidence(rule.mechanism, alert.kind, alert.rule),
            )
            assert shown in wanted, (
                f"{rule.name}: first_evidence says which evidence of {alert.kind} comes first"
            )
    assert rule.mechanism in wording.MECHANISM_NAMES


def demand_charts(rule: Rule) -> None:
    titles = {chart.title: chart for chart in CHARTS}
    assert rule.charts, f"{rule.name} has no chart"
    assert set(rule.charts) <= titles.keys()
    drawn = {name for title in rule.charts for name in titles[title].curves}
    assert {level.quantity for level in rule.levels} <= drawn, f"{rule.name}: evidence that no chart draws"


def demand_explanation(rule: Rule) -> None:
    """Require that an explanation names a crossing of one of the rule's quantities, in one of the SHAPES."""
    named = set()
    for alert in alerts_of(rule):
        for name in rule.looks_at:
            for shape in SHAPES:
                phases = [(0, Phase.HEALTHY), (100, rule.phase)]
                explained = explain(alert, history(name, shape), phases, Thresholds(), CONTEXT)
                named |= {
                    f.quantity
                    for f in explained.of(Seen.CROSSED)
                    if f.supports_mechanism and f.at is not None
                }
    wanted = {level.quantity for level in rule.levels if rule.mechanism in level.supports} or set(
        rule.looks_at
    )
    assert wanted & named, f"{rule.name}: no explanation names a crossing of {wanted}, under any of SHAPES"


DEMANDS = (demand_evidence, demand_advice, demand_labels, demand_charts, demand_explanation)


@every_rule
@pytest.mark.parametrize("demand", DEMANDS, ids=lambda demand: demand.__name__.removeprefix("demand_"))
def test_a_rule_owns(rule: Rule, demand: Any) -> None:
    demand(rule)


def test_names_are_unique_and_only_rules_with_phase_imminent_hold_imminent() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        imminent = AlertKind.IMMINENT in rule.holds
        assert imminent == (rule.phase is Phase.IMMINENT)


# --- a missing part is found ------------------------------------------------------------------------------


class _Bare(Rule):
    """A rule without any parts of its own."""

    name = "bare"
    mechanism = Mechanism.EXTERNAL
    holds = {AlertKind.AT_RISK: Severity.INFO}
    labels = {}
    advice = "nobody's"
    charts = ()

    def enter(self, now: Situation) -> bool:
        return True

    stay = enter


@pytest.mark.parametrize("demand", DEMANDS, ids=lambda demand: demand.__name__.removeprefix("demand_"))
def test_a_rule_that_lacks_a_part_is_found(demand: Any) -> None:
    with pytest.raises(AssertionError):
        demand(_Bare())


# --- checkpoints --------------------------------------------------------------------------------------------


def resumed(state: dict[str, Any]) -> Detector:
    detector = Detector(context=CONTEXT)
    detector.load_state_dict(json.loads(json.dumps(state)))
    return detector


@every_rule
def test_a_rule_that_is_on_survives_a_resume(rule: Rule) -> None:
    state = Detector(context=CONTEXT).state_dict()
    state["switches"][rule.name] = {"on": True, "since": 7}
    assert resumed(state).state_dict()["switches"] == state["switches"]


@every_rule
def test_a_checkpoint_from_before_the_rule_existed_is_read(rule: Rule) -> None:
    state = Detector(context=CONTEXT).state_dict()
    del state["switches"][rule.name]
    again = resumed(state)
    assert not again.state_dict()["switches"][rule.name]["on"]
    again.update(Reading(1, {"loss": 1.0, "zero_sum_violation": 0.0}))


def test_a_checkpoint_of_version_0_1_is_read() -> None:
    """Version 0.1 wrote an underscore before each rule's name, and had no switch for ``non_finite``.

    It also had other keys for the loss.
    """
    now = Detector(context=CONTEXT)
    now.update(Reading(1, {"loss": math.nan, "weight_norm": math.nan, "non_finite_gradients": 1.0}))
    state = now.state_dict()
    del state["switches"]["non_finite"]
    state["switches"] = {f"_{name}": switch for name, switch in state["switches"].items()}
    state["switches"]["_kicking"]["on"] = True
    state["unrest"], state["told"] = state.pop("loss_watch"), state.pop("loss_reported")
    del state["causes"]["on"]
    again = Detector(context=CONTEXT)
    again.load_state_dict(state)
    on = {name for name, switch in again.state_dict()["switches"].items() if switch["on"]}
    assert on == {"kicking", "non_finite"}, "an alert that only one rule holds shows that its switch was on"
    end = again.update(Reading(2, {"loss": 1.0, "weight_norm": 1.0, "non_finite_gradients": 0.0}))
    assert [alert.kind for _, alert in end.changes if alert.last_step == 2].count(AlertKind.NON_FINITE) == 1


def test_evidence_has_the_threshold_that_a_rule_applied_while_it_is_on() -> None:
    usual = AlertWriter(situation(_Bare())).evidence(AlertKind.AT_RISK)
    (coasting,) = (rule for rule in RULES if rule.name == "coasting")
    applied = AlertWriter(situation(coasting)).evidence(AlertKind.AT_RISK)
    assert usual["rms_t_max"].threshold == Thresholds().rms_t_imminent
    expected = Evidence(0.5, Thresholds().coasting_enter, 1.0, crossed=True, below=True, step=100)
    assert applied["rms_t_max"] == expected


def test_words_for_what_no_rule_speaks_for_are_needed() -> None:
    """A rule words every alert of its mechanism: words without a rule would never be shown there."""
    for kind, words in wording.WITHOUT_RULE.items():
        for mechanism in words:
            assert rule_of(mechanism, kind) is None, f"a rule has words for {mechanism}, {kind}: remove these"
    assert not any(first_evidence(mechanism, AlertKind.AT_RISK) for mechanism in wording.FIRST_WITHOUT_RULE)
