"""Define a sink, which gets the monitor's readings, alerts, notes and replays: base class and type."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.types import Alert, Change, Note, Phase, Reading

if TYPE_CHECKING:
    from nfi_monitor.report.summary import Summary


_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR}


def passing(error: BaseException) -> bool:
    """Return whether an error shows a shortage that may be over soon: of file handles, or of memory."""
    return isinstance(error, OSError) and error.errno in _PASSING


class SinkBase:
    """Receive readings and alerts of a run. Override the methods you need; each does nothing by default.

        class Pager(SinkBase):
            def alert(self, alert, change):
                ...

        Monitor(model, optimizer, sinks=[Pager()])

    All methods run in the training's process, on rank 0 only.  A sink may raise: the monitor catches the
    exception, says so once, drops the sink and goes on.  It does not call :meth:`close` then, so a sink that
    holds a file closes it before it raises.  The message has to say what to do.  A sink is not dropped after
    an OSError that is :func:`passing`, such as a shortage of file handles.  A sink needs not inherit from
    this class: the monitor calls the methods that an object has."""

    takes_readings: bool = True
    """Set this to False if :meth:`reading` does nothing.  Where each sink takes no readings, or overrides
    :meth:`losses`, the monitor judges uneventful losses a few at a time, which is cheaper.  It is read once,
    when the first reading is due."""

    reopens: bool = False
    """Set this to True if the sink must be started again after an error that is :func:`passing`."""

    def start(self, info: Mapping[str, Any]) -> None:
        """Open the sink. Called once, at attach; ``info`` is what ``run.json`` will hold."""

    def reading(self, reading: Reading, phase: Phase) -> None:
        """Take the numbers of one measured optimizer step, and the phase after it."""

    def losses(self, losses: Sequence[tuple[int, float]], phase: Phase) -> None:
        """Take the uneventful losses of steps that were not read, as (step, loss), oldest first.

        Override this if they may come together: up to 32, up to a tenth of a second late, and before the next
        :meth:`reading`.  Else each comes to :meth:`reading` at its own step.
        """

    def alert(self, alert: Alert, change: Change) -> None:
        """Take an alert that begins, changes in a way worth a line, or ends.

        ``alert.last_step`` is the step of this change.  An alert that fires when the run closes does not end:
        it comes once more, as an UPDATE with ``outcome`` OPEN.  An UPDATE may also have a lower severity.
        """

    def note(self, note: Note) -> None:
        """Take a note: something that the monitor cannot see. Called once for each."""

    def replay(self, verdict: ReplayVerdict) -> None:
        """Take the result of one replay of a slingshot."""

    def went_back(self) -> None:
        """Prepare to get steps again: the run went back to an earlier step.

        Implement this if the sink stores data: later records replace earlier ones of the same steps.  A sink
        that only appends marks the place, as the run directory does with a ``session`` number.
        """

    def close(self, info: Mapping[str, Any], summary: Summary) -> None:
        """Close the sink. Called once; ``info`` may have grown since :meth:`start` (notes, overhead)."""


class Sink(Protocol):
    """The type of a complete sink, for type checkers; :class:`SinkBase` documents the methods."""

    def start(self, info: Mapping[str, Any]) -> None: ...
    def reading(self, reading: Reading, phase: Phase) -> None: ...
    def alert(self, alert: Alert, change: Change) -> None: ...
    def note(self, note: Note) -> None: ...
    def replay(self, verdict: ReplayVerdict) -> None: ...
    def close(self, info: Mapping[str, Any], summary: Summary) -> None: ...
