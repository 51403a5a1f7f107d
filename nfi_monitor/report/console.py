"""Print one line when an alert begins, becomes more or less severe, or ends, never one per step.

The lines go through a rich Console.  So they appear above a progress bar that is open on the same console.
On a terminal they wrap with a hanging indent.  In a file or a pipe each event is one line, so that
``grep nfi`` finds all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from nfi_monitor import _moved
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report import terminal, wording
from nfi_monitor.report.sink import SinkBase
from nfi_monitor.report.styles import SEVERITY_STYLES
from nfi_monitor.types import Alert, AlertKind, AlertState, Change, Note, Outcome, Phase, Severity

if TYPE_CHECKING:
    from nfi_monitor.report.summary import Summary

_INDENT = 5
_EVIDENCE = 3  # items printed, the most important first; alerts.jsonl and the report have all of them
_PHASES = {phase: rank for rank, phase in enumerate(Phase)} | {Phase.RECOVERING: -1}


class ConsoleSink(SinkBase):
    """Print alerts, notes and replays, and one line at start and close.

    ``console=None`` prints to stderr: stdout belongs to the training script.  ``quiet`` leaves out notes and
    the lines at start and close.
    """

    takes_readings = False

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console if console is not None else Console(stderr=True)
        self._quiet = quiet
        # For each firing alert, the (severity, phase, advice) that was printed last.
        self._printed: dict[str, tuple[int, int, str]] = {}
        # Warnings that came true. Their lines follow that of the slingshot, which is reported right after.
        self._came_true: list[Alert] = []

    def start(self, info: Mapping[str, Any]) -> None:
        if not self._quiet:
            self._print(Text(start_line(info), style="dim"))

    def alert(self, alert: Alert, change: Change) -> None:
        if change is Change.END and alert.outcome is Outcome.SLINGSHOT:
            self._printed.pop(alert.id, None)
            self._came_true.append(alert)
            return
        if alert.kind is not AlertKind.SLINGSHOT:
            self._print_came_true()
        self._print_change(alert, change)
        self._print_came_true()

    def _print_came_true(self) -> None:
        alerts, self._came_true = self._came_true, []
        for alert in alerts:
            self._print_end(alert)

    def _print_change(self, alert: Alert, change: Change) -> None:
        advice = alert.advice[0] if alert.advice else ""
        now = (alert.severity.rank, _PHASES[alert.phase], advice)
        before = self._printed.get(alert.id)
        if change is Change.END or alert.state is AlertState.RESOLVED or alert.outcome is Outcome.OPEN:
            self._printed.pop(alert.id, None)
            self._print_end(alert)
            return
        if before is not None and now[0] < before[0]:
            self._printed[alert.id] = now
            if alert.severity is not Severity.INFO:
                self._print_alert(alert, str(alert.severity).upper(), wording.lowered_in_words(alert))
            return
        if before is not None and now[0] <= before[0] and now[1] <= before[1]:
            return
        # before is None also at an UPDATE in a resumed run: the earlier run has printed its BEGIN
        self._printed[alert.id] = now
        self._print_alert(alert, str(alert.severity).upper(), wording.alert_in_words(alert, _EVIDENCE))
        if advice and (before is None or advice != before[2]):
            style = SEVERITY_STYLES[alert.severity]
            self._print(Text.assemble(("→ ", style), advice), indent=True)

    def _print_end(self, alert: Alert) -> None:
        """Print the line of an alert that has ended, or that still fires when the run ends."""
        headline = wording.headline(alert)
        for words in (wording.HAPPENED, wording.STILL_FIRING):
            if headline.startswith(words):
                style = SEVERITY_STYLES[alert.severity]
                self._print_alert(alert, words.rstrip(), headline.removeprefix(words), style)
                return
        self._print_alert(alert, "resolved", headline, "green")

    def _print_alert(self, alert: Alert, word: str, text: str, style: str = "") -> None:
        """Print ``step N  WORD  TEXT``. Without a ``style``, the alert fires: the text's start is bold."""
        over = bool(style)
        style = style or SEVERITY_STYLES[alert.severity]
        line = Text.assemble(("step ", "dim"), f"{alert.last_step:,}  ", (word, style))
        line.append(" " if word.endswith(":") else "  ")
        head, *rest = text.split(" · ")
        line.append(head, style="" if over else "bold")
        for part in rest:
            line.append(" · ", style="dim").append(part)
        self._print(line)

    def note(self, note: Note) -> None:
        self._print_came_true()
        if not self._quiet:
            self._print(Text(f"note: {note.message}", style="dim"))

    def replay(self, verdict: ReplayVerdict) -> None:
        self._print_came_true()
        what = verdict.slingshot or "no slingshot"
        line = Text.assemble((f"replay of {what}", "cyan"), f" from step {verdict.snapshot_step:,}  ")
        line.append(wording.replay_in_words(verdict), style="bold")
        self._print(line)

    def close(self, info: Mapping[str, Any], summary: Summary) -> None:
        self._print_came_true()  # on_alert may have closed the monitor before the slingshot's line
        run_dir = info.get("run_dir")
        if run_dir and not self._quiet:
            self._print(Text(f"run directory: {run_dir}", style="dim"))

    def _print(self, text: Text, indent: bool = False) -> None:
        console = self.console
        shown = terminal.cleaner(console.options.ascii_only)
        prefix = Text(" " * _INDENT) if indent else Text("nfi  ", style="bold")
        text = _each(text, lambda part: shown(part.replace("\n", " ")))
        if not console.is_terminal:
            with terminal.raising_broken_pipe(console):
                console.print(prefix + text, soft_wrap=True, highlight=False)
            return
        lines = text.wrap(console, max(console.width - _INDENT, 20))
        whole = Text("\n").join(
            (Text(" " * _INDENT) if number else prefix) + line for number, line in enumerate(lines)
        )
        # Print once: between two prints, another thread or a Live refresh could write.
        with terminal.raising_broken_pipe(console):
            console.print(whole, soft_wrap=True, highlight=False)


def start_line(info: Mapping[str, Any]) -> str:
    """Return the line at start: the head, how often it is read, and τ, as far as they are known."""
    text = f"watching {info.get('head') or 'the head'}"
    every, interval = info.get("every"), info.get("interval")
    number = interval if isinstance(interval, int) else every
    if isinstance(number, int):
        text += ", reads every step" if number == 1 else f", reads every {_ordinal(number)} step"
        # With an interval of one step, every step is read in any case.
        text += ", and every step once something changes" if every == "auto" and number > 1 else ""
    tau = info.get("tau")
    if isinstance(tau, (int, float)):
        text += f" · time constant τ = {wording.number(float(f'{tau:.4g}'))} steps"
    return text


def _ordinal(number: int) -> str:
    """Return ``1st``, ``2nd``, ``3rd``, ``4th`` ..."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{ending}"


def _each(text: Text, change: Callable[[str], str]) -> Text:
    """Apply ``change`` to the text and keep its styles, also where the text becomes longer."""
    changed = Text(style=text.style)
    for segment in text.divide(sorted({edge for span in text.spans for edge in (span.start, span.end)})):
        changed.append(change(segment.plain), style=segment.spans[0].style if segment.spans else None)
    return changed


if not TYPE_CHECKING:  # for a type checker, any name would exist

    def __getattr__(name: str) -> Any:
        return _moved.left(__name__, name)
