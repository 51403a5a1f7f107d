"""Explain an alert: which quantities crossed which thresholds, when, and which did not.

An alert names a mechanism.  The explanation gives the reasons for it, and those against other mechanisms.
:mod:`~nfi_monitor.report.explain.signal_history` computes the detector's signals again,
:mod:`~nfi_monitor.report.explain.crossings` compares it with the thresholds, and this module makes an
:class:`~nfi_monitor.report.explain.explanation.Explanation` of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nfi_monitor.detect.situation import RunContext
from nfi_monitor.history import History
from nfi_monitor.report import wording
from nfi_monitor.report.explain.crossings import look_for
from nfi_monitor.report.explain.explanation import Explanation, Finding, Seen
from nfi_monitor.report.explain.signal_history import SignalHistory
from nfi_monitor.report.levels import context_of, thresholds_of
from nfi_monitor.report.summary import warning_gap
from nfi_monitor.types import Alert, AlertKind, AlertState, Note, Outcome, Phase, Thresholds


def explain(
    alert: Alert,
    history: History,
    phases: Sequence[tuple[int, Phase]],
    thresholds: Thresholds | None = None,
    context: RunContext | None = None,
    notes: Sequence[Note] = (),
) -> Explanation:
    """Explain one alert from the readings of its run.

    ``phases`` holds the changes as (optimizer step, phase).  ``notes`` say what the monitor could not
    measure.  Where the readings begin after the alert (a resumed run), only the alert's own evidence is used,
    and the explanation says so.
    """
    record = SignalHistory(history, phases, thresholds or Thresholds(), context or RunContext(), notes)
    return _explain(alert, record)


def explain_run(
    info: Mapping[str, Any],
    history: History,
    phases: Sequence[tuple[int, Phase]],
    alerts: Sequence[Alert],
    notes: Sequence[Note],
    wanted: str | None = None,
    last: int | None = None,
) -> list[Explanation]:
    """Explain the alerts of a run that was read from disk.

    Without ``wanted``: the ``last`` ones of :func:`worth_explaining`, or all of them.  ``wanted``: the id of
    one alert.  ``info`` is the content of ``run.json``.  Raises ValueError for an unknown id, naming known
    ones.
    """
    if wanted is None:
        chosen = worth_explaining(alerts)
        chosen = chosen if last is None else chosen[-last:]
    else:
        # A run that was resumed without the monitor's state numbers alerts from 1 again: take the newest.
        chosen = [find_alert(alerts, wanted)]
    if not chosen:
        return []
    record = SignalHistory(history, phases, thresholds_of(info), context_of(info), notes)
    return [_explain(alert, record) for alert in chosen]


def worth_explaining(alerts: Sequence[Alert]) -> list[Alert]:
    """Return every slingshot, and the last other alert that still fires."""
    firing = [a for a in alerts if a.state is AlertState.FIRING and a.kind is not AlertKind.SLINGSHOT]
    return [alert for alert in alerts if alert.kind is AlertKind.SLINGSHOT] + firing[-1:]


def find_alert(alerts: Iterable[Alert], wanted: Alert | str) -> Alert:
    """Return the newest state of an alert. Raises ValueError for an unknown id, naming the known ones."""
    known = {alert.id: alert for alert in alerts}
    name = wanted.id if isinstance(wanted, Alert) else wanted
    if name not in known:
        names = [*known][-20:]  # a run may have 100,000
        earlier = f"{len(known) - 20:,} more and " if len(known) > 20 else ""
        raise ValueError(f"There is no alert {name!r}. Known alerts: {earlier}{', '.join(names) or 'none'}.")
    return known[name]


def _explain(alert: Alert, record: SignalHistory) -> Explanation:
    earliest, first, last, why = record.window(alert)
    findings = look_for(alert, record, (earliest, first, last))
    return Explanation(
        alert=alert,
        window=(first, last),
        why_window=why,
        findings=tuple(findings),
        not_visible=_not_visible(alert, record, findings, first),
        follows=_follows(alert, record),
        advice=alert.advice[0] if alert.advice else None,
    )


# --- what could not be measured, and what follows -------------------------------------------------

_ROWS = (
    "zero_sum_violation_smoothed", "feature_mean_growth", "logit_displacement", "feature_displacement",
)  # fmt: skip
_OPTIMIZER = (
    "second_moment_decay", "rms_t_max", "secant_curvature", "logit_displacement", "gradient_alignment",
)  # fmt: skip
_BLIND: dict[str, tuple[str, ...]] = {
    # Code of a note → quantities that are missing because of it; the first note that fits is the reason.
    "head_never_fired": (*_ROWS, "loss"),
    "single_output": _ROWS,
    "not_shift_invariant": ("zero_sum_violation_smoothed",),
    "no_features": ("feature_mean_growth", "logit_displacement", "feature_displacement"),
    "head_without_weight": ("logit_displacement", "feature_displacement"),
    "optimizer_without_head": ("logit_displacement", "second_moment_decay"),
    "no_second_moment": ("second_moment_decay", "rms_t_max", "secant_curvature"),
    "second_moment_in_part": ("second_moment_decay", "rms_t_max", "secant_curvature"),
    "state_unreadable": ("second_moment_decay", "rms_t_max", "secant_curvature"),
    "failed_rows": _ROWS,
    "failed_optimizer": (*_OPTIMIZER, "learning_rate"),
    "failed_step": (*_ROWS, *_OPTIMIZER, "learning_rate", "loss"),
    "failed_detector": (),
    "failed_probe": (),
    "failed_observe_loss": ("loss",),
    "no_loss": ("loss",),
    "not_cross_entropy": ("loss",),
    "loss_below_zero": (),
    "tied_head": (),
    "soft_targets": (),
}


def _not_visible(alert: Alert, record: SignalHistory, findings: list[Finding], first: int) -> tuple[str, ...]:
    """Return what could not be measured, each with the reason if a note gives one."""
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
        lines.append("the steps before the alert began: the readings begin later")
    elif record.first_step > 1 and record.first_step >= first and record.phases[:1] == [(0, Phase.HEALTHY)]:
        lines.append(f"the steps before {record.first_step:,}: the readings begin there")
    elsewhere = ("margin_displacement", "feature_displacement")
    held = next((f for f in findings if f.quantity == "logit_displacement"), None)
    if (
        held is not None
        and held.seen is Seen.NOT_CROSSED
        and not any(name in record.history for name in elsewhere)
    ):
        lines.append(
            "displacement that a LayerNorm before the head hides: δ (how far one update moves the logits) "
            "was measured at the head only. To measure it, pass a probe batch: Monitor(probe=...)"
        )
    return tuple(lines)


def _follows(alert: Alert, record: SignalHistory) -> str:
    """Return what happened after the alert, or what to expect if it still fires."""
    last = f"step {alert.last_step:,}"
    firing = alert.state is AlertState.FIRING
    if alert.outcome is Outcome.OPEN:
        return _open(alert)
    if alert.kind is AlertKind.SLINGSHOT:
        if firing:
            return "The loss has not recovered yet."
        after = alert.evidence.get("loss_afterwards")
        if after is None:
            return f"It is over: the loss had recovered at {last}."
        stayed = wording.number(after.value)
        return f"It is over, but the loss has not recovered: at {last} it was {stayed}, its new level."
    if alert.kind is AlertKind.NON_FINITE:
        return f"NaN or Inf up to {last}." if firing else f"All numbers were finite again at {last}."
    if not firing:
        if alert.outcome in (Outcome.SLINGSHOT, Outcome.BURST):
            what = "It happened" if alert.outcome is Outcome.SLINGSHOT else "A smaller burst followed"
            return f"{what}: {wording.event_in_words(alert)}."
        near = warning_gap(record.context.tau)
        came = next((step for step in record.starts if 0 <= step - alert.last_step <= near), None)
        if came is not None:
            return f"The slingshot came: the loss rose at step {came:,}."
        return f"It ended at {last} without a slingshot."
    if alert.unmoved_since is not None:
        return f"Since step {alert.unmoved_since:,} nothing has moved, so the alert is less severe now."
    forecast = wording.forecast_in_words(alert)
    if forecast:
        return f"A slingshot is expected: {forecast}, counted from {last}."
    if alert.kind is AlertKind.IMMINENT:
        return "A slingshot is near. How many steps are left cannot be predicted here."
    return "No slingshot yet. This state can last for thousands of steps, so no number of steps is given."


def _open(alert: Alert) -> str:
    """Return what was true when the run ended while the alert fired."""
    end = f"when the run ended at step {alert.outcome_step:,}" if alert.outcome_step else "when the run ended"
    if alert.kind is AlertKind.SLINGSHOT:
        return f"The loss had not recovered {end}."
    if alert.kind is AlertKind.NON_FINITE:
        return f"NaN or Inf was still there {end}."
    return f"It was still firing {end}, and no slingshot had come."


def _first_sentence(message: str) -> str:
    return message.split(". ")[0].rstrip(".")
