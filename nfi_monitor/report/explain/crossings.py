"""Find the signals that crossed their thresholds before an alert, and those that did not or are unknown.

Each signal is compared with the detector's own level, in the same unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from nfi_monitor.detect.causes import UNMOVED
from nfi_monitor.detect.rules import LEVELS, Level
from nfi_monitor.report import wording
from nfi_monitor.report.explain.explanation import Finding, Seen
from nfi_monitor.report.explain.signal_history import FINITE, Series, SignalHistory
from nfi_monitor.types import Alert, AlertKind, AlertState, Mechanism, Outcome

LR_CHANGE = 2.0
"""Ratio of two successive learning rates that counts as a change: few schedules reach it in one step."""


def look_for(alert: Alert, record: SignalHistory, window: tuple[int, int, int]) -> list[Finding]:
    """Return all findings in the steps of ``window``.

    ``window``: the earliest step to which a crossing is traced back, the first step, the last step.
    """
    _, first, last = window
    own = _supporting(alert)
    findings = [
        _compare(applied, alert, record, window, own=applied.level.signal in own)
        for applied in _applied_levels(alert, record)
    ]
    findings += [replace(_learning_rate(record, first, last), supports_mechanism="learning_rate" in own)]
    findings += [*_last_update(alert, record, first, last), *_not_finite(alert, record, first)]
    return findings + _loss(alert, record, last)


class _AppliedLevel(NamedTuple):
    """A rule's level, with its numbers in this run and this alert."""

    level: Level
    enter: float
    leave: float

    @property
    def sign(self) -> int:
        """−1 where low values are the sign of trouble, else 1."""
        return -1 if self.level.below else 1

    @property
    def label(self) -> str:
        """Name of the signal in a text."""
        return self.level.label or wording.label(self.level.quantity)

    def show(self, value: float) -> str:
        """Format a value of the signal, with its unit."""
        return _SHOWN[self.level.show](value)

    def beyond(self, value: float) -> bool:
        """Return whether a value has crossed the level."""
        return self.sign * value >= self.sign * self.enter

    def stays(self, value: float) -> bool:
        """Return whether a value that crossed the level before still counts as beyond it (hysteresis)."""
        return self.sign * value >= self.sign * self.leave


_SHOWN: dict[str, Callable[[float], str]] = {
    "number": wording.number,
    "nat": lambda value: f"{wording.number(value)} nat",
    "percent of τ": lambda value: f"{100 * value:.3g}% per τ",
    "percent of its maximum": lambda value: _percent(100 * 10**value),
}


def _applied_levels(alert: Alert, record: SignalHistory) -> list[_AppliedLevel]:
    """Return all rules' levels, with the numbers that the detector applied.

    A rule may apply a lower level in some states.  Then the alert's evidence has the level that was applied.
    """
    found = []
    for level in LEVELS:
        enter = level.enter(record.limits, record.context)
        item = alert.evidence.get(level.quantity)
        if level.may_be_lower and item is not None and item.threshold is not None:
            others = level.others_up_to
            own = others is None or min(enter, item.threshold) > others(record.limits, record.context)
            enter = min(enter, item.threshold) if own else enter
        found.append(_AppliedLevel(level, enter, level.leave(record.limits, enter)))
    return found


def _supporting(alert: Alert) -> set[str]:
    """Return the names of the signals that support the alert's mechanism."""
    found = {level.signal for level in LEVELS if alert.mechanism in level.supports}
    if alert.mechanism is Mechanism.EXTERNAL:
        found.add("learning_rate")
    swung = alert.evidence.get("feature_displacement")
    if (
        alert.mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION
        and alert.kind is AlertKind.IMMINENT
        and swung is not None
        and swung.threshold is not None
        and swung.value >= swung.threshold
    ):
        found.add("feature_displacement")  # behind a LayerNorm this displacement raises the alert
    return found


def _compare(
    applied: _AppliedLevel, alert: Alert, record: SignalHistory, window: tuple[int, int, int], *, own: bool
) -> Finding:
    """Compare one signal with its level in the steps of ``window``."""
    earliest, first, last = window
    quantity, show = applied.level.quantity, applied.show
    series = record.series.get(applied.level.signal, Series([], []))
    inside = [index for index, step in enumerate(series.steps) if first <= step <= last]
    if not inside:
        return _from_evidence(applied, alert, record, own=own)
    beyond = [applied.beyond(x) for x in series.values]
    value, limit = show(applied.enter), applied.enter
    side, other = ("above", "below") if applied.sign > 0 else ("below", "above")
    which = "largest" if applied.sign > 0 else "smallest"
    end = inside[-1]
    among = [series.values[index] for index in inside]
    extreme = max(among) if applied.sign > 0 else min(among)
    if not any(beyond[index] for index in inside):
        text = f"{applied.label} stayed {other} {value} ({which} {show(extreme)})"
        return Finding(quantity, Seen.NOT_CROSSED, text, limit, extreme=extreme, supports_mechanism=own)
    # Go back from the last reading beyond the level, as long as ``stays`` holds. The crossing is the earliest
    # of these readings that is beyond the level.
    latest = max(index for index in inside if beyond[index])
    start = index = latest
    while index >= 0 and series.steps[index] >= earliest and applied.stays(series.values[index]):
        start = index if beyond[index] else start
        index -= 1
    back = next((i for i in range(latest + 1, end + 1) if not applied.stays(series.values[i])), None)
    after = series.steps[start - 1] if start > 0 else None
    at, then, now = series.steps[start], series.values[start], series.values[end]
    began = _when_it_began(alert, series)
    verb = "rose" if applied.sign > 0 else "fell"
    if after is None or at <= earliest:
        when = "the readings began" if after is None else "the last slingshot ended"
        text = f"{applied.label} was already {side} {value} when {when} (step {at:,}; "
    elif at - after > 1:
        text = f"{applied.label} {verb} {side} {value} between steps {after:,} and {at:,} ("
    else:
        text = f"{applied.label} {verb} {side} {value} at step {at:,} ("
    if back is not None:
        text += f"{which} {show(extreme)}, back {other} at step {series.steps[back]:,})"
    elif at == series.steps[end]:
        text += f"{show(then)})"
    else:
        middle = ""
        if began is not None and at < alert.first_step:
            middle = f", {show(began)} when the alert began"
        text += f"{show(then)} then{middle}, {show(now)} {_at_end(alert)})"
    if applied.level.signal == "decay" and not own and not record.context.decoupled_decay:
        text += ", which alone causes no slingshot: the run has no decoupled weight decay"
    back_at = None if back is None else series.steps[back]
    return Finding(quantity, Seen.CROSSED, text, limit, after, at, back_at, then, now, extreme, own, began)


def _when_it_began(alert: Alert, series: Series) -> float | None:
    """Return the signal when the alert began, which is the value in its evidence; None for a spike or a NaN.

    Readings of those events themselves show their effects."""
    if alert.kind in (AlertKind.SLINGSHOT, AlertKind.NON_FINITE):
        return None
    before = [value for step, value in zip(*series, strict=True) if step <= alert.first_step]
    return before[-1] if before else None


def _at_end(alert: Alert) -> str:
    """Return the words for the time of the last reading in the window."""
    if alert.kind is AlertKind.SLINGSHOT or alert.kind is AlertKind.NON_FINITE:
        return "just before"
    firing = alert.state is AlertState.FIRING and alert.outcome is not Outcome.OPEN
    return "now" if firing else "at the end"


def _from_evidence(applied: _AppliedLevel, alert: Alert, record: SignalHistory, *, own: bool) -> Finding:
    """Compare the alert's own evidence with the level, where no reading has the signal."""
    quantity, enter = applied.level.quantity, applied.enter
    item = alert.evidence.get(quantity)
    value = item.value if item is not None else math.nan
    if applied.level.evidence_per_step:
        value *= record.context.tau
    # Some quantities have two levels (RMS_t). The threshold of the evidence shows to which one it belongs.
    shared = sum(level.quantity == quantity for level in LEVELS) > 1
    other = shared and (item is None or item.threshold != enter)
    if other or not math.isfinite(value):
        label = applied.label.rstrip(",")
        return Finding(quantity, Seen.NOT_MEASURED, label, enter, supports_mechanism=own)
    crossed = applied.beyond(value)
    text = (
        f"{applied.label} {applied.show(value)} in the alert's own evidence (threshold "
        f"{applied.show(enter)}), no reading in these steps"
    )
    seen = Seen.CROSSED if crossed else Seen.NOT_CROSSED
    return Finding(quantity, seen, text, enter, now=value, extreme=value, supports_mechanism=own)


def _learning_rate(record: SignalHistory, first: int, last: int) -> Finding:
    """Return the largest change of the learning rate between two readings."""
    name = "learning_rate"
    steps, values = record.series.get(name, Series([], []))
    pairs = [
        (max(x, y) / min(x, y) if min(x, y) > 0 else math.inf, after, at, x, y)
        for after, at, x, y in zip(steps, steps[1:], values, values[1:], strict=False)
        if first <= at <= last and x != y
    ]
    if not any(first <= step <= last for step in steps):
        return Finding(name, Seen.NOT_MEASURED, wording.label(name), LR_CHANGE)
    if not pairs:
        return Finding(name, Seen.NOT_CROSSED, "the learning rate did not change", LR_CHANGE, extreme=1.0)
    factor, after, at, x, y = max(pairs)
    if factor < LR_CHANGE:
        most = wording.number(factor)
        text = f"the learning rate never changed by a factor of {LR_CHANGE:g} or more (largest: {most})"
        return Finding(name, Seen.NOT_CROSSED, text, LR_CHANGE, extreme=factor)
    text = f"the learning rate went from {wording.number(x)} to {wording.number(y)} {_between(after, at)}"
    return Finding(name, Seen.CROSSED, text, LR_CHANGE, after, at, None, y, values[-1], factor)


def _last_update(alert: Alert, record: SignalHistory, first: int, last: int) -> list[Finding]:
    """Return the size of the last update before an event from outside; nothing for other mechanisms.

    An ordinary update before the event supports the mechanism: the weights did not cause the event.
    """
    steps, values = record.series.get("update_jump", Series([], []))
    inside = [x for step, x in zip(steps, values, strict=True) if first <= step <= last]
    if alert.mechanism is not Mechanism.EXTERNAL or not inside:
        return []
    text = f"the last update in these steps was {wording.number(inside[-1])} times as large as the average"
    seen = Seen.NOT_CROSSED if inside[-1] <= UNMOVED else Seen.CROSSED
    return [Finding("update_rms", seen, text, UNMOVED, then=inside[-1], now=inside[-1], extreme=max(inside))]


def _not_finite(alert: Alert, record: SignalHistory, first: int) -> list[Finding]:
    """Return where NaN or Inf was first read, or that there was none; nothing if nothing was read."""
    found, any_reading = [], False
    for name, what in FINITE.items():
        steps, values = record.series.get(name, Series([], []))
        inside = [i for i, step in enumerate(steps) if first <= step <= alert.last_step]
        any_reading = any_reading or bool(inside)
        counted = name == "non_finite_rows"
        bad = [i for i in inside if (values[i] > 0 if counted else not math.isfinite(values[i]))]
        if bad:
            at, after = steps[bad[0]], steps[bad[0] - 1] if bad[0] else None
            text = f"{what} {'were' if counted else 'was'} NaN or Inf {_between(after, at, 'first ')}"
            text += f", in {len(bad):,} readings" if len(bad) > 1 else ""
            own = alert.kind is AlertKind.NON_FINITE
            then = values[bad[0]]
            finding = Finding(name, Seen.CROSSED, text, after=after, at=at, then=then, supports_mechanism=own)
            found.append(finding)
    if found or not any_reading:
        return found
    text = "neither the loss nor a gradient nor a weight was NaN or Inf"
    return [Finding("non_finite_gradients", Seen.NOT_CROSSED, text, 0.0)]


def _loss(alert: Alert, record: SignalHistory, last: int) -> list[Finding]:
    """Return when the loss rose (a slingshot), or that it did not rise (*at risk*, *imminent*)."""
    if alert.kind is AlertKind.SLINGSHOT:
        item = alert.evidence.get("loss")
        if item is None:
            return []
        floor = "" if item.baseline is None else f", from {wording.number(item.baseline)} before"
        above = "its level" if item.threshold is None else wording.number(item.threshold)
        at, highest = alert.first_step, item.value if item.extreme is None else item.extreme
        text = f"the loss rose above {above} at step {at:,} (largest {wording.number(highest)}{floor})"
        crossed = Finding("loss", Seen.CROSSED, text, item.threshold, at=at, extreme=highest)
        return [replace(crossed, supports_mechanism=True)]
    came_true = alert.outcome in (Outcome.SLINGSHOT, Outcome.BURST)  # what follows says so
    if alert.kind is AlertKind.NON_FINITE or came_true:
        return []
    name = "loss" if "loss" in record.series else "head_loss"
    steps, values = record.series.get(name, Series([], []))
    # Only the steps while the alert fired: earlier steps may include the run's first, whose loss is high.
    begin = min(alert.first_step, last)
    inside = [x for step, x in zip(steps, values, strict=True) if begin <= step <= last and math.isfinite(x)]
    if not inside:
        return [Finding("loss", Seen.NOT_MEASURED, wording.label("loss"))]
    largest = wording.number(max(inside))
    text = f"the loss did not rise far above its usual level while the alert fired (largest {largest})"
    return [Finding("loss", Seen.NOT_CROSSED, text, extreme=max(inside))]


def _percent(value: float) -> str:
    return f"{value:.0f}%" if value >= 10 else f"{value:.2g}%"


def _between(after: int | None, at: int, first: str = "") -> str:
    if after is None or at - after <= 1:
        return f"{first}at step {at:,}"
    return f"{first}between steps {after:,} and {at:,}"
