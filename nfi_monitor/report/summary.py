"""The after-run report as one object: a dict that json can dump and rich can print.

Built from the same five things live (``monitor.summary()``) and from disk (``nfi-monitor report``),
so both say the same.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from nfi_monitor.history import History
from nfi_monitor.replay.verdict import ReplayVerdict, arm_in_words
from nfi_monitor.report import terminal, wording
from nfi_monitor.report.console import SEVERITY_STYLES
from nfi_monitor.report.json_values import plain
from nfi_monitor.types import Alert, AlertKind, AlertState, Evidence, Mechanism, Note, Phase, Severity

PHASE_STYLES = {
    Phase.HEALTHY: "green",
    Phase.ABSORBING: "cyan",
    Phase.INFLATING: "yellow",
    Phase.IMMINENT: "bold red",
    Phase.SLINGSHOT: "bold magenta",
    Phase.RECOVERING: "blue",
}

# The quantities worth a line after a run, and on which side their extreme lies.
KEY_QUANTITIES: dict[str, str] = {
    "loss": "max",
    "head_loss": "max",
    "zero_sum_violation": "max",
    "zero_sum_violation_weight": "max",
    "absorbed_fraction": "max",
    "partially_absorbed_fraction": "max",
    "margin_median": "max",
    "feature_mean_norm": "max",
    "classifier_mean_norm": "max",
    "mean_alignment": "min",
    "mean_logit": "min",
    "logit_displacement": "max",
    "margin_displacement": "max",
    "rms_t_max": "max",
    "effective_learning_rate": "max",
    "second_moment_decay": "min",
    "weight_norm": "max",
}

_RUN = ("model", "parameters", "head", "dtype", "optimizer", "tau", "every", "level", "run_dir")

_SHOWN = 20  # rows of a table on a terminal; all of them are in the dict and in alerts.jsonl


class Summary(dict[str, Any]):
    """What happened in a run. Keys: ``run, last_step, readings, phase, phase_share, slingshots, replays,
    events, quantities, absorbing_classes, notes, overhead``; only JSON's own types, no NaN.

    ``rich.print(summary)`` and ``print(summary)`` show the report, ``json.dumps(summary)`` the data.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        say = terminal.shown(options.ascii_only)
        yield _render(self, say)

    def __str__(self) -> str:
        """The report as plain text, 100 columns wide."""
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
    """The summary of a run, also of one that has measured nothing yet.

    ``info`` is the content of ``run.json``; every key of it is optional. ``phases`` holds the changes
    only, as ``(optimizer step, phase)``.
    """
    info = plain(info)
    quantities = {name: _extremes(history, name, side) for name, side in KEY_QUANTITIES.items()}
    steps = [item["last_step"] for item in quantities.values() if item]
    steps += [phases[-1][0]] if phases else []
    steps += [alert.last_step for alert in alerts]
    steps += [info["steps"]] if isinstance(info.get("steps"), int) and info["steps"] > 0 else []
    last_step = max([*steps, *_any_last_step(history)], default=None)
    # What run.json says of a run that was killed is from its first moment.
    overhead, tau = info.get("overhead"), info.get("tau")
    if isinstance(overhead, dict) and len(history) and not overhead.get("measured_steps"):
        overhead = None
    return Summary(
        run={key: info.get(key) for key in _RUN},
        last_step=last_step,
        readings=len(history),
        phase=str(phases[-1][1]) if phases else None,
        phase_share=_phase_share(phases, last_step),
        slingshots=slingshots(alerts, tau if isinstance(tau, (int, float)) else 0.0),
        replays=[_replay(verdict) for verdict in replays],
        events=[_event(alert) for alert in alerts],
        quantities={name: item for name, item in quantities.items() if item},
        absorbing_classes=info.get("absorbing_classes") or [],
        notes=[{"code": note.code, "message": note.message, "step": note.step} for note in notes],
        overhead=overhead,
    )


def slingshots(alerts: Sequence[Alert], tau: float) -> list[dict[str, Any]]:
    """One dict a slingshot: ``id, start, end (None while it lasts), at_risk_lead, imminent_lead, mechanism,
    confidence``.

    A lead is the slingshot's first step minus that of the alert which announced it: the first of that kind
    that began by then and still fired, or had ended no more than :func:`lingers` steps before.  What ended
    when the previous slingshot was seen, some steps after its first, has no part in this one.  None: nothing
    announced it.
    """
    found = sorted((a for a in alerts if a.kind is AlertKind.SLINGSHOT), key=lambda a: a.first_step)
    rows = []
    previous_end = 0
    for slingshot in found:
        start = slingshot.first_step
        since = max(previous_end + 1, start - lingers(tau))
        rows.append(
            {
                "id": slingshot.id,
                "start": start,
                "end": slingshot.last_step if slingshot.state is AlertState.RESOLVED else None,
                "at_risk_lead": _lead(alerts, AlertKind.AT_RISK, start, since),
                "imminent_lead": _lead(alerts, AlertKind.IMMINENT, start, since),
                "mechanism": str(slingshot.mechanism),
                "confidence": plain(float(slingshot.confidence)),
            }
        )
        previous_end = slingshot.last_step
    return rows


def _lead(alerts: Sequence[Alert], kind: AlertKind, start: int, since: float) -> int | None:
    announced = (
        start - alert.first_step
        for alert in alerts
        if alert.kind is kind
        and alert.first_step <= start
        and (alert.state is AlertState.FIRING or alert.last_step >= since)
    )
    return max(announced, default=None)


def lingers(tau: float) -> float:
    """Steps before a slingshot by which an alert may have ended and still have announced it.

    The pause that makes no new alarm where the detection benchmark scores warnings: τ, and 50 steps at most,
    for a kick or a swing leads to a slingshot within steps, whatever τ is, or to none.
    """
    return min(tau, 50.0)


def _replay(verdict: ReplayVerdict) -> dict[str, Any]:
    """A verdict without its losses, which are in replays.jsonl."""
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


def _event(alert: Alert) -> dict[str, Any]:
    record = alert.to_json()
    keys = ("id", "kind", "severity", "state", "first_step", "last_step", "mechanism", "confidence")
    found: dict[str, Any] = plain({key: record[key] for key in (*keys, "advice")})
    found["evidence"] = plain({name: record["evidence"][name] for name in wording.ordered_evidence(alert)})
    return found


def _extremes(history: History, name: str, side: str) -> dict[str, Any] | None:
    steps, values = history[name]
    if not len(values):
        return None
    finite = np.flatnonzero(np.isfinite(values))
    found: dict[str, Any] = {
        "last": plain(float(values[-1])),
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
    """Share of steps spent in each phase, from the first known one to the last step."""
    if not phases or last_step is None:
        return {}
    # A phase entered "at step 0", before the first step, has that step as its first.
    edges = [*((max(step, 1), phase) for step, phase in phases), (last_step + 1, Phase.HEALTHY)]
    counts: dict[str, int] = {}
    for (start, phase), (end, _) in pairwise(edges):
        counts[str(phase)] = counts.get(str(phase), 0) + max(end - start, 0)
    total = sum(counts.values())
    return {phase: count / total for phase, count in counts.items()} if total else {}


# --- rendering --------------------------------------------------------------------------------------


def _render(summary: Summary, say: Callable[[str], str]) -> Group:
    blocks: list[RenderableType] = [
        _title(say),
        _header(summary, say),
    ]
    for title, block in (
        ("Slingshots and their warnings", _slingshot_table(summary, say)),
        ("Causes, found by replay", _replay_lines(summary, say)),
        ("Events", _event_table(summary, say)),
        ("Phases", _phase_lines(summary, say)),
        ("Key quantities", _quantity_table(summary, say)),
        ("Classes absorbed most often", _class_line(summary, say)),
        ("What could not be seen, and other notes", _note_lines(summary, say)),
    ):
        if block is not None:
            blocks += [Text(), Text(say(title), style="bold"), Padding(block, (0, 0, 0, 2))]
    blocks += [Text(), _overhead_line(summary, say)]
    return Group(*blocks)


def _title(say: Callable[[str], str]) -> RenderableType:
    title = Text(say("nfi-monitor · after-run report"), style="bold")
    # A rule cuts its title off with an ellipsis, which is not ASCII.
    return title if "|" in title.plain else Rule(title, style="dim", align="left")


def _header(summary: Summary, say: Callable[[str], str]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    run = summary["run"]
    for key in ("model", "head", "optimizer"):
        if run.get(key):
            text = _describe(run[key])
            if key == "model" and isinstance(run.get("parameters"), int):
                text += f", {run['parameters']:,} parameters" + (
                    f", {run['dtype']}" if run.get("dtype") else ""
                )
            table.add_row(key, Text(say(text)))
    last = summary["last_step"]
    steps = "no step measured yet" if last is None else f"{last:,}, with {summary['readings']:,} readings"
    table.add_row("steps", Text(say(steps)))
    if run.get("run_dir"):
        table.add_row("run directory", Text(say(str(run["run_dir"]))))
    return table


def _describe(value: Any) -> str:
    """``head (classes 23, features 128)`` from a dict with a name, anything else as it is."""
    if not isinstance(value, dict):
        return str(value)
    name = value.get("name") or value.get("class") or value.get("type")
    rest = [
        f"{key.replace('_', ' ')} {_short(item)}"
        for key, item in value.items()
        if item is not None and item is not False and item != name and not isinstance(item, dict)
    ]
    return f"{name} ({', '.join(rest)})" if name and rest else str(name or ", ".join(rest))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _steps(start: int, end: int | None) -> str:
    return f"{start:,}–{end:,}" if end is not None else f"from {start:,}"


def _certain(mechanism: str, confidence: float | None) -> tuple[str, str]:
    name = wording.mechanism_name(Mechanism(mechanism))
    known = confidence is not None and mechanism != Mechanism.UNKNOWN
    return name, f"{100 * confidence:.0f}%" if known and confidence is not None else ""


def _table(*columns: tuple[str, str]) -> Table:
    # No outer box: the report is also read in log files and pasted into issues.
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    return table


def _earlier(rows: list[Any], say: Callable[[str], str], what: str) -> Text | None:
    if len(rows) <= _SHOWN:
        return None
    where = "replays.jsonl" if what == "replays" else "alerts.jsonl"
    text = f"… and {len(rows) - _SHOWN:,} earlier {what}, in {where} and in the JSON form"
    return Text(say(text), style="dim")


def _slingshot_table(summary: Summary, say: Callable[[str], str]) -> RenderableType:
    rows = summary["slingshots"]
    if not rows:
        return Text("none" if summary["last_step"] is not None else "nothing measured yet", style="green")
    table = _table(
        ("#", "right"), ("steps", ""), ("at risk, lead", "right"), ("imminent, lead", "right"),
        ("mechanism", ""), ("confidence", "right"),
    )  # fmt: skip
    for index, row in enumerate(rows[-_SHOWN:], start=max(len(rows) - _SHOWN, 0) + 1):
        leads = [
            Text("no warning", style="red") if row[key] is None else Text(f"{row[key]:,} steps")
            for key in ("at_risk_lead", "imminent_lead")
        ]
        steps = say(_steps(row["start"], row["end"]))
        table.add_row(str(index), steps, *leads, *map(say, _certain(row["mechanism"], row["confidence"])))
    return _with(table, _earlier(rows, say, "slingshots"))


def _replay_lines(summary: Summary, say: Callable[[str], str]) -> RenderableType | None:
    """Each replay's verdict beside the monitor's own guess, and what every arm did."""
    rows = summary["replays"]
    if not rows:
        return None
    guesses = {row["id"]: row for row in summary["slingshots"]}
    table = Table.grid(padding=(0, 1))
    table.add_column(overflow="fold", style="dim")
    table.add_column(overflow="fold")
    for row in rows[-_SHOWN:]:
        guess = guesses.get(row["slingshot"])
        text = Text(
            say(f"{row['slingshot'] or 'no slingshot'}, from step {row['snapshot_step']:,}"), style="bold"
        )
        if guess is not None:
            told = " ".join(_certain(guess["mechanism"], guess["confidence"])).strip()
            text.append(say(f" · monitor: {told}"), style="not bold")
        name = wording.mechanism_name(Mechanism(row["mechanism"]))
        text.append(say(f" · replay: {name}"), style="not bold")
        table.add_row(say("·"), text)
        reasons = list(row["reasons"])
        if row["reproduced"]:
            reasons.append("the original losses were reproduced to the last bit")
        table.add_row("", Text(say("; ".join(reasons) + ".")))
        table.add_row("", Text(say(", ".join(map(_arm, row["arms"]))), style="dim"))
    more = _earlier(rows, say, "replays")
    return table if more is None else Group(more, table)


def _arm(arm: Mapping[str, Any]) -> str:
    name = arm_in_words(arm["arm"])
    if not arm["applied"]:
        return f"{name}: no difference"
    at = arm["spiked_at"]
    return f"{name}: {'none' if at is None else f'step {at:,}'}"


def _event_table(summary: Summary, say: Callable[[str], str]) -> RenderableType:
    rows = summary["events"]
    if not rows:
        return Text("none", style="green")
    table = _table(
        ("kind", ""), ("severity", ""), ("steps", ""), ("mechanism, confidence", ""), ("evidence", "")
    )
    for row in rows[-_SHOWN:]:
        end = row["last_step"] if row["state"] == AlertState.RESOLVED else None
        severity = Severity(row["severity"])
        shown = [*row["evidence"]][:1] + (["loss_afterwards"] if "loss_afterwards" in row["evidence"] else [])
        evidence = ", ".join(_evidence(name, row["evidence"][name]) for name in shown)
        table.add_row(
            wording.kind_in_words(AlertKind(row["kind"])),
            Text(str(severity), style=SEVERITY_STYLES[severity]),
            say(_steps(row["first_step"], end)),
            say(" ".join(_certain(row["mechanism"], row["confidence"])).strip()),
            Text(say(evidence)),  # names of quantities as the file has them, and no markup
        )
    return _with(table, _earlier(rows, say, "events"))


def _evidence(name: str, item: Mapping[str, Any]) -> str:
    """The value alone: a terminal has no room for the threshold, which the alert itself shows."""
    value = math.nan if item["value"] is None else item["value"]
    return wording.one_evidence_in_words(name, Evidence(value))


def _phase_lines(summary: Summary, say: Callable[[str], str]) -> RenderableType | None:
    share = summary["phase_share"]
    if not share:
        return None
    text = Text("now ")
    text.append(summary["phase"], style=PHASE_STYLES[Phase(summary["phase"])])
    text.append(say(" · steps in "), style="dim")
    parts = [
        Text.assemble((str(phase), PHASE_STYLES[phase]), f" {_percent(share[str(phase)])}")
        for phase in Phase
        if str(phase) in share
    ]
    return text + Text(", ").join(parts)


def _percent(share: float) -> str:
    """Never 0% for what has happened nor 100% for what has not always."""
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{100 * share:.3g}%"


def _quantity_table(summary: Summary, say: Callable[[str], str]) -> RenderableType | None:
    quantities = summary["quantities"]
    if not quantities:
        return None
    table = _table(
        ("quantity", ""), ("last", "right"), ("extreme", "right"), ("", ""), ("at step", "right"), ("", "")
    )
    for name, item in quantities.items():
        bad = item["not_finite"]
        table.add_row(
            say(wording.label(name)),
            say("not finite" if item["last"] is None else wording.amount(name, item["last"])),
            say(wording.amount(name, item["value"])),
            item["extreme"],
            "" if item["step"] is None else f"{item['step']:,}",
            Text(f"{bad:,} not finite", style="red") if bad else "",
        )
    return table


def _class_line(summary: Summary, say: Callable[[str], str]) -> RenderableType | None:
    classes = summary["absorbing_classes"]
    if not classes:
        return None
    text = ", ".join(
        f"{wording.number(name) if isinstance(name, float) else name} ({wording.number(count)})"
        for name, count in classes[:10]
    )
    return Text(say(text + (f", and {len(classes) - 10:,} more" if len(classes) > 10 else "")))


def _note_lines(summary: Summary, say: Callable[[str], str]) -> RenderableType | None:
    notes = summary["notes"]
    if not notes:
        return None
    table = Table.grid(padding=(0, 1))
    table.add_column(overflow="fold", style="dim")
    table.add_column(overflow="fold")
    for note in notes[:_SHOWN]:
        table.add_row(say("·"), Text(say(f"{note['message']} (step {note['step']:,})")))
    if len(notes) > _SHOWN:
        table.add_row(say("…"), f"and {len(notes) - _SHOWN:,} more, in run.json")
    return table


def _overhead_line(summary: Summary, say: Callable[[str], str]) -> Text:
    overhead = summary["overhead"]
    if not isinstance(overhead, dict) or overhead.get("seconds") is None:
        return Text("The monitor's own time is not recorded: the run has not been closed.", style="dim")
    text = f"The monitor took {overhead['seconds']:.3g} s of its own"
    if overhead.get("share") is not None:
        text += f", {_percent(overhead['share'])} of the training's own time"
    if overhead.get("measured_steps") is not None:
        text += f", for {overhead['measured_steps']:,} measured steps"
    return Text(say(text + "."), style="dim")


def _with(table: Table, more: Text | None) -> RenderableType:
    return table if more is None else Group(more, table)
