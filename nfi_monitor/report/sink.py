"""What the monitor tells a report, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.types import Alert, Change, Note, Phase, Reading

if TYPE_CHECKING:
    from nfi_monitor.report.summary import Summary


class Sink(Protocol):
    """A place where readings and alerts go.

    A sink may raise: the monitor catches the first exception, reports it once and lets the sink go
    quiet, so a message has to say what to do.  One that does nothing with readings may say so by an attribute
    ``takes_readings = False``: where no other listens, losses that begin nothing are judged a few at a time.
    One that keeps what it is told may have a method ``went_back()``, called where a run goes back to an
    earlier step: what comes then replaces what was told of the same steps.
    """

    def start(self, info: Mapping[str, Any]) -> None:
        """Called once, at attach, with what ``run.json`` will hold."""
        ...

    def reading(self, reading: Reading, phase: Phase) -> None:
        """Called at every measured optimizer step, with the phase after it."""
        ...

    def alert(self, alert: Alert, change: Change) -> None:
        """Called when an alert begins, changes in a way worth a line, or ends."""
        ...

    def note(self, note: Note) -> None:
        """Called once for each thing that could not be seen."""
        ...

    def replay(self, verdict: ReplayVerdict) -> None:
        """Called once for each replay of a slingshot, with what it showed."""
        ...

    def close(self, info: Mapping[str, Any], summary: Summary) -> None:
        """Called once; ``info`` may have grown since :meth:`start` (notes, overhead)."""
        ...
