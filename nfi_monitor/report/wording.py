"""Describe alerts in words, so that the console, TensorBoard and the after-run report say the same.

Pure functions from an alert to a string.  Quantities keep the names of the papers; fractions are written in
percent, displacements in nat.
"""

from __future__ import annotations

import math

from nfi_monitor.detect.rules import LEVELS, first_evidence, of_other_mechanisms, rule_of_alert
from nfi_monitor.quantities import QUANTITIES
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.types import Alert, AlertKind, AlertState, Evidence, Mechanism, Outcome, Severity

MECHANISM_NAMES = {
    Mechanism.NUMERICAL_FEATURE_INFLATION: "numerical feature inflation",
    Mechanism.SECOND_MOMENT: "decayed second moment",
    Mechanism.EDGE_OF_STABILITY: "edge of stability",
    Mechanism.EXTERNAL: "unusual batch or learning rate",
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


PER_STEP = frozenset(level.quantity for level in LEVELS if level.evidence_per_step)
"""Quantities per optimizer step whose levels are given in percent per τ."""


def amount(name: str, value: float | None, tau: float | None = None) -> str:
    """Format a quantity's value with its unit: fractions in percent, displacements in nat.

    With ``tau``, in optimizer steps, quantities in :data:`PER_STEP` are given in percent per τ.
    """
    quantity = QUANTITIES.get(name)
    if name in PER_STEP and tau and value is not None and math.isfinite(value):
        return f"{100 * tau * value:.3g}% per τ"
    unit = quantity.unit if quantity else ""
    if unit == "fraction" and value is not None and math.isfinite(value):
        return f"{100 * value:.3g}%"
    return f"{number(value)} nat" if unit == "nat" and value is not None else number(value)


def kind_in_words(kind: AlertKind) -> str:
    return {AlertKind.NON_FINITE: "not finite"}.get(kind, str(kind).replace("_", " "))


def headline(alert: Alert) -> str:
    """Return one clause that says what happens, or what has happened if the alert has ended."""
    over = alert.state is AlertState.RESOLVED
    if alert.outcome is Outcome.OPEN:
        return _open(alert)
    if alert.outcome is Outcome.SLINGSHOT:
        return f"{HAPPENED}{event_in_words(alert)}"
    if alert.outcome is Outcome.BURST:
        return f"a smaller burst, no slingshot: {event_in_words(alert)}"
    since = _span(alert)
    if alert.kind is AlertKind.SLINGSHOT:
        if over:
            after = alert.evidence.get("loss_afterwards")
            how = "is back" if after is None else f"stayed at {number(after.value)}, its new level"
            return f"slingshot over, the loss {how} ({since})"
        return "slingshot: the loss has risen far above its usual level"
    if alert.kind is AlertKind.NON_FINITE:
        loss_alone = alert.severity is Severity.WARNING
        what = f"NaN or Inf in the loss{'' if loss_alone else ', the gradients or the weights'}"
        return f"finite again ({since})" if over else what
    imminent = alert.kind is AlertKind.IMMINENT
    if over:
        none_came = ", no slingshot came" if alert.outcome is Outcome.PASSED else ""
        return f"was {'imminent' if imminent else 'at risk'}{none_came} ({since})"
    return f"{'slingshot imminent' if imminent else 'at risk'}: {_what(alert)}"


HAPPENED = "it happened: "
"""Begins the headline of a warning that came true."""
STILL_FIRING = "still firing: "
"""Begins the headline of an alert that still fired when the run ended."""
_AS_A_RATIO = 10.0
"""A loss that rises by this factor or more is said to jump by the factor."""


def _span(alert: Alert) -> str:
    steps = alert.last_step - alert.first_step
    return f"steps {alert.first_step:,}–{alert.last_step:,}, {_steps(steps)}"


def _steps(count: int) -> str:
    return f"{count:,} {'step' if count == 1 else 'steps'}"


def _open(alert: Alert) -> str:
    """Return the headline of an alert that still fired when the run ended."""
    what = {
        AlertKind.AT_RISK: "at risk",
        AlertKind.IMMINENT: "slingshot imminent",
        AlertKind.SLINGSHOT: "slingshot",
        AlertKind.NON_FINITE: "NaN or Inf",
    }[alert.kind]
    end = "" if alert.outcome_step is None else f" at step {alert.outcome_step:,}"
    back = "; the loss was still high" if alert.kind is AlertKind.SLINGSHOT else ""
    return f"{STILL_FIRING}{what} since step {alert.first_step:,}{back} when the run ended{end}"


def event_in_words(alert: Alert) -> str:
    """Return what followed a warning: ``the loss jumped ×400,000 at step 905, 277 steps after the warning``.

    A rise by less than a factor of ten is given as ``rose from 2.05 to 3.75``.
    """
    loss, step = alert.evidence.get("spike_loss"), alert.outcome_step
    rose = "the loss rose"
    if loss is not None and loss.baseline is not None:
        low, high = loss.baseline, loss.value
        if low > 0 and high >= _AS_A_RATIO * low:
            ratio = high / low
            rose = f"the loss jumped ×{number(float(f'{ratio:.{1 if ratio >= 100 else 2}g}'))}"
        else:
            rose = f"the loss rose from {number(low)} to {number(high)}"
    if step is None:
        return rose
    after = "the warning" if alert.kind is AlertKind.IMMINENT else "the run was called at risk"
    if step <= alert.first_step:  # the loss was high already when the alert began
        return f"{rose} at step {step:,}, no step after {after}"
    return f"{rose} at step {step:,}, {_steps(step - alert.first_step)} after {after}"


def ending_in_words(alert: Alert) -> str:
    """Return what has become of an alert, for a table: ``no slingshot came``; empty if there is no news."""
    if alert.outcome is Outcome.OPEN:
        end = "" if alert.outcome_step is None else f" at step {alert.outcome_step:,}"
        said = f"still firing when the run ended{end}"
        return f"{said}; {unmoved_in_words(alert)}" if alert.unmoved_since is not None else said
    if alert.outcome in (Outcome.SLINGSHOT, Outcome.BURST):
        what = "it happened" if alert.outcome is Outcome.SLINGSHOT else "a smaller burst"
        return what if alert.outcome_step is None else f"{what} at step {alert.outcome_step:,}"
    if alert.outcome is Outcome.PASSED:
        return "no slingshot came"
    return unmoved_in_words(alert)


def unmoved_in_words(alert: Alert) -> str:
    """Return ``since step 700 nothing moved``; empty if the alert's severity was not lowered."""
    return "" if alert.unmoved_since is None else f"since step {alert.unmoved_since:,} nothing moved"


def lowered_in_words(alert: Alert) -> str:
    """Return ``at risk, but less severe: since step 700 nothing moved``."""
    why = unmoved_in_words(alert) or "nothing moves"
    return f"{kind_in_words(alert.kind)}, but less severe: {why}"


def _what(alert: Alert) -> str:
    """Return the reason for the alert, in the words of the rule that describes it."""
    rule = rule_of_alert(alert)
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


def one_evidence_in_words(name: str, item: Evidence, tau: float | None = None) -> str:
    """Return ``zero-sum violation 0.134 (threshold 0.1)``; add ``not crossed`` where it is not.

    Where low values are the sign, return ``RMS_t 0.208 (below the threshold 0.5)``.  ``tau``: as for
    :func:`amount`.
    """
    words = f"{label(name)} {amount(name, item.value, tau)}"
    if item.threshold is None:
        return words
    limit = amount(name, item.threshold, tau)
    limit = limit.removesuffix(" nat").removesuffix(" per τ")  # the value beside it has the unit
    if item.below and item.crossed is not False:
        return f"{words} (below the threshold {limit})"
    return f"{words} (threshold {limit}{_not_crossed(item)})"


def _not_crossed(item: Evidence) -> str:
    if item.crossed is not False:
        return ""
    return ", not below it" if item.below else ", not crossed"


def value_in_words(name: str, item: Evidence, tau: float | None = None) -> str:
    """Return the value with the most extreme one while the alert fired: ``0.134 (later up to 0.7)``."""
    words = amount(name, item.value, tau)
    if item.extreme is None:
        return words
    return f"{words} (later {'down' if item.below else 'up'} to {amount(name, item.extreme, tau)})"


def evidence_cells(name: str, item: Evidence, tau: float | None = None) -> tuple[str, str, str]:
    """Return value, threshold and baseline for a table, each with its unit."""
    limit = amount(name, item.threshold, tau)
    if item.threshold is not None:
        limit = f"below {limit}" if item.below and item.crossed is not False else limit
        limit += _not_crossed(item)
    return value_in_words(name, item, tau), limit, amount(name, item.baseline, tau)


_EVENT = ("loss", "loss_afterwards", "head_loss")
"""What a slingshot shows first."""
_SPIKE = "spike_loss"
"""What followed a warning. It comes last."""


def ordered_evidence(alert: Alert) -> dict[str, Evidence]:
    """Return the alert's evidence: what crossed its threshold last, first; what did not cross, last.

    Among items of the same step, those that the alert's rule is based on come first.  The loss comes first
    for a slingshot; for a warning it is what followed, and comes last.
    """
    first = first_evidence(alert.mechanism, alert.kind, alert.rule)
    first = first or FIRST_WITHOUT_RULE.get(alert.mechanism, ())
    event = _EVENT if alert.kind is AlertKind.SLINGSHOT else ()
    names = [*event, *first, *alert.evidence]
    place = {name: names.index(name) for name in alert.evidence}

    def order(entry: tuple[str, Evidence]) -> tuple[int, bool, int, int]:
        name, item = entry
        group = -1 if name in event else int(name == _SPIKE)
        return group, item.crossed is False, -(item.step or 0), place[name]

    return dict(sorted(alert.evidence.items(), key=order))


def evidence_in_words(alert: Alert, limit: int | None = None) -> str:
    """Return the ``limit`` most important items of evidence (None: all), separated by commas.

    With a limit, only what has crossed its threshold when the alert began, or last became more severe, and
    nothing that is evidence of other mechanisms only."""
    items = ordered_evidence(alert)
    if limit is not None:
        foreign = of_other_mechanisms(alert.mechanism)
        items = {name: item for name, item in items.items() if name not in foreign} or items
    if limit is not None and any(item.crossed for item in items.values()):
        last = max((item.step or 0 for name, item in items.items() if name != _SPIKE), default=0)
        crossed = {name: item for name, item in items.items() if item.crossed is not False}
        items = {name: item for name, item in crossed.items() if item.step in (None, last)}
    return ", ".join(
        one_evidence_in_words(name, item, alert.tau) for name, item in list(items.items())[:limit]
    )


def forecast_in_words(alert: Alert) -> str:
    """Return ``≈ 90 steps left (45–180)``; empty if there is no forecast or the alert is resolved."""
    over = alert.state is AlertState.RESOLVED or alert.outcome is Outcome.OPEN
    if alert.steps_to_spike is None or over:
        return ""
    low, median, high = alert.steps_to_spike
    return f"≈ {median:,} {'step' if median == 1 else 'steps'} left ({low:,}–{high:,})"


def alert_in_words(alert: Alert, evidence: int | None = None) -> str:
    """Return headline, mechanism, evidence and forecast of an alert on one line, separated by `` · ``."""
    if alert.state is AlertState.RESOLVED or alert.outcome is Outcome.OPEN:
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
