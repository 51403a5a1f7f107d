"""Write alerts and the run's description as Markdown, for TensorBoard's text panels and a trainer's log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nfi_monitor.report import wording
from nfi_monitor.report.json_values import as_json
from nfi_monitor.types import Alert, AlertState, Evidence


def alert_markdown(alert: Alert) -> str:
    """Return one alert with a table of its evidence and its advice."""
    forecast = wording.forecast_in_words(alert)
    over = alert.state is AlertState.RESOLVED
    ending = wording.ending_in_words(alert)
    lines = [
        f"**{wording.headline(alert)}**",
        "",
        f"- severity: {alert.severity}, {'resolved' if over else 'firing'}, phase {alert.phase}",
        f"- steps: {alert.first_step:,}–{alert.last_step:,}",
        f"- mechanism: {wording.mechanism_in_words(alert)}",
    ]
    lines += [f"- forecast: {forecast}"] if forecast else []
    lines += [f"- then: {ending}"] if ending else []
    lines += [f"- layer: `{alert.layer}`"] if alert.layer else []
    if alert.evidence:
        value = "value at the beginning" if any(item.step for item in alert.evidence.values()) else "value"
        lines += ["", f"| quantity | {value} | threshold | baseline |", "|---|---:|---:|---:|"]
        lines += [
            _evidence_row(name, item, alert.tau) for name, item in wording.ordered_evidence(alert).items()
        ]
    if alert.advice:
        lines += ["", "What to do:", "", *(f"1. {item}" for item in alert.advice)]
    return "\n".join(lines)


def _evidence_row(name: str, item: Evidence, tau: float | None) -> str:
    cells = (wording.label(name), *wording.evidence_cells(name, item, tau))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def overview_markdown(alerts: list[Alert], earlier: int) -> str:
    """Return a table of the latest alerts, newest last. ``earlier``: number of alerts that are left out."""
    lines = ["| alert | severity | state | steps | what |", "|---|---|---|---|---|"]
    lines += [
        f"| {a.id} | {a.severity} | {a.state} | {a.first_step:,}–{a.last_step:,} | {wording.headline(a)} |"
        for a in alerts
    ]
    if earlier:
        lines += [
            "",
            f"{earlier:,} earlier alerts are not in this table: each has its own text under `nfi/alerts/`.",
        ]
    return "\n".join(lines)


def info_markdown(info: Mapping[str, Any]) -> str:
    """Return the run's description as a table, with a nested dict as ``key: value`` pairs in one cell."""
    lines = ["| | |", "|---|---|"]
    for key, value in as_json(info).items():
        if value is not None and value != [] and value != {}:
            lines.append(f"| {key.replace('_', ' ')} | {_cell(value)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return "<br>".join(f"{key.replace('_', ' ')}: {_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value)
    return str(value).replace("|", "\\|").replace("\n", " ")
