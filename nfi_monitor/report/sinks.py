"""Call all sinks. Drop a sink that fails; the others go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report.sink import Sink, SinkBase, passing
from nfi_monitor.signal_handlers import raised_by_signal_handler
from nfi_monitor.types import Alert, Change, Note, Phase, Reading

if TYPE_CHECKING:
    from rich.console import Console

    from nfi_monitor.report.summary import Summary


def open_sinks(
    console: bool | Console | None,
    run_dir: str | PathLike[str] | None,
    describe: Callable[[], Mapping[str, Any]] | None = None,
) -> list[Sink]:
    """Return the sinks of a monitor's ``console`` and ``run_dir``.

    ``describe`` returns the run's description as it is when it is called.
    """
    sinks: list[Sink] = []
    if console is not False and console is not None:
        from nfi_monitor.report.console import ConsoleSink

        sinks.append(ConsoleSink(None if console is True else console))
    if run_dir is not None:
        from nfi_monitor.report import tensorboard
        from nfi_monitor.report.run_directory.lock import DirectoryLock
        from nfi_monitor.report.run_directory.writer import RunDirectory

        owner = object()  # the monitor: another one of this process is refused, as another process is
        sinks.append(RunDirectory(run_dir, lock=DirectoryLock(run_dir, owner)))
        if tensorboard.available():
            lock = DirectoryLock(run_dir, owner)
            sinks.append(tensorboard.TensorBoardSink(run_dir, describe=describe, lock=lock))
    return sinks


TRY_AGAIN = 1.0
"""Seconds between two attempts to start a sink again."""
_METHODS = ("start", "reading", "losses", "alert", "note", "replay", "went_back", "close")


class Sinks:
    """Call a method of every sink that has it; drop a sink that raises, and call ``failed(name, error)``.

    After an error that is :func:`~nfi_monitor.report.sink.passing`, the sink stays, and ``missed(name,
    error)`` is called: this call was in vain, and the next is tried.
    """

    def __init__(
        self,
        sinks: list[Sink],
        failed: Callable[[str, BaseException], None],
        missed: Callable[[str, BaseException], None] | None = None,
    ) -> None:
        self.sinks = sinks
        self._failed, self._missed = failed, missed or failed
        self._info: Mapping[str, Any] = {}
        self._unopened: list[Sink] = []  # to be started again
        self._try_at = 0.0
        self._resolved: list[Sink] = []
        self._methods: dict[str, list[tuple[Sink, Callable[..., None]]]] = {}
        self._listening = False
        self._waiting: list[tuple[str, BaseException]] | None = None

    @property
    def listening(self) -> bool:
        """True if at least one sink takes each loss at its own step."""
        if self._resolved != self.sinks:
            self._resolve()
        return self._listening

    def start(self, info: Mapping[str, Any]) -> None:
        # Report errors when all sinks are open: the report is a note, which the others get.
        self._info = info
        waiting: list[tuple[str, BaseException]] = []
        self._waiting = waiting
        self._each("start", info)
        self._waiting = None
        for name, error in waiting:
            (self._missed if passing(error) else self._failed)(name, error)

    def reading(self, reading: Reading, phase: Phase) -> None:
        self._each("reading", reading, phase)

    def losses(self, losses: Sequence[tuple[int, float]], phase: Phase) -> None:
        if losses:
            self._each("losses", losses, phase)

    def alert(self, alert: Alert, change: Change) -> None:
        self._each("alert", alert, change)

    def note(self, note: Note) -> None:
        self._each("note", note)

    def replay(self, verdict: ReplayVerdict) -> None:
        self._each("replay", verdict)

    def went_back(self) -> None:
        self._each("went_back")

    def close(self, info: Mapping[str, Any], summary: Summary) -> None:
        """Close every sink, also if Ctrl-C interrupts one: that one stays, and the interrupt is raised."""
        self._resolve()
        interrupt: BaseException | None = None
        for sink, call in self._methods.get("close", ()):
            try:
                call(info, summary)
            except BaseException as raised:
                if not isinstance(raised, Exception) or raised_by_signal_handler(raised):
                    interrupt = interrupt or raised
                else:
                    self._drop(sink, raised)
            else:
                self.sinks[:] = [one for one in self.sinks if one is not sink]  # it may be dropped already
        if interrupt is not None:
            raise interrupt
        # A later failure (of an Autopilot whose run goes on) reaches no sink: the files are closed, and
        # another run may use the directory.
        self.sinks.clear()
        self._resolve()  # a sink may hold a framework's trainer, and with it the model

    def _each(self, method: str, *arguments: Any) -> None:
        if self._resolved != self.sinks:
            self._resolve()
        # If a sink is dropped, _resolve makes new lists; the list of this loop does not change.
        for sink, call in self._methods.get(method, ()):
            if self._unopened and method != "start" and not self._is_open(sink):
                continue
            self._call(sink, call, *arguments)

    def _call(self, sink: Sink, call: Callable[..., None], *arguments: Any) -> bool:
        try:
            call(*arguments)
            return True
        except Exception as error:
            if raised_by_signal_handler(error):
                raise
            if not passing(error):
                self._drop(sink, error)
                return False
            starting = getattr(call, "__name__", "") == "start"
            if (starting or getattr(sink, "reopens", False)) and not _is_in(sink, self._unopened):
                self._unopened.append(sink)
                self._try_at = time.monotonic() + TRY_AGAIN
            self._report(sink, error, self._missed)
            return False

    def _is_open(self, sink: Sink) -> bool:
        """Return whether a sink is started; try to start it again from time to time."""
        if not _is_in(sink, self._unopened):
            return True
        now = time.monotonic()
        if now < self._try_at:
            return False
        self._try_at = now + TRY_AGAIN
        opened = self._call(sink, sink.start, self._info)
        if opened or not _is_in(sink, self.sinks):
            self._unopened[:] = [one for one in self._unopened if one is not sink]
        return opened

    def _resolve(self) -> None:
        """Look up once which methods the sinks have: every measured step calls them."""
        methods: dict[str, list[tuple[Sink, Callable[..., None]]]] = {}
        broken: list[tuple[Sink, Exception]] = []
        listening = False
        for sink in self.sinks:
            try:
                found = {name: getattr(sink, name, None) for name in _METHODS}
                takes_readings = bool(getattr(sink, "takes_readings", callable(found["reading"])))
                listening |= takes_readings and not _takes_losses(sink)
            except Exception as error:  # a property that raises
                broken.append((sink, error))
                continue
            for name, method in found.items():
                if callable(method):
                    methods.setdefault(name, []).append((sink, method))
        self._methods, self._listening, self._resolved = methods, listening, list(self.sinks)
        for sink, reason in broken:
            self._drop(sink, reason)

    def _drop(self, sink: Sink, error: BaseException) -> None:
        # Drop the sink first: ``failed`` calls the sinks that are left.
        self.sinks[:] = [one for one in self.sinks if one is not sink]
        self._report(sink, error, self._failed)

    def _report(self, sink: Sink, error: BaseException, say: Callable[[str, BaseException], None]) -> None:
        if self._waiting is None:
            say(type(sink).__name__, error)
        else:
            self._waiting.append((type(sink).__name__, error))


def _takes_losses(sink: Sink) -> bool:
    """Return whether the sink has a method of its own for losses that come together."""
    method = getattr(type(sink), "losses", None)
    return callable(method) and method is not SinkBase.losses


def _is_in(sink: Sink, sinks: list[Sink]) -> bool:
    return any(one is sink for one in sinks)


def check_sink(sink: Any) -> None:
    """Raise TypeError for a class, and for an object that has no method of a sink."""
    if isinstance(sink, type):
        raise TypeError(f"sinks needs objects, got the class {sink.__name__}: sinks=[{sink.__name__}(...)].")
    if not any(_has(sink, method) for method in _METHODS):
        raise TypeError(
            f"{type(sink).__name__} in sinks has none of the methods {', '.join(_METHODS)}: inherit from "
            "nfi_monitor.SinkBase and override those that it needs."
        )


def _has(sink: Any, method: str) -> bool:
    try:
        return callable(getattr(sink, method, None))
    except Exception:  # a property that raises: the sink is dropped later, with a note
        return True
