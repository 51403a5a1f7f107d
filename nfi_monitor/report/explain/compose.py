"""An alert in plain words: which quantities crossed what, when, and what was *not* seen.

An alert names a mechanism; whoever has to act on it wants the reasons, and what speaks against the other
mechanisms.  :mod:`~nfi_monitor.report.explain.signal_history` goes back to what the detector saw,
:mod:`~nfi_monitor.report.explain.crossings` holds it against the thresholds; here it becomes an
:class:`~nfi_monitor.report.explain.explanation.Explanation`, with what could not be seen and what follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from nfi_monitor.detect.situation import RunContext
from nfi_monitor.history import History
from nfi_monitor.report import wording
from nfi_monitor.report.explain.crossings import look_for
from nfi_monitor.report.explain.explanation import Explanation, Finding, Seen
from nfi_monitor.report.explain.signal_history import SignalHistory
from nfi_monitor.report.summary import lingers
from nfi_monitor.types import Alert, AlertKind, AlertState, Note, Phase, Thresholds


def explain(
    alert: Alert,
    history: History,
    phases: Sequence[tuple[int, Phase]],
    thresholds: Thresholds | None = None,
    context: RunContext | None = None,
    notes: Sequence[Note] = (),
) -> Explanation:
    """Explain one alert from what is on record.

    ``phases`` are (optimizer step, phase) changes; ``notes`` say what could not be seen. Where the record
    begins after the alert did (a resumed run), the alert's own evidence is all there is, and said to be.
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
    record = SignalHistory(history, phases, _thresholds_of(info), _context_of(info), notes)
    return [_explain(alert, record) for alert in chosen]


def find_alert(alerts: Iterable[Alert], wanted: Alert | str) -> Alert:
    """The newest state of an alert. Raises ValueError, naming the known ids, where there is none."""
    known = {alert.id: alert for alert in alerts}
    name = wanted.id if isinstance(wanted, Alert) else wanted
    if name not in known:
        raise ValueError(f"No alert {name!r}. Known: {', '.join(known) or 'none, nothing has been alerted'}.")
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


# --- what could not be seen, and what follows -----------------------------------------------------

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
    "loss_below_zero": (),
    "tied_head": (),
    "soft_targets": (),
}


def _not_visible(alert: Alert, record: SignalHistory, findings: list[Finding], first: int) -> tuple[str, ...]:
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


def _follows(alert: Alert, record: SignalHistory) -> str:
    last = f"step {alert.last_step:,}"
    firing = alert.state is AlertState.FIRING
    if alert.kind is AlertKind.SLINGSHOT:
        if firing:
            return "The loss is not back yet."
        after = alert.evidence.get("loss_afterwards")
        if after is None:
            return f"It is over: the loss was back at {last}."
        stayed = wording.number(after.value)
        return (
            f"It is over, but the loss is not back: at {last} it was {stayed}, which is usual from then on."
        )
    if alert.kind is AlertKind.NON_FINITE:
        return f"Not finite up to {last}." if firing else f"Numbers were finite again at {last}."
    if not firing:
        near = lingers(record.context.tau)
        came = next((step for step in record.starts if 0 <= step - alert.last_step <= near), None)
        if came is not None:
            return f"It came: the slingshot was seen at step {came:,}."
        return f"It passed without a slingshot, at {last}."
    forecast = wording.forecast_in_words(alert)
    if forecast:
        return f"A slingshot is expected, {forecast}, counted from {last}."
    if alert.kind is AlertKind.IMMINENT:
        return "A slingshot is near; a number of steps would be a guess."
    return "Nothing yet: being at risk can last for thousands of steps, and a countdown would be a guess."


def _first_sentence(message: str) -> str:
    return message.split(". ")[0].rstrip(".")


# --- a run that is read back ------------------------------------------------------------------------


def _thresholds_of(info: Mapping[str, Any]) -> Thresholds:
    """Those of ``run.json``; what it does not hold, or holds wrongly, is as it is by default."""
    found = info.get("thresholds")
    known = {item.name for item in fields(Thresholds)}
    try:
        return Thresholds(**{name: x for name, x in dict(found or {}).items() if name in known})
    except (TypeError, ValueError):
        return Thresholds()


def _context_of(info: Mapping[str, Any]) -> RunContext:
    """What ``run.json`` tells of the optimizer, as the detector had it."""
    optimizer = info.get("optimizer")
    group: Mapping[str, Any] = optimizer if isinstance(optimizer, Mapping) else {}
    betas = group.get("betas")
    tau = info.get("tau")
    default = RunContext()
    pair = isinstance(betas, Sequence) and len(betas) >= 2 and all(isinstance(b, (int, float)) for b in betas)
    beta1 = float(betas[0]) if pair and betas is not None else default.beta1
    if isinstance(tau, (int, float)) and tau > 0:
        beta2 = 1.0 - 1.0 / tau
    else:
        beta2 = float(betas[1]) if pair and betas is not None else default.beta2
    decoupled = group.get("decoupled_weight_decay", str(group.get("name", "")).startswith("AdamW"))
    return RunContext(beta1, beta2, bool(decoupled) and bool(group.get("weight_decay")))
