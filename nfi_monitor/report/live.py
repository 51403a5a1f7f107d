"""Show a live panel in a training script: a progress bar and the key quantities.

    with LivePanel(monitor=None, total=3000) as panel:
        with Monitor(model, optimizer, console=panel.console) as panel.monitor:
            for ...:
                ...
                panel.advance()

:meth:`LivePanel.advance` redraws the panel.  A thread does not: it would read the history while the training
loop writes it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from itertools import zip_longest
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol

from rich.box import ASCII, ROUNDED
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from nfi_monitor.quantities import QUANTITIES, READING_ORDER
from nfi_monitor.report import terminal, wording
from nfi_monitor.report.styles import PHASE_STYLES, SEVERITY_STYLES
from nfi_monitor.types import Alert, AlertKind, AlertState, Phase

if TYPE_CHECKING:
    from nfi_monitor.history import History

_REFRESH_SECONDS = 1 / 8
_COLUMNS = 3
_SHOWN = [quantity.name for quantity in READING_ORDER if quantity.live]
_ROWS = [_SHOWN[start : start + _COLUMNS] for start in range(0, len(_SHOWN), _COLUMNS)]


class Watched(Protocol):
    """The part of a Monitor that the panel reads."""

    @property
    def phase(self) -> Phase: ...
    @property
    def alerts(self) -> Sequence[Alert]: ...
    @property
    def history(self) -> History: ...


class LivePanel:
    """Show a progress bar over ``total`` optimizer steps, and a monitor's key quantities below it.

    A context manager.  Give ``panel.console`` to ``Monitor(console=...)``, so that its alerts appear above
    the panel.  ``monitor`` may be set later (``panel.monitor = ...``).  If the console is not a terminal,
    nothing is drawn.
    """

    def __init__(
        self, monitor: Watched | None, total: int, console: Console | None = None, title: str = ""
    ) -> None:
        self.monitor = monitor
        self.console = console if console is not None else Console()
        self.done = 0
        self._title = title
        self._next = 0.0
        ascii_only = self.console.options.ascii_only
        self._say = terminal.cleaner(ascii_only)
        self._box = ASCII if ascii_only else ROUNDED
        # rich's own ellipsis is not ASCII.
        self._overflow: Literal["crop", "ellipsis"] = "crop" if ascii_only else "ellipsis"
        self._progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, expand=True,
        )  # fmt: skip
        self._task = self._progress.add_task(self._say(title) or "steps", total=total, start=False, rate="")
        self._live: Live | None = None

    def __enter__(self) -> LivePanel:
        self._progress.start_task(self._task)
        if self.console.is_terminal:
            self._live = Live(self._render(), console=self.console, auto_refresh=False)
            try:
                with terminal.raising_broken_pipe(self.console):
                    self._live.start()
            except BrokenPipeError:  # nobody looks
                self._live = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._refresh()
        if self._live is not None:
            with contextlib.suppress(BrokenPipeError), terminal.raising_broken_pipe(self.console):
                self._live.stop()
            self._live = None

    def advance(self, n: int = 1) -> None:
        """Count ``n`` optimizer steps, and redraw the panel at most eight times a second."""
        self.done += n
        if self._live is not None and (now := time.monotonic()) >= self._next:
            self._next = now + _REFRESH_SECONDS
            self._refresh()

    def _refresh(self) -> None:
        if self._live is None:
            return
        try:
            speed = self._progress.tasks[0].speed
            rate = (
                f"{speed:,.0f} steps/s" if speed and speed >= 10 else f"{speed:.1f} steps/s" if speed else ""
            )
            self._progress.update(self._task, completed=self.done, rate=rate)
            with terminal.raising_broken_pipe(self.console):
                self._live.update(self._render(), refresh=True)
        except Exception as error:  # a closed terminal must not end the training
            live, self._live = self._live, None
            with contextlib.suppress(Exception), terminal.raising_broken_pipe(self.console):
                live.stop()
            with contextlib.suppress(Exception), terminal.raising_broken_pipe(self.console):
                self.console.print(
                    f"nfi  the live panel is switched off: {type(error).__name__}", highlight=False
                )

    def _render(self) -> RenderableType:
        monitor = self.monitor
        body: RenderableType = Text("no monitor is attached yet", style="dim")
        border = "dim"
        if monitor is not None:
            phase = monitor.phase
            border = PHASE_STYLES[phase]
            lines: list[RenderableType] = [self._numbers(monitor)]
            alerts = monitor.alerts
            if alerts:
                lines.append(self._last_alert(alerts[-1]))
            body = Group(*lines)
        return Group(self._progress, Panel(body, box=self._box, border_style=border, padding=(0, 1)))

    def _numbers(self, monitor: Watched) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        for _ in range(1 + _COLUMNS):
            table.add_column(ratio=1, overflow="fold")
        phase = monitor.phase
        firsts = (
            Text.assemble(("phase ", "dim"), (str(phase), PHASE_STYLES[phase])),
            Text.assemble(("slingshots ", "dim"), str(self._slingshots(monitor.alerts))),
        )
        for first, names in zip_longest(firsts, _ROWS, fillvalue=()):
            table.add_row(first or "", *(self._number(monitor.history, name) for name in names))
        return table

    @staticmethod
    def _slingshots(alerts: Sequence[Alert]) -> int:
        return sum(alert.kind is AlertKind.SLINGSHOT for alert in alerts)

    def _number(self, history: History, name: str) -> Text:
        if name == "loss" and "loss" not in history:
            name = "head_loss"
        _, values = history[name]
        value = float(values[-1]) if len(values) else None
        style = "bold red" if value is not None and not math.isfinite(value) else ""
        text = self._say(wording.amount(name, value))
        return Text.assemble((self._say(_label(name)) + " ", "dim"), (text, style))

    def _last_alert(self, alert: Alert) -> Text:
        over = alert.state is AlertState.RESOLVED
        style = "green" if over else SEVERITY_STYLES[alert.severity]
        # A narrow terminal cuts off the end.
        parts = [wording.forecast_in_words(alert), wording.headline(alert)]
        return Text.assemble(
            ("last alert ", "dim"), (self._say(" · ".join(part for part in parts if part)), style),
            no_wrap=True, overflow=self._overflow,
        )  # fmt: skip


def _label(name: str) -> str:
    return QUANTITIES[name].short or wording.label(name)
