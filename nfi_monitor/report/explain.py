"""An alert in plain words: which quantities crossed what, when, and what was *not* seen.

An alert names a mechanism; whoever has to act on it wants the reasons, and what speaks against the other
mechanisms.  The detector judges averages, not single readings, so the readings on record are averaged here by
the detector's own code (:class:`~nfi_monitor.detect.signals.Signals`) and held against the same thresholds.
(Raw readings lost: they cross a threshold many times where the average crosses it once, and the steps they
give are not those at which the alert began.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from itertools import pairwise
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.text import Text

from nfi_monitor.detect.detector import Context
from nfi_monitor.detect.mechanism import FORGOTTEN, UNMOVED
from nfi_monitor.detect.signals import Signals
from nfi_monitor.history import History
from nfi_monitor.report import words
from nfi_monitor.report.plain import plain
from nfi_monitor.types import (
    Alert,
    AlertKind,
    AlertState,
    Mechanism,
    Note,
    Phase,
    Reading,
    Thresholds,
)  # fmt: skip

LR_CHANGE = 2.0
"""Factor between two readings of the learning rate that is worth telling: few schedules do it in a step."""
LEAD_UP = 3.0
"""Steps, in τ, that are looked at at least: what comes out of a healthy phase has its lead-up in it."""

_EVENT = (Phase.SLINGSHOT, Phase.RECOVERING)


class Seen(str, Enum):
    CROSSED = "crossed"
    NOT_CROSSED = "not_crossed"
    NOT_MEASURED = "not_measured"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Finding:
    """One quantity, held against one threshold over the steps that were looked at.

    ``after`` and ``at`` are the readings between which it crossed (``after`` None: there is none before
    ``at``; both None: not on record), ``then`` and ``now`` its value at ``at`` and at the end, ``extreme``
    the value nearest to the threshold, or farthest beyond it.  Values in the unit of ``threshold``.
    """

    quantity: str  # a name of nfi_monitor.quantities.QUANTITIES
    seen: Seen
    text: str  # the same in plain words
    threshold: float | None = None
    after: int | None = None
    at: int | None = None
    back_at: int | None = None
    then: float | None = None
    now: float | None = None
    extreme: float | None = None
    own: bool = False  # one of those that the alert's mechanism is known by

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = plain({**asdict(self), "seen": str(self.seen)})
        return record


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. ``print`` and ``rich.print`` show it, :meth:`to_json` gives plain types."""

    alert: Alert
    window: tuple[int, int]
    """First and last optimizer step that were looked at for causes."""
    why_window: str
    findings: tuple[Finding, ...]
    not_visible: tuple[str, ...]
    follows: str
    advice: str | None

    def of(self, seen: Seen) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.seen is seen)

    def title(self) -> str:
        alert = self.alert
        if alert.state is AlertState.FIRING:
            steps = f"since step {alert.first_step:,}"
        elif alert.first_step == alert.last_step:
            steps = f"step {alert.first_step:,}"
        else:
            steps = f"steps {alert.first_step:,}–{alert.last_step:,}"
        if alert.mechanism is Mechanism.UNKNOWN:
            return f"{alert.id}, {steps}"
        name = words.mechanism_name(alert.mechanism)
        return f"{alert.id}, {steps} ({name}, confidence {100 * alert.confidence:.0f}%)"

    def lines(self) -> list[tuple[str, str]]:
        """(what, text), in the order they are read."""
        first, last = self.window
        crossed = self.of(Seen.CROSSED)
        unknown = self.alert.mechanism is Mechanism.UNKNOWN
        own = [finding.text for finding in crossed if finding.own or unknown]
        other = [finding.text for finding in crossed if not (finding.own or unknown)]
        missing = [finding.text for finding in self.of(Seen.NOT_CROSSED)]
        lines = [("Looked at", f"steps {first:,}–{last:,}, {self.why_window}.")]
        if unknown and self.alert.kind is not AlertKind.NON_FINITE:
            lines.append(("Cause", "No mechanism known to the monitor preceded it."))
        lines.append(("What crossed", _sentence(own) if own else "nothing that is on record."))
        if other:
            lines.append(("Also crossed", _sentence(other)))
        if missing:
            lines.append(("What was not seen", _sentence(missing)))
        if self.not_visible:
            lines.append(("Not visible", _sentence(self.not_visible)))
        lines.append(("What follows", self.follows))
        if self.advice:
            lines.append(("What to do", self.advice))
        return lines

    def to_json(self) -> dict[str, Any]:
        """A dict of plain types, no NaN."""
        alert = self.alert.to_json()
        keys = ("id", "kind", "severity", "state", "first_step", "last_step", "mechanism", "confidence")
        record: dict[str, Any] = plain(
            {
                **{key: alert[key] for key in keys},
                "window": list(self.window),
                **{str(seen): [finding.to_json() for finding in self.of(seen)] for seen in Seen},
                "not_visible": list(self.not_visible),
                "follows": self.follows,
                "advice": self.advice,
                "text": str(self),
            }
        )
        return record

    def __str__(self) -> str:
        return "\n".join([self.title() + ".", *(f"{what}: {text}" for what, text in self.lines())])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        say = words.shown(options.ascii_only)
        yield Text(say(self.title()), style="bold")
        for what, text in self.lines():
            yield Padding(Text.assemble((f"{what}: ", "dim"), say(text)), (0, 0, 0, 2))


def explain(
    alert: Alert,
    history: History,
    phases: Sequence[tuple[int, Phase]],
    thresholds: Thresholds | None = None,
    context: Context | None = None,
    notes: Sequence[Note] = (),
) -> Explanation:
    """Explain one alert from what is on record.

    ``phases`` are (optimizer step, phase) changes; ``notes`` say what could not be seen. Where the record
    begins after the alert did (a resumed run), the alert's own evidence is all there is, and said to be.
    """
    record = _Record(history, phases, thresholds or Thresholds(), context or Context(), notes)
    return _explain(alert, record)


def explain_run(
    info: Mapping[str, Any],
    history: History,
    phases: Sequence[tuple[int, Phase]],
    alerts: Sequence[Alert],
    notes: Sequence[Note],
    wanted: str | None = None,
) -> list[Explanation]:
    """Explain a run that is read back: every slingshot and the last alert that still fires, or one by its id.

    ``info`` is the content of ``run.json``. Raises ValueError, naming the known ids, for an unknown one.
    """
    if wanted is None:
        firing = [a for a in alerts if a.state is AlertState.FIRING and a.kind is not AlertKind.SLINGSHOT]
        chosen = [alert for alert in alerts if alert.kind is AlertKind.SLINGSHOT] + firing[-1:]
    else:
        # A run resumed without the monitor's state counts its alerts anew: the last of that id is meant.
        chosen = [find_alert(alerts, wanted)]
    if not chosen:
        return []
    record = _Record(history, phases, _thresholds_of(info), _context_of(info), notes)
    return [_explain(alert, record) for alert in chosen]


def find_alert(alerts: Iterable[Alert], wanted: Alert | str) -> Alert:
    """The newest state of an alert. Raises ValueError, naming the known ids, where there is none."""
    known = {alert.id: alert for alert in alerts}
    name = wanted.id if isinstance(wanted, Alert) else wanted
    if name not in known:
        raise ValueError(f"No alert {name!r}. Known: {', '.join(known) or 'none, nothing has been alerted'}.")
    return known[name]


# --- what is looked at ----------------------------------------------------------------------------


_VIOLATIONS = ("zero_sum_violation", "zero_sum_violation_weight", "zero_sum_violation_batch")


class _Series(NamedTuple):
    steps: list[int]
    values: list[float]


class _Level(NamedTuple):
    """A signal and the levels it is held against; ``sign`` −1 where *below* is the sign of trouble."""

    key: str  # of the series
    quantity: str
    label: str
    enter: float
    leave: float
    sign: int = 1
    show: Callable[[float], str] = words.number


class _Record:
    """The readings of a run as the detector's signals, computed once for any number of alerts."""

    def __init__(
        self,
        history: History,
        phases: Sequence[tuple[int, Phase]],
        limits: Thresholds,
        context: Context,
        notes: Sequence[Note],
    ) -> None:
        self.history, self.phases, self.notes = history, phases, notes
        self.limits, self.context = limits, context
        edges = list(pairwise(phases))
        self.ends = [step for (_, was), (step, phase) in edges if was in _EVENT and phase not in _EVENT]
        self.starts = [step for (_, was), (step, phase) in edges if was not in _EVENT and phase in _EVENT]
        self.series: dict[str, _Series] = {}
        self.first_step: int | None = None
        self.last_step = 0
        self._replay()

    def _replay(self) -> None:
        """Feed the readings to the detector's own averages; a slingshot's end resets its maxima, as there."""
        readings: dict[int, dict[str, float]] = {}
        for name in self.history.names():
            steps, column = self.history[name]
            for step, value in zip(steps.tolist(), column.tolist(), strict=True):
                readings.setdefault(step, {})[name] = value
        signals, ends = Signals(), set(self.ends)
        self.first_step, self.last_step = min(readings, default=None), max(readings, default=0)
        for step in sorted(readings):
            values = readings[step]
            if values.keys() <= {"loss"}:
                self._keep("loss", step, values.get("loss", math.nan), finite=False)
                continue  # between readings the loss comes alone; the detector's averages stand still
            signals.update(Reading(step, values), self.context.tau, self.limits)
            judged = {
                "violation": (_VIOLATIONS, signals.violation),
                "growth": (("feature_mean_norm",), signals.growth * self.context.tau),
                "displacement": (("margin_displacement", "logit_displacement"), signals.displacement),
                "decay": (("head_sqrt_exp_avg_sq_mean", "sqrt_exp_avg_sq_mean"), signals.decay_lowest),
                "rms_t_mean": (("rms_t_max",), signals.rms_t_mean),
                "rms_t": (("rms_t_max",), signals.rms_t),
                "alignment": (("gradient_alignment",), signals.alignment),
                "update_jump": (("update_rms",), signals.update_jump),
            }
            for key, (made_of, value) in judged.items():
                if any(name in values for name in made_of):
                    self._keep(key, step, value)
            for name in ("secant_curvature", "feature_displacement", "learning_rate"):
                self._keep(name, step, values.get(name, math.nan))
            for name in _FINITE:
                if name in values:
                    self._keep(name, step, values[name], finite=False)
            if step in ends:
                signals.restart()

    def _keep(self, key: str, step: int, value: float, *, finite: bool = True) -> None:
        if math.isfinite(value) or not finite:
            series = self.series.setdefault(key, _Series([], []))
            series.steps.append(step)
            series.values.append(value)

    def window(self, alert: Alert) -> tuple[int, int, int, str]:
        """(earliest step a crossing is searched back to, first, last, why from there)."""
        floor = max((step for step in self.ends if step <= alert.first_step), default=None)
        begin = self.first_step if self.first_step is not None else alert.first_step
        earliest = begin if floor is None else max(floor, begin)
        healthy = None
        for (step, phase), following in zip(self.phases, [*self.phases[1:], None], strict=True):
            if phase is Phase.HEALTHY and step < alert.first_step:
                until = alert.first_step if following is None else min(following[0], alert.first_step)
                healthy = max(until - 1, 1)
        lead_up = alert.first_step - math.ceil(LEAD_UP * self.context.tau)
        first, why = lead_up, f"from {LEAD_UP:g} τ before it began"
        if healthy is None or healthy < lead_up:
            first, why = healthy or earliest, "since the run was last healthy"
        if first <= earliest:
            ended = floor is not None and floor >= begin
            first, why = earliest, "since the last slingshot ended" if ended else "all there is on record"
        last = alert.last_step
        if alert.kind in (AlertKind.SLINGSHOT, AlertKind.NON_FINITE):
            last = alert.first_step - 1  # what is read in the event itself is its effect, not its cause
        else:
            if alert.state is AlertState.FIRING:
                last = max(last, self.last_step)  # of a run that was killed, files hold only what was told
            last = min([last, *(step - 1 for step in self.starts if step > alert.first_step)])
        last = max(last, min(first, alert.first_step))
        return earliest, min(first, last), last, why


def _levels(record: _Record) -> list[_Level]:
    limits, limit = record.limits, record.context.stability_limit
    grown = 0.5 * limits.inflating_growth  # where the detector lets *inflating* end
    return [
        _Level("violation", "zero_sum_violation", words.label("zero_sum_violation"),
               limits.absorbing_enter, limits.absorbing_exit),
        _Level("growth", "feature_mean_growth", words.label("feature_mean_growth"),
               limits.inflating_growth, grown, show=lambda x: f"{100 * x:.3g}% per τ"),
        _Level("displacement", "logit_displacement", words.label("logit_displacement"),
               limits.imminent_displacement, limits.imminent_exit, show=lambda x: f"{words.number(x)} nat"),
        _Level("decay", "second_moment_decay", "sqrt(v) against its maximum", FORGOTTEN, FORGOTTEN, -1,
               show=lambda x: _percent(100 * 10**x)),
        _Level("rms_t_mean", "rms_t_max", "RMS_t, averaged,",
               limits.coasting_enter, limits.coasting_exit, -1),
        _Level("rms_t", "rms_t_max", words.label("rms_t_max"), limits.rms_t_imminent, limits.rms_t_exit),
        _Level("secant_curvature", "secant_curvature", words.label("secant_curvature"), limit, limit),
        _Level("alignment", "gradient_alignment", words.label("gradient_alignment"),
               -limits.swing_alignment, -limits.swing_alignment, -1),
        _Level("feature_displacement", "feature_displacement", words.label("feature_displacement"),
               limits.swing_displacement, limits.swing_exit, show=lambda x: f"{words.number(x)} nat"),
    ]  # fmt: skip


_OWN: dict[Mechanism, tuple[str, ...]] = {
    Mechanism.NUMERICAL_FEATURE_INFLATION: ("violation", "growth", "displacement"),
    Mechanism.SECOND_MOMENT: ("decay", "rms_t_mean", "rms_t"),
    Mechanism.EDGE_OF_STABILITY: ("secant_curvature", "alignment", "feature_displacement", "rms_t"),
    Mechanism.EXTERNAL: ("learning_rate",),
}

# What can be NaN or Inf, as it is called; rows are a count of such rows.
_FINITE = {
    "loss": "the loss",
    "head_loss": "the loss at the head",
    "gradient_norm": "the gradient norm",
    "weight_norm": "the weight norm",
    "non_finite_rows": "rows",
}


# --- findings -------------------------------------------------------------------------------------


def _explain(alert: Alert, record: _Record) -> Explanation:
    earliest, first, last, why = record.window(alert)
    own = _OWN.get(alert.mechanism, ())
    findings = [
        _held_against(level, alert, record, (earliest, first, last), own=level.key in own)
        for level in _levels(record)
    ]
    findings += [replace(_learning_rate(record, first, last), own="learning_rate" in own)]
    findings += [*_last_update(alert, record, first, last), *_not_finite(alert, record, first)]
    findings += _loss(alert, record, last)
    return Explanation(
        alert=alert,
        window=(first, last),
        why_window=why,
        findings=tuple(findings),
        not_visible=_not_visible(alert, record, findings, first),
        follows=_follows(alert, record),
        advice=alert.advice[0] if alert.advice else None,
    )


def _held_against(
    level: _Level, alert: Alert, record: _Record, window: tuple[int, int, int], *, own: bool
) -> Finding:
    earliest, first, last = window
    series = record.series.get(level.key, _Series([], []))
    inside = [index for index, step in enumerate(series.steps) if first <= step <= last]
    if not inside:
        return _from_evidence(level, alert, record, own=own)
    beyond = [level.sign * x >= level.sign * level.enter for x in series.values]
    value, limit = level.show(level.enter), level.enter
    side, other = ("above", "below") if level.sign > 0 else ("below", "above")
    which = "largest" if level.sign > 0 else "smallest"
    end = inside[-1]
    among = [series.values[index] for index in inside]
    extreme = max(among) if level.sign > 0 else min(among)
    if not any(beyond[index] for index in inside):
        text = f"{level.label} stayed {other} {value} ({which} {level.show(extreme)})"
        return Finding(level.quantity, Seen.NOT_CROSSED, text, limit, extreme=extreme, own=own)
    # The last time it was beyond, back to when it first was since it had last been properly back.
    latest = max(index for index in inside if beyond[index])
    start = index = latest
    while index >= 0 and series.steps[index] >= earliest and _stays(level, series.values[index]):
        start = index if beyond[index] else start
        index -= 1
    back = next((i for i in range(latest + 1, end + 1) if not _stays(level, series.values[i])), None)
    after = series.steps[start - 1] if start > 0 else None
    at, then, now = series.steps[start], series.values[start], series.values[end]
    verb = "rose" if level.sign > 0 else "fell"
    if after is None or at <= earliest:
        since = "the readings began" if after is None else "the last slingshot"
        text = f"{level.label} was {side} {value} ever since {since} (step {at:,}; "
    elif at - after > 1:
        text = f"{level.label} {verb} {side} {value} between steps {after:,} and {at:,} ("
    else:
        text = f"{level.label} {verb} {side} {value} at step {at:,} ("
    if back is not None:
        text += f"{which} {level.show(extreme)}, back at step {series.steps[back]:,})"
    elif at == series.steps[end]:
        text += f"{level.show(then)})"
    else:
        text += f"{level.show(then)} then, {level.show(now)} {_at_end(alert)})"
    if level.key == "decay" and not own and not record.context.decoupled_decay:
        text += ", which by itself gives no kick: no decoupled weight decay moves the weights"
    back_at = None if back is None else series.steps[back]
    return Finding(level.quantity, Seen.CROSSED, text, limit, after, at, back_at, then, now, extreme, own)


def _stays(level: _Level, value: float) -> bool:
    return level.sign * value >= level.sign * level.leave


def _at_end(alert: Alert) -> str:
    if alert.kind is AlertKind.SLINGSHOT or alert.kind is AlertKind.NON_FINITE:
        return "just before"
    return "now" if alert.state is AlertState.FIRING else "at the end"


def _from_evidence(level: _Level, alert: Alert, record: _Record, *, own: bool) -> Finding:
    """No reading of it in these steps: the alert's own evidence, if it holds the same level."""
    item = alert.evidence.get(level.quantity)
    value = item.value if item is not None else math.nan
    if level.key == "growth":
        value *= record.context.tau  # an alert gives it per step
    # RMS_t is held against two levels; the threshold beside the evidence says which one it means.
    other = level.quantity == "rms_t_max" and (item is None or item.threshold != level.enter)
    if other or not math.isfinite(value):
        return Finding(level.quantity, Seen.NOT_MEASURED, level.label.rstrip(","), level.enter, own=own)
    crossed = level.sign * value >= level.sign * level.enter
    text = (
        f"{level.label} {level.show(value)} in the alert's own evidence (threshold "
        f"{level.show(level.enter)}), its readings are not on record"
    )
    seen = Seen.CROSSED if crossed else Seen.NOT_CROSSED
    return Finding(level.quantity, seen, text, level.enter, now=value, extreme=value, own=own)


def _learning_rate(record: _Record, first: int, last: int) -> Finding:
    name = "learning_rate"
    steps, values = record.series.get(name, _Series([], []))
    pairs = [
        (max(x, y) / min(x, y) if min(x, y) > 0 else math.inf, after, at, x, y)
        for after, at, x, y in zip(steps, steps[1:], values, values[1:], strict=False)
        if first <= at <= last and x != y
    ]
    if not any(first <= step <= last for step in steps):
        return Finding(name, Seen.NOT_MEASURED, words.label(name), LR_CHANGE)
    if not pairs:
        return Finding(name, Seen.NOT_CROSSED, "the learning rate did not change", LR_CHANGE, extreme=1.0)
    factor, after, at, x, y = max(pairs)
    if factor < LR_CHANGE:
        text = f"the learning rate never changed by {LR_CHANGE:g} times between two readings"
        return Finding(name, Seen.NOT_CROSSED, text, LR_CHANGE, extreme=factor)
    text = f"the learning rate went from {words.number(x)} to {words.number(y)} {_between(after, at)}"
    return Finding(name, Seen.CROSSED, text, LR_CHANGE, after, at, None, y, values[-1], factor)


def _last_update(alert: Alert, record: _Record, first: int, last: int) -> list[Finding]:
    """A kick from outside is known by what did *not* precede it: the weights had moved as they always do."""
    steps, values = record.series.get("update_jump", _Series([], []))
    inside = [x for step, x in zip(steps, values, strict=True) if first <= step <= last]
    if alert.mechanism is not Mechanism.EXTERNAL or not inside:
        return []
    text = f"the last update before it was {words.number(inside[-1])} times the average one"
    seen = Seen.NOT_CROSSED if inside[-1] <= UNMOVED else Seen.CROSSED
    return [Finding("update_rms", seen, text, UNMOVED, then=inside[-1], now=inside[-1], extreme=max(inside))]


def _not_finite(alert: Alert, record: _Record, first: int) -> list[Finding]:
    found, looked = [], False
    for name, what in _FINITE.items():
        steps, values = record.series.get(name, _Series([], []))
        inside = [i for i, step in enumerate(steps) if first <= step <= alert.last_step]
        looked = looked or bool(inside)
        counted = name == "non_finite_rows"
        bad = [i for i in inside if (values[i] > 0 if counted else not math.isfinite(values[i]))]
        if bad:
            at, after = steps[bad[0]], steps[bad[0] - 1] if bad[0] else None
            text = f"{what} {'were' if counted else 'was'} NaN or Inf {_between(after, at, 'first ')}"
            text += f", at {len(bad):,} readings" if len(bad) > 1 else ""
            own = alert.kind is AlertKind.NON_FINITE
            found.append(Finding(name, Seen.CROSSED, text, after=after, at=at, then=values[bad[0]], own=own))
    if found or not looked:
        return found
    text = "neither the loss nor a gradient nor a weight was NaN or Inf"
    return [Finding("non_finite_gradients", Seen.NOT_CROSSED, text, 0.0)]


def _loss(alert: Alert, record: _Record, last: int) -> list[Finding]:
    if alert.kind is AlertKind.SLINGSHOT:
        item = alert.evidence.get("loss")
        if item is None:
            return []
        floor = "" if item.baseline is None else f", from {words.number(item.baseline)} before"
        above = "its level" if item.threshold is None else words.number(item.threshold)
        at, peak = alert.first_step, words.number(item.value)
        text = f"the loss rose above {above} at step {at:,} (largest {peak}{floor})"
        return [Finding("loss", Seen.CROSSED, text, item.threshold, at=at, extreme=item.value, own=True)]
    if alert.kind is AlertKind.NON_FINITE:
        return []
    name = "loss" if "loss" in record.series else "head_loss"
    steps, values = record.series.get(name, _Series([], []))
    # Only while the alert fired: the steps before it may hold the run's beginning, whose loss is high.
    begin = min(alert.first_step, last)
    inside = [x for step, x in zip(steps, values, strict=True) if begin <= step <= last and math.isfinite(x)]
    if not inside:
        return [Finding("loss", Seen.NOT_MEASURED, words.label("loss"))]
    text = f"the loss did not leave its floor meanwhile (largest {words.number(max(inside))})"
    return [Finding("loss", Seen.NOT_CROSSED, text, extreme=max(inside))]


# --- what could not be seen -----------------------------------------------------------------------

_ROWS = ("zero_sum_violation", "feature_mean_growth", "logit_displacement", "feature_displacement")
_OPTIMIZER = (
    "second_moment_decay", "rms_t_max", "secant_curvature", "logit_displacement", "gradient_alignment",
)  # fmt: skip
_BLIND: dict[str, tuple[str, ...]] = {
    # Note code → what it explains the absence of; the first that fits is given as the reason.
    "head_never_fired": (*_ROWS, "loss"),
    "single_output": _ROWS,
    "not_shift_invariant": ("zero_sum_violation",),
    "no_features": ("feature_mean_growth", "logit_displacement", "feature_displacement"),
    "head_without_weight": ("logit_displacement", "feature_displacement"),
    "optimizer_without_head": ("logit_displacement", "second_moment_decay"),
    "no_second_moment": ("second_moment_decay", "rms_t_max", "secant_curvature"),
    "state_unreadable": ("second_moment_decay", "rms_t_max", "secant_curvature"),
    "failed_rows": _ROWS,
    "failed_optimizer": (*_OPTIMIZER, "learning_rate"),
    "failed_step": (*_ROWS, *_OPTIMIZER, "learning_rate", "loss"),
    "failed_detector": (),
    "failed_probe": (),
    "failed_observe_loss": ("loss",),
    "no_loss": ("loss",),
    "tied_head": (),
    "soft_targets": (),
}


def _not_visible(alert: Alert, record: _Record, findings: list[Finding], first: int) -> tuple[str, ...]:
    said = {note.code: note for note in record.notes if note.step <= alert.last_step and note.code in _BLIND}
    missing: dict[str | None, list[str]] = {code: [] for code in said}
    for finding in findings:
        if finding.seen is Seen.NOT_MEASURED:
            code = next((code for code in said if finding.quantity in _BLIND[code]), None)
            missing.setdefault(code, []).append(finding.text)
    lines = []
    for code, labels in missing.items():
        names = ", ".join(dict.fromkeys(labels))
        if code is None:
            lines.append(f"{names}: no reading in these steps")
        else:
            reason = _first_sentence(said[code].message)
            lines.append(f"{names}: {reason}" if names else reason)
    if record.first_step is None or record.first_step > alert.first_step:
        lines.append("the steps before the alert began: the readings on record begin later")
    elif record.first_step > 1 and record.first_step >= first and record.phases[:1] == [(0, Phase.HEALTHY)]:
        lines.append(f"the steps before {record.first_step:,}: the readings on record begin there")
    elsewhere = ("margin_displacement", "feature_displacement")
    held = next((f for f in findings if f.quantity == "logit_displacement"), None)
    if (
        held is not None
        and held.seen is Seen.NOT_CROSSED
        and not any(name in record.history for name in elsewhere)
    ):
        lines.append(
            "displacement that a LayerNorm before the head hides: δ was read at the head alone, without a "
            "probe batch (Monitor(probe=...))"
        )
    return tuple(lines)


def _follows(alert: Alert, record: _Record) -> str:
    last = f"step {alert.last_step:,}"
    firing = alert.state is AlertState.FIRING
    if alert.kind is AlertKind.SLINGSHOT:
        return "The loss is not back yet." if firing else f"It is over: the loss was back at {last}."
    if alert.kind is AlertKind.NON_FINITE:
        return f"Not finite up to {last}." if firing else f"Numbers were finite again at {last}."
    if not firing:
        came = next((step for step in record.starts if step == alert.last_step), None)
        if came is not None:
            return f"It came: the slingshot was seen at step {came:,}."
        return f"It passed without a slingshot, at {last}."
    forecast = words.forecast_in_words(alert)
    if forecast:
        return f"A slingshot is expected, {forecast}, counted from {last}."
    if alert.kind is AlertKind.IMMINENT:
        return "A slingshot is near; a number of steps would be a guess."
    return "Nothing yet: being at risk can last for thousands of steps, and a countdown would be a guess."


# --- words ----------------------------------------------------------------------------------------


def _percent(value: float) -> str:
    return f"{value:.0f}%" if value >= 10 else f"{value:.2g}%"


def _between(after: int | None, at: int, first: str = "") -> str:
    if after is None or at - after <= 1:
        return f"{first}at step {at:,}"
    return f"{first}between steps {after:,} and {at:,}"


def _sentence(parts: Sequence[str]) -> str:
    return "; ".join(parts) + "."


def _first_sentence(message: str) -> str:
    return message.split(". ")[0].rstrip(".")


def _thresholds_of(info: Mapping[str, Any]) -> Thresholds:
    """Those of ``run.json``; what it does not hold, or holds wrongly, is as it is by default."""
    found = info.get("thresholds")
    known = {item.name for item in fields(Thresholds)}
    try:
        return Thresholds(**{name: x for name, x in dict(found or {}).items() if name in known})
    except (TypeError, ValueError):
        return Thresholds()


def _context_of(info: Mapping[str, Any]) -> Context:
    """What ``run.json`` tells of the optimizer, as the detector had it."""
    optimizer = info.get("optimizer")
    group: Mapping[str, Any] = optimizer if isinstance(optimizer, Mapping) else {}
    betas = group.get("betas")
    tau = info.get("tau")
    default = Context()
    pair = isinstance(betas, Sequence) and len(betas) >= 2 and all(isinstance(b, (int, float)) for b in betas)
    beta1 = float(betas[0]) if pair and betas is not None else default.beta1
    if isinstance(tau, (int, float)) and tau > 0:
        beta2 = 1.0 - 1.0 / tau
    else:
        beta2 = float(betas[1]) if pair and betas is not None else default.beta2
    decoupled = group.get("decoupled_weight_decay", str(group.get("name", "")).startswith("AdamW"))
    return Context(beta1, beta2, bool(decoupled) and bool(group.get("weight_decay")))
