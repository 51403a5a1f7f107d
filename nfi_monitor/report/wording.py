"""Describe alerts in words, so that the console, TensorBoard and the after-run report say the same.

Pure functions from an alert to a string.  Quantities keep the names of the papers; fractions are written in
percent, displacements in nat.
"""

from __future__ import annotations

import math

from nfi_monitor.detect.rules import first_evidence, rule_of
from nfi_monitor.quantities import QUANTITIES
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.types import Alert, AlertKind, AlertState, Evidence, Mechanism, Severity

MECHANISM_NAMES = {
    Mechanism.NUMERICAL_FEATURE_INFLATION: "numerical feature inflation",
    Mechanism.SECOND_MOMENT: "decayed second moment",
    Mechanism.EDGE_OF_STABILITY: "edge of stability",
    Mechanism.EXTERNAL: "a kick from outside",
    Mechanism.UNKNOWN: "mechanism not clear",
}

WITHOUT_RULE = {
    # For mechanisms without a rule: kind of alert → mechanism → text.
    AlertKind.AT_RISK: {
        Mechanism.EXTERNAL: "the batches or the learning-rate schedule move the weights far",
        Mechanism.UNKNOWN: "signs of a slingshot, without a known mechanism",
    },
    AlertKind.IMMINENT: {
        Mechanism.EXTERNAL: "the batch or the learning rate has just moved the weights far",
        Mechanism.UNKNOWN: "one update already moves the logits",
    },
}
FIRST_WITHOUT_RULE = {Mechanism.EXTERNAL: ("learning_rate", "rms_t_max")}


def number(value: float | None) -> str:
    """Format with three significant digits, whole numbers with separators of thousands; None as ``-``."""
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{int(value):,}"
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def label(name: str) -> str:
    """Return a quantity's name as people write it; an unknown name (from a newer version) with spaces."""
    quantity = QUANTITIES.get(name)
    return quantity.label if quantity else name.replace("_", " ")


def amount(name: str, value: float | None) -> str:
    """Format a quantity's value with its unit: fractions in percent, displacements in nat."""
    quantity = QUANTITIES.get(name)
    unit = quantity.unit if quantity else ""
    if unit == "fraction" and value is not None and math.isfinite(value):
        return f"{100 * value:.3g}%"
    return f"{number(value)} nat" if unit == "nat" and value is not None else number(value)


def kind_in_words(kind: AlertKind) -> str:
    return {AlertKind.NON_FINITE: "not finite"}.get(kind, str(kind).replace("_", " "))


def headline(alert: Alert) -> str:
    """Return one clause that says what happens, or what has happened if the alert is resolved."""
    over = alert.state is AlertState.RESOLVED
    steps = alert.last_step - alert.first_step
    since = f"steps {alert.first_step:,}–{alert.last_step:,}, {steps:,} {'step' if steps == 1 else 'steps'}"
    if alert.kind is AlertKind.SLINGSHOT:
        if over:
            after = alert.evidence.get("loss_afterwards")
            how = "is back" if after is None else f"stayed at {number(after.value)}, its new level"
            return f"slingshot over, the loss {how} ({since})"
        return "slingshot: the loss has left its floor"
    if alert.kind is AlertKind.NON_FINITE:
        loss_alone = alert.severity is Severity.WARNING
        what = f"NaN or Inf in the loss{'' if loss_alone else ', the gradients or the weights'}"
        return f"finite again ({since})" if over else what
    if alert.kind is AlertKind.IMMINENT:
        if over:
            return f"was imminent ({since})"
        return f"slingshot imminent: {_what(alert)}"
    if over:
        return f"was at risk ({since})"
    return f"at risk: {_what(alert)}"


def _what(alert: Alert) -> str:
    """Return the reason for the alert, in the words of the rule that describes it best."""
    rule = rule_of(alert.mechanism, alert.kind, alert.phase)
    return rule.labels[alert.kind] if rule is not None else WITHOUT_RULE[alert.kind][alert.mechanism]


def mechanism_in_words(alert: Alert) -> str:
    """Return ``numerical feature inflation (confidence 82%)``; no number if the mechanism is unknown."""
    words = MECHANISM_NAMES[alert.mechanism]
    if alert.mechanism is Mechanism.UNKNOWN:
        return words
    return f"{words} (confidence {100 * alert.confidence:.0f}%)"


def mechanism_name(mechanism: Mechanism) -> str:
    """Return the mechanism's name without the confidence."""
    return MECHANISM_NAMES[mechanism]


def one_evidence_in_words(name: str, item: Evidence) -> str:
    """Return ``zero-sum violation 0.134 (threshold 0.1)``."""
    words = f"{label(name)} {amount(name, item.value)}"
    return words if item.threshold is None else f"{words} (threshold {_bare(name, item.threshold)})"


def ordered_evidence(alert: Alert) -> dict[str, Evidence]:
    """Return the alert's evidence, with the items that its kind and mechanism are based on first."""
    first = first_evidence(alert.mechanism, alert.kind) or FIRST_WITHOUT_RULE.get(alert.mechanism, ())
    if alert.kind is AlertKind.SLINGSHOT:
        first = ("loss", "loss_afterwards", "head_loss", *first)
    names = dict.fromkeys([*(name for name in first if name in alert.evidence), *alert.evidence])
    return {name: alert.evidence[name] for name in names}


def evidence_in_words(alert: Alert, limit: int | None = None) -> str:
    """Return the ``limit`` most important items of evidence (None: all), separated by commas."""
    items = list(ordered_evidence(alert).items())[:limit]
    return ", ".join(one_evidence_in_words(name, item) for name, item in items)


def forecast_in_words(alert: Alert) -> str:
    """Return ``≈ 90 steps left (45–180)``; empty if there is no forecast or the alert is resolved."""
    if alert.steps_to_spike is None or alert.state is AlertState.RESOLVED:
        return ""
    low, median, high = alert.steps_to_spike
    return f"≈ {median:,} {'step' if median == 1 else 'steps'} left ({low:,}–{high:,})"


def alert_in_words(alert: Alert, evidence: int | None = None) -> str:
    """Return headline, mechanism, evidence and forecast of an alert on one line, separated by `` · ``."""
    if alert.state is AlertState.RESOLVED:
        return headline(alert)
    parts = [headline(alert)]
    if alert.kind is not AlertKind.NON_FINITE:
        parts.append(mechanism_in_words(alert))
    parts.append(evidence_in_words(alert, evidence))
    parts.append(forecast_in_words(alert))
    return " · ".join(part for part in parts if part)


def replay_in_words(verdict: ReplayVerdict) -> str:
    """Return a replay's mechanism and the reasons for it, separated by semicolons."""
    text = f"{mechanism_name(verdict.mechanism)}: {'; '.join(verdict.reasons)}"
    return text + ("; reproduced to the last bit" if verdict.reproduced else "")


def _bare(name: str, value: float) -> str:
    """Format a threshold without the unit nat, which the value beside it has."""
    return amount(name, value).removesuffix(" nat")
