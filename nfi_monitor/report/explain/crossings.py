"""What crossed its threshold before an alert, what did not, and what was not measured.

Each signal is held against the level that the detector holds it against, in the same unit.
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
from nfi_monitor.types import Alert, AlertKind, AlertState, Mechanism

LR_CHANGE = 2.0
"""Factor between two readings of the learning rate that is worth telling: few schedules do it in a step."""


def look_for(alert: Alert, record: SignalHistory, window: tuple[int, int, int]) -> list[Finding]:
    """All findings. ``window``: earliest step a crossing is searched back to, first and last step."""
    _, first, last = window
    own = _supporting(alert)
    findings = [
        _held_against(held, alert, record, window, own=held.level.signal in own)
        for held in _levels(alert, record)
    ]
    findings += [replace(_learning_rate(record, first, last), supports_mechanism="learning_rate" in own)]
    findings += [*_last_update(alert, record, first, last), *_not_finite(alert, record, first)]
    return findings + _loss(alert, record, last)


class _Held(NamedTuple):
    """A rule's level with the numbers it has in this run and this alert."""

    level: Level
    enter: float
    leave: float

    @property
    def sign(self) -> int:
        """−1 where *below* is the sign of trouble, else 1."""
        return -1 if self.level.below else 1

    @property
    def label(self) -> str:
        return self.level.label or wording.label(self.level.quantity)

    def show(self, value: float) -> str:
        return _SHOWN[self.level.show](value)

    def beyond(self, value: float) -> bool:
        return self.sign * value >= self.sign * self.enter

    def stays(self, value: float) -> bool:
        return self.sign * value >= self.sign * self.leave


_SHOWN: dict[str, Callable[[float], str]] = {
    "number": wording.number,
    "nat": lambda value: f"{wording.number(value)} nat",
    "percent of τ": lambda value: f"{100 * value:.3g}% per τ",
    "percent of its maximum": lambda value: _percent(100 * 10**value),
}


def _levels(alert: Alert, record: SignalHistory) -> list[_Held]:
    """What the signals are held against. A rule may ask for less in some states: then the alert's evidence
    has the level that it was raised by.
    """
    held = []
    for level in LEVELS:
        enter = level.enter(record.limits, record.context)
        item = alert.evidence.get(level.quantity)
        if level.lowered and item is not None and item.threshold is not None:
            others = level.others_up_to
            own = others is None or min(enter, item.threshold) > others(record.limits, record.context)
            enter = min(enter, item.threshold) if own else enter
        held.append(_Held(level, enter, level.leave(record.limits, enter)))
    return held


def _supporting(alert: Alert) -> set[str]:
    """Names of the signals that the alert's mechanism is known by."""
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
        found.add("feature_displacement")  # behind a LayerNorm it is this by which the alert was raised
    return found


def _held_against(
    held: _Held, alert: Alert, record: SignalHistory, window: tuple[int, int, int], *, own: bool
) -> Finding:
    earliest, first, last = window
    series = record.series.get(held.level.signal, Series([], []))
    inside = [index for index, step in enumerate(series.steps) if first <= step <= last]
    if not inside:
        return _from_evidence(held, alert, record, own=own)
    beyond = [held.beyond(x) for x in series.values]
    value, limit = held.show(held.enter), held.enter
    side, other = ("above", "below") if held.sign > 0 else ("below", "above")
    which = "largest" if held.sign > 0 else "smallest"
    end = inside[-1]
    among = [series.values[index] for index in inside]
    extreme = max(among) if held.sign > 0 else min(among)
    if not any(beyond[index] for index in inside):
        text = f"{held.label} stayed {other} {value} ({which} {held.show(extreme)})"
        return Finding(
            held.level.quantity, Seen.NOT_CROSSED, text, limit, extreme=extreme, supports_mechanism=own
        )
    # The last time it was beyond, back to when it first was since it had last been properly back.
    latest = max(index for index in inside if beyond[index])
    start = index = latest
    while index >= 0 and series.steps[index] >= earliest and held.stays(series.values[index]):
        start = index if beyond[index] else start
        index -= 1
    back = next((i for i in range(latest + 1, end + 1) if not held.stays(series.values[i])), None)
    after = series.steps[start - 1] if start > 0 else None
    at, then, now = series.steps[start], series.values[start], series.values[end]
    verb = "rose" if held.sign > 0 else "fell"
    if after is None or at <= earliest:
        since = "the readings began" if after is None else "the last slingshot"
        text = f"{held.label} was {side} {value} ever since {since} (step {at:,}; "
    elif at - after > 1:
        text = f"{held.label} {verb} {side} {value} between steps {after:,} and {at:,} ("
    else:
        text = f"{held.label} {verb} {side} {value} at step {at:,} ("
    if back is not None:
        text += f"{which} {held.show(extreme)}, back at step {series.steps[back]:,})"
    elif at == series.steps[end]:
        text += f"{held.show(then)})"
    else:
        text += f"{held.show(then)} then, {held.show(now)} {_at_end(alert)})"
    if held.level.signal == "decay" and not own and not record.context.decoupled_decay:
        text += ", which by itself gives no kick: no decoupled weight decay moves the weights"
    back_at = None if back is None else series.steps[back]
    return Finding(
        held.level.quantity, Seen.CROSSED, text, limit, after, at, back_at, then, now, extreme, own
    )


def _at_end(alert: Alert) -> str:
    if alert.kind is AlertKind.SLINGSHOT or alert.kind is AlertKind.NON_FINITE:
        return "just before"
    return "now" if alert.state is AlertState.FIRING else "at the end"


def _from_evidence(held: _Held, alert: Alert, record: SignalHistory, *, own: bool) -> Finding:
    """No reading of it in these steps: the alert's own evidence, if it holds the same level."""
    item = alert.evidence.get(held.level.quantity)
    value = item.value if item is not None else math.nan
    if held.level.signal == "growth":
        value *= record.context.tau  # an alert gives it per step
    # RMS_t is held against two levels; the threshold beside the evidence says which one it means.
    other = held.level.quantity == "rms_t_max" and (item is None or item.threshold != held.enter)
    if other or not math.isfinite(value):
        return Finding(
            held.level.quantity, Seen.NOT_MEASURED, held.label.rstrip(","), held.enter, supports_mechanism=own
        )
    crossed = held.beyond(value)
    text = (
        f"{held.label} {held.show(value)} in the alert's own evidence (threshold "
        f"{held.show(held.enter)}), its readings are not on record"
    )
    seen = Seen.CROSSED if crossed else Seen.NOT_CROSSED
    return Finding(
        held.level.quantity, seen, text, held.enter, now=value, extreme=value, supports_mechanism=own
    )


def _learning_rate(record: SignalHistory, first: int, last: int) -> Finding:
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
        text = f"the learning rate never changed by {LR_CHANGE:g} times between two readings"
        return Finding(name, Seen.NOT_CROSSED, text, LR_CHANGE, extreme=factor)
    text = f"the learning rate went from {wording.number(x)} to {wording.number(y)} {_between(after, at)}"
    return Finding(name, Seen.CROSSED, text, LR_CHANGE, after, at, None, y, values[-1], factor)


def _last_update(alert: Alert, record: SignalHistory, first: int, last: int) -> list[Finding]:
    """A kick from outside is known by what did *not* precede it: the weights had moved as they always do."""
    steps, values = record.series.get("update_jump", Series([], []))
    inside = [x for step, x in zip(steps, values, strict=True) if first <= step <= last]
    if alert.mechanism is not Mechanism.EXTERNAL or not inside:
        return []
    text = f"the last update before it was {wording.number(inside[-1])} times the average one"
    seen = Seen.NOT_CROSSED if inside[-1] <= UNMOVED else Seen.CROSSED
    return [Finding("update_rms", seen, text, UNMOVED, then=inside[-1], now=inside[-1], extreme=max(inside))]


def _not_finite(alert: Alert, record: SignalHistory, first: int) -> list[Finding]:
    found, looked = [], False
    for name, what in FINITE.items():
        steps, values = record.series.get(name, Series([], []))
        inside = [i for i, step in enumerate(steps) if first <= step <= alert.last_step]
        looked = looked or bool(inside)
        counted = name == "non_finite_rows"
        bad = [i for i in inside if (values[i] > 0 if counted else not math.isfinite(values[i]))]
        if bad:
            at, after = steps[bad[0]], steps[bad[0] - 1] if bad[0] else None
            text = f"{what} {'were' if counted else 'was'} NaN or Inf {_between(after, at, 'first ')}"
            text += f", at {len(bad):,} readings" if len(bad) > 1 else ""
            own = alert.kind is AlertKind.NON_FINITE
            then = values[bad[0]]
            finding = Finding(name, Seen.CROSSED, text, after=after, at=at, then=then, supports_mechanism=own)
            found.append(finding)
    if found or not looked:
        return found
    text = "neither the loss nor a gradient nor a weight was NaN or Inf"
    return [Finding("non_finite_gradients", Seen.NOT_CROSSED, text, 0.0)]


def _loss(alert: Alert, record: SignalHistory, last: int) -> list[Finding]:
    if alert.kind is AlertKind.SLINGSHOT:
        item = alert.evidence.get("loss")
        if item is None:
            return []
        floor = "" if item.baseline is None else f", from {wording.number(item.baseline)} before"
        above = "its level" if item.threshold is None else wording.number(item.threshold)
        at, peak = alert.first_step, wording.number(item.value)
        text = f"the loss rose above {above} at step {at:,} (largest {peak}{floor})"
        crossed = Finding("loss", Seen.CROSSED, text, item.threshold, at=at, extreme=item.value)
        return [replace(crossed, supports_mechanism=True)]
    if alert.kind is AlertKind.NON_FINITE:
        return []
    name = "loss" if "loss" in record.series else "head_loss"
    steps, values = record.series.get(name, Series([], []))
    # Only while the alert fired: the steps before it may hold the run's beginning, whose loss is high.
    begin = min(alert.first_step, last)
    inside = [x for step, x in zip(steps, values, strict=True) if begin <= step <= last and math.isfinite(x)]
    if not inside:
        return [Finding("loss", Seen.NOT_MEASURED, wording.label("loss"))]
    text = f"the loss did not leave its floor meanwhile (largest {wording.number(max(inside))})"
    return [Finding("loss", Seen.NOT_CROSSED, text, extreme=max(inside))]


def _percent(value: float) -> str:
    return f"{value:.0f}%" if value >= 10 else f"{value:.2g}%"


def _between(after: int | None, at: int, first: str = "") -> str:
    if after is None or at - after <= 1:
        return f"{first}at step {at:,}"
    return f"{first}between steps {after:,} and {at:,}"
