"""Show the after-run report on a terminal: a title, a header and one block for each subject.

Each function makes one block of :class:`nfi_monitor.report.summary.Summary`, or None if there is nothing to
show.  ``say`` makes text safe for the terminal (:func:`nfi_monitor.report.terminal.cleaner`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from nfi_monitor.replay.verdict import arm_in_words
from nfi_monitor.report import wording
from nfi_monitor.report.styles import PHASE_STYLES, SEVERITY_STYLES
from nfi_monitor.types import AlertKind, AlertState, Evidence, Mechanism, Phase, Severity

_SHOWN = 20  # rows of a table on a terminal; all of them are in the dict and in alerts.jsonl


def render(summary: Mapping[str, Any], say: Callable[[str], str]) -> Group:
    blocks: list[RenderableType] = [
        _title(say),
        _header(summary, say),
    ]
    for title, block in (
        ("Slingshots and their warnings", _slingshot_table(summary, say)),
        ("Causes found by replay", _replay_lines(summary, say)),
        ("Events", _event_table(summary, say)),
        ("Phases", _phase_lines(summary, say)),
        ("Key quantities", _quantity_table(summary, say)),
        ("Classes absorbed most often", _class_line(summary, say)),
        ("Notes: what could not be measured, and more", _note_lines(summary, say)),
    ):
        if block is not None:
            blocks += [Text(), Text(say(title), style="bold"), Padding(block, (0, 0, 0, 2))]
    blocks += [Text(), _overhead_line(summary, say)]
    return Group(*blocks)


def _title(say: Callable[[str], str]) -> RenderableType:
    title = Text(say("nfi-monitor · after-run report"), style="bold")
    # A rule may cut off its title with an ellipsis, which is not ASCII.
    return title if "|" in title.plain else Rule(title, style="dim", align="left")


def _header(summary: Mapping[str, Any], say: Callable[[str], str]) -> RenderableType:
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
    steps = (
        "no step has been measured yet"
        if last is None
        else f"{last:,}, with {summary['readings']:,} readings"
    )
    table.add_row("steps", Text(say(steps)))
    if run.get("run_dir"):
        table.add_row("run directory", Text(say(str(run["run_dir"]))))
    return table


def _describe(value: Any) -> str:
    """Show a dict that has a name as ``head (classes 23, features 128)``, anything else by its ``str``."""
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
    # No outer box: people also read the report in log files and paste it into issues.
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    return table


def _earlier(rows: list[Any], say: Callable[[str], str], what: str) -> Text | None:
    if len(rows) <= _SHOWN:
        return None
    where = "replays.jsonl" if what == "replays" else "alerts.jsonl"
    text = f"… and {len(rows) - _SHOWN:,} earlier {what}: see {where}, or use --json"
    return Text(say(text), style="dim")


def _slingshot_table(summary: Mapping[str, Any], say: Callable[[str], str]) -> RenderableType:
    rows = summary["slingshots"]
    if not rows:
        return Text(
            "none" if summary["last_step"] is not None else "nothing has been measured yet", style="green"
        )
    table = _table(
        ("#", "right"), ("steps", ""), ("at-risk lead", "right"), ("imminent lead", "right"),
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


def _replay_lines(summary: Mapping[str, Any], say: Callable[[str], str]) -> RenderableType | None:
    """Show each replay's verdict beside the monitor's mechanism, and the result of every arm."""
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
            name = " ".join(_certain(guess["mechanism"], guess["confidence"])).strip()
            text.append(say(f" · monitor: {name}"), style="not bold")
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


def _event_table(summary: Mapping[str, Any], say: Callable[[str], str]) -> RenderableType:
    rows = summary["events"]
    tau = summary["run"].get("tau")
    if not rows:
        return Text("none", style="green")
    columns = ["kind", "severity", "steps", "mechanism, confidence", "evidence"]
    endings = any(row.get("ended") for row in rows[-_SHOWN:])
    table = _table(*((name, "") for name in [*columns, *(["then"] if endings else [])]))
    for row in rows[-_SHOWN:]:
        end = row["last_step"] if row["state"] == AlertState.RESOLVED else None
        severity = Severity(row["severity"])
        shown = [*row["evidence"]][:1] + (["loss_afterwards"] if "loss_afterwards" in row["evidence"] else [])
        evidence = ", ".join(_evidence(name, row["evidence"][name], tau) for name in shown)
        table.add_row(
            wording.kind_in_words(AlertKind(row["kind"])),
            Text(str(severity), style=SEVERITY_STYLES[severity]),
            say(_steps(row["first_step"], end)),
            say(" ".join(_certain(row["mechanism"], row["confidence"])).strip()),
            Text(say(evidence)),  # names of quantities come from a file: do not read them as markup
            *([Text(say(row.get("ended") or ""))] if endings else []),
        )
    return _with(table, _earlier(rows, say, "events"))


def _evidence(name: str, record: Mapping[str, Any], tau: float | None) -> str:
    """Show the value at the beginning, without its threshold: a table on a terminal is too narrow for both.

    Of a spike's loss, show the peak as well."""
    item = Evidence.from_json(record)
    if name == "loss":
        return f"{wording.label(name)} {wording.value_in_words(name, item)}"
    return wording.one_evidence_in_words(name, Evidence(item.value), tau)


def _phase_lines(summary: Mapping[str, Any], say: Callable[[str], str]) -> RenderableType | None:
    share = summary["phase_share"]
    if not share:
        return None
    text = Text("now ")
    text.append(summary["phase"], style=PHASE_STYLES[Phase(summary["phase"])])
    text.append(say(" · share of steps: "), style="dim")
    parts = [
        Text.assemble((str(phase), PHASE_STYLES[phase]), f" {_percent(share[str(phase)])}")
        for phase in Phase
        if str(phase) in share
    ]
    return text + Text(", ").join(parts)


def _percent(share: float) -> str:
    """Show a share in percent: 0% only for exactly 0, 100% only for exactly 1."""
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{100 * share:.3g}%"


def _quantity_table(summary: Mapping[str, Any], say: Callable[[str], str]) -> RenderableType | None:
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


def _class_line(summary: Mapping[str, Any], say: Callable[[str], str]) -> RenderableType | None:
    classes = summary["absorbing_classes"]
    if not classes:
        return None
    text = ", ".join(
        f"{wording.number(name) if isinstance(name, float) else name} ({wording.number(count)})"
        for name, count in classes[:10]
    )
    return Text(say(text + (f", and {len(classes) - 10:,} more" if len(classes) > 10 else "")))


def _note_lines(summary: Mapping[str, Any], say: Callable[[str], str]) -> RenderableType | None:
    notes = summary["notes"]
    if not notes:
        return None
    table = Table.grid(padding=(0, 1))
    table.add_column(overflow="fold", style="dim")
    table.add_column(overflow="fold")
    for note in notes[:_SHOWN]:
        table.add_row(say("·"), Text(say(f"{note['message']} (step {note['step']:,})")))
    if len(notes) > _SHOWN:
        table.add_row(say("…"), f"and {len(notes) - _SHOWN:,} more in run.json")
    return table


def _overhead_line(summary: Mapping[str, Any], say: Callable[[str], str]) -> Text:
    overhead = summary["overhead"]
    if not isinstance(overhead, dict) or overhead.get("seconds") is None:
        return Text("The monitor's overhead is unknown: the run was not closed.", style="dim")
    text = f"The monitor took {overhead['seconds']:.3g} s"
    if overhead.get("measured_steps") is not None:
        text += f" for {overhead['measured_steps']:,} measured steps"
    if overhead.get("share") is not None:
        text += f", {_percent(overhead['share'])} of the training's own time"
    return Text(say(text + "."), style="dim")


def _with(table: Table, more: Text | None) -> RenderableType:
    return table if more is None else Group(more, table)
