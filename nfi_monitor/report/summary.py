"""Summarize a run in one object: a dict that json can dump and rich can print.

``monitor.summary()`` and ``nfi-monitor report`` make it from the same data, so both say the same.
"""

from __future__ import annotations

import io
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType

from nfi_monitor import _moved
from nfi_monitor.history import History
from nfi_monitor.quantities import READING_ORDER
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report import summary_view, terminal, wording
from nfi_monitor.report.json_values import as_json
from nfi_monitor.types import Alert, AlertKind, AlertState, Note, Outcome, Phase

KEY_QUANTITIES: dict[str, str] = {
    quantity.name: quantity.extreme for quantity in READING_ORDER if quantity.extreme is not None
}
"""The quantities that have a line in the report, and which extreme is of interest: "max" or "min"."""

_RUN = ("model", "parameters", "head", "dtype", "optimizer", "tau", "every", "level", "run_dir")


class Summary(dict[str, Any]):
    """What happened in a run: a dict of JSON's own types, without NaN.

    Keys: ``run, last_step, readings, phase, phase_share, slingshots, replays, events, quantities,
    absorbing_classes, notes, overhead``.  ``readings`` counts the steps that were read in full.
    ``rich.print(summary)`` and ``print(summary)`` show the report, ``json.dumps(summary)`` the data.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        say = terminal.cleaner(options.ascii_only)
        yield summary_view.render(self, say)

    def __str__(self) -> str:
        """Return the report as text without colours, 100 columns wide."""
        out = io.StringIO()
        Console(file=out, width=100, color_system=None, force_jupyter=False).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def summarize(
    info: Mapping[str, Any],
    history: History,
    phases: Sequence[tuple[int, Phase]],
    alerts: Sequence[Alert],
    notes: Sequence[Note],
    replays: Sequence[ReplayVerdict] = (),
) -> Summary:
    """Summarize a run, also one that has no reading yet.

    ``info`` is the content of ``run.json``; every key is optional.  ``phases`` holds the changes of phase, as
    ``(optimizer step, phase)``.
    """
    info = as_json(info)
    quantities = {name: _extremes(history, name, side) for name, side in KEY_QUANTITIES.items()}
    steps = [item["last_step"] for item in quantities.values() if item]
    steps += [phases[-1][0]] if phases else []
    steps += [alert.last_step for alert in alerts]
    steps += [info["steps"]] if isinstance(info.get("steps"), int) and info["steps"] > 0 else []
    last_step = max([*steps, *_any_last_step(history)], default=None)
    # If the run was killed, run.json still holds the overhead of its start: leave it out.
    overhead = info.get("overhead")
    tau = float(info["tau"]) if isinstance(info.get("tau"), (int, float)) else 0.0
    if isinstance(overhead, dict) and len(history) and not overhead.get("measured_steps"):
        overhead = None
    starts = sorted(alert.first_step for alert in alerts if alert.kind is AlertKind.SLINGSHOT)
    return Summary(
        run={key: info.get(key) for key in _RUN},
        last_step=last_step,
        readings=history.full_readings,
        phase=str(phases[-1][1]) if phases else None,
        phase_share=_phase_share(phases, last_step),
        slingshots=slingshots(alerts, tau),
        replays=[_replay(verdict) for verdict in replays],
        events=[_event(alert, starts, tau) for alert in alerts],
        quantities={name: item for name, item in quantities.items() if item},
        absorbing_classes=info.get("absorbing_classes") or [],
        notes=[{"code": note.code, "message": note.message, "step": note.step} for note in notes],
        overhead=overhead,
    )


def slingshots(alerts: Sequence[Alert], tau: float) -> list[dict[str, Any]]:
    """Return one dict for each slingshot, oldest first.

    Keys: ``id, start, end (None while it lasts), at_risk_lead, imminent_lead, mechanism, confidence``.

    A lead is the number of steps from the first step of the warning to the first step of the slingshot; None
    if there was no warning.  The warning is the earliest alert of that kind that still fired when the
    slingshot began, or had ended at most :func:`warning_gap` steps before.  An alert that ended with the
    previous slingshot does not count.
    """
    found = sorted((a for a in alerts if a.kind is AlertKind.SLINGSHOT), key=lambda a: a.first_step)
    at_risk, imminent = _Warnings(alerts, AlertKind.AT_RISK), _Warnings(alerts, AlertKind.IMMINENT)
    rows = []
    previous_end = 0
    for slingshot in found:
        start = slingshot.first_step
        since = max(previous_end + 1, start - warning_gap(tau))
        rows.append(
            {
                "id": slingshot.id,
                "start": start,
                "end": slingshot.last_step if slingshot.state is AlertState.RESOLVED else None,
                "at_risk_lead": at_risk.lead(start, since),
                "imminent_lead": imminent.lead(start, since),
                "mechanism": str(slingshot.mechanism),
                "confidence": as_json(float(slingshot.confidence)),
            }
        )
        previous_end = slingshot.last_step
    return rows


class _Warnings:
    """Find the earliest warning of one kind that had not ended before a step. A run may have 100,000."""

    def __init__(self, alerts: Sequence[Alert], kind: AlertKind) -> None:
        ends = sorted(
            (math.inf if alert.state is AlertState.FIRING else alert.last_step, alert.first_step)
            for alert in alerts
            if alert.kind is kind
        )
        self._ends = [end for end, _ in ends]
        # The smallest first step of this warning and all that ended later.
        self._begun = list(accumulate((first for _, first in reversed(ends)), min))[::-1]

    def lead(self, start: int, since: float) -> int | None:
        """Return the steps from the warning to ``start``; None if none lasted until ``since``."""
        place = bisect_left(self._ends, since)
        if place == len(self._ends) or self._begun[place] > start:
            return None
        return start - self._begun[place]


def warning_gap(tau: float) -> float:
    """Return how many steps before a slingshot an alert may have ended and still count as its warning.

    τ steps, at most 50: a kick or an oscillation leads to a slingshot within a few steps, whatever τ is, or
    to none.  The detection benchmark joins alarms by the same gap.
    """
    return min(tau, 50.0)


def _replay(verdict: ReplayVerdict) -> dict[str, Any]:
    """Return a verdict without its losses; replays.jsonl has them."""
    return {
        "slingshot": verdict.slingshot,
        "snapshot_step": verdict.snapshot_step,
        "mechanism": str(verdict.mechanism),
        "reasons": list(verdict.reasons),
        "reproduced": verdict.reproduced,
        "arms": [
            {
                "arm": outcome.arm,
                "spiked_at": outcome.spiked_at,
                "steps": outcome.steps,
                "applied": outcome.applied,
            }
            for outcome in verdict.outcomes.values()
        ],
    }


def _event(alert: Alert, starts: Sequence[int], tau: float) -> dict[str, Any]:
    """Return an alert as a dict. ``starts``: the first steps of all slingshots, in order."""
    record = alert.to_json()
    keys = (
        "id", "kind", "severity", "state", "first_step", "last_step", "mechanism", "confidence", "advice",
        "rule", "outcome", "outcome_step", "unmoved_since",
    )  # fmt: skip
    found: dict[str, Any] = as_json({key: record[key] for key in keys})
    found["ended"] = wording.ending_in_words(alert)
    if alert.outcome is Outcome.PASSED:
        # It had ended before the slingshot came, but still counts as its warning.
        place = bisect_left(starts, alert.last_step)
        if place < len(starts) and starts[place] - alert.last_step <= warning_gap(tau):
            found["ended"] = f"a slingshot followed at step {starts[place]:,}"
    found["evidence"] = as_json({name: record["evidence"][name] for name in wording.ordered_evidence(alert)})
    return found


def _extremes(history: History, name: str, side: str) -> dict[str, Any] | None:
    steps, values = history[name]
    if not len(values):
        return None
    finite = np.flatnonzero(np.isfinite(values))
    found: dict[str, Any] = {
        "last": as_json(float(values[-1])),
        "last_step": int(steps[-1]),
        "extreme": side,
        "value": None,
        "step": None,
        "not_finite": len(values) - len(finite),
    }
    if len(finite):
        among = values[finite]
        best = finite[int(among.argmax() if side == "max" else among.argmin())]
        found |= {"value": float(values[best]), "step": int(steps[best])}
    return found


def _any_last_step(history: History) -> Iterator[int]:
    for name in history.names():
        steps, _ = history[name]
        if len(steps):
            yield int(steps[-1])


def _phase_share(phases: Sequence[tuple[int, Phase]], last_step: int | None) -> dict[str, float]:
    """Return the share of steps in each phase, from the first known phase to the last step."""
    if not phases or last_step is None:
        return {}
    # A phase that is entered at step 0, before the first step, begins with step 1.
    edges = [*((max(step, 1), phase) for step, phase in phases), (last_step + 1, Phase.HEALTHY)]
    counts: dict[str, int] = {}
    for (start, phase), (end, _) in pairwise(edges):
        counts[str(phase)] = counts.get(str(phase), 0) + max(end - start, 0)
    total = sum(counts.values())
    return {phase: count / total for phase, count in counts.items()} if total else {}


if not TYPE_CHECKING:  # for a type checker, any name would exist

    def __getattr__(name: str) -> Any:
        return _moved.left(__name__, name)
