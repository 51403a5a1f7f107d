"""Run ``nfi-monitor report``: print the after-run report of a run directory, and draw its figure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfi_monitor.cli.output import console_for, fail, say
from nfi_monitor.report.terminal import escape_controls

if TYPE_CHECKING:
    from rich.console import Console

    from nfi_monitor.report.run_directory.reader import RunRecord

_EXPLAINED = 20  # explanations printed under a report; --explain prints any other


def run(options: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    from nfi_monitor.report.run_directory.files import RunDirectoryError
    from nfi_monitor.report.run_directory.reader import read_run
    from nfi_monitor.report.summary import summarize

    try:
        record = read_run(options.run)
    except RunDirectoryError as error:
        return fail(error)
    if options.explain is not None:
        return _explain(options, record)
    summary = summarize(
        record.info, record.history, record.phases, record.alerts, record.notes, record.replays
    )
    console = console_for(stderr=options.json)
    if options.json:
        print(json.dumps(summary, allow_nan=False, indent=2))
    else:
        console.print(summary)
        _print_explanations(console, record)
    for problem in record.problems:
        say(console, f"note: {problem}", style="yellow")
    if options.no_figure or (options.json and not options.figure):
        return 0

    from nfi_monitor.report.figure import draw

    path = Path(options.figure) if options.figure else Path(options.run) / "report.png"
    try:
        thresholds = record.info.get("thresholds")
        draw(
            record.history, record.phases, record.alerts, path,
            title=_title(record.info), thresholds=thresholds if isinstance(thresholds, dict) else None,
        )  # fmt: skip
    except ImportError as error:
        say(console, f"no figure: {error}", style="yellow")
    except Exception as error:  # a full disk, a suffix or a number that matplotlib cannot draw
        message = f"cannot write the figure {path}: {error}. Pass another path with --figure."
        if options.figure:
            return fail(message)
        say(console, f"no figure: {message}", style="yellow")  # the run directory may be read-only
    else:
        say(console, f"figure: {path}")
    return 0


def _explain(options: argparse.Namespace, record: RunRecord) -> int:
    """Run ``report RUN --explain ID``: print one explanation, and draw no figure."""
    from nfi_monitor.report.explain.compose import explain_run

    parts = (record.info, record.history, record.phases, record.alerts, record.notes)
    try:
        (explanation,) = explain_run(*parts, options.explain)
    except ValueError as error:
        return fail(error)
    if options.json:
        print(json.dumps(explanation.to_json(), allow_nan=False, indent=2))
    else:
        console_for().print(explanation)
    for problem in record.problems:
        say(console_for(stderr=True), f"note: {problem}", style="yellow")
    return 0


def _print_explanations(console: Console, record: RunRecord) -> None:
    """Print the explanations under the summary: every slingshot, and the last alert that still fires."""
    from rich.text import Text

    from nfi_monitor.report.explain.compose import explain_run, worth_explaining

    parts = (record.info, record.history, record.phases, record.alerts, record.notes)
    explanations = explain_run(*parts, last=_EXPLAINED)
    if explanations:
        console.print(Text("\nExplanations", style="bold"))
    earlier = [alert.id for alert in worth_explaining(record.alerts)[:-_EXPLAINED]]
    if earlier:
        known = ", ".join(earlier[-_EXPLAINED:])
        more = f"{len(earlier) - _EXPLAINED:,} more and " if len(earlier) > _EXPLAINED else ""
        say(console, f"earlier ones: {more}{known} (nfi-monitor report RUN --explain ID)", style="dim")
    for explanation in explanations:
        console.print(explanation)


def _title(info: dict[str, Any]) -> str:
    optimizer = info.get("optimizer")
    name = optimizer.get("name") if isinstance(optimizer, dict) else optimizer
    parts = [str(part) for part in (info.get("model"), name, info.get("dtype")) if part]
    return escape_controls(" · ".join(parts))
