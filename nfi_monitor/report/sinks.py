"""Hand everything to all sinks; a sink that fails is dropped, and the rest go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report.sink import Sink
from nfi_monitor.types import Alert, Change, Note, Phase, Reading

if TYPE_CHECKING:
    from rich.console import Console

    from nfi_monitor.report.summary import Summary


def open_sinks(
    console: bool | Console | None,
    run_dir: str | PathLike[str] | None,
    describe: Callable[[], Mapping[str, Any]] | None = None,
) -> list[Sink]:
    """The sinks of a monitor's ``console`` and ``run_dir``; ``describe`` gives the run as it is now."""
    sinks: list[Sink] = []
    if console is not False and console is not None:
        from nfi_monitor.report.console import ConsoleSink

        sinks.append(ConsoleSink(None if console is True else console))
    if run_dir is not None:
        from nfi_monitor.report import tensorboard
        from nfi_monitor.report.run_directory.lock import DirectoryLock
        from nfi_monitor.report.run_directory.writer import RunDirectory

        sinks.append(RunDirectory(run_dir))
        if tensorboard.available():
            lock = DirectoryLock(run_dir)
            sinks.append(tensorboard.TensorBoardSink(run_dir, describe=describe, lock=lock))
    return sinks


class Sinks:
    """``failed(name, error)`` hears of each sink that raised, once: it is dropped then."""

    def __init__(self, sinks: list[Sink], failed: Callable[[str, BaseException], None]) -> None:
        self.sinks = sinks
        self._failed = failed

    @property
    def listening(self) -> bool:
        """Whether anybody does something with a reading."""
        return any(getattr(sink, "takes_readings", True) for sink in self.sinks)

    def start(self, info: Mapping[str, Any]) -> None:
        self._each("start", info)

    def reading(self, reading: Reading, phase: Phase) -> None:
        self._each("reading", reading, phase)

    def alert(self, alert: Alert, change: Change) -> None:
        self._each("alert", alert, change)

    def note(self, note: Note) -> None:
        self._each("note", note)

    def replay(self, verdict: ReplayVerdict) -> None:
        self._each("replay", verdict)

    def went_back(self) -> None:
        self._each("went_back", among=[sink for sink in self.sinks if hasattr(sink, "went_back")])

    def close(self, info: Mapping[str, Any], summary: Summary) -> None:
        self._each("close", info, summary)
        # What fails later (an Autopilot whose run goes on) is told to nobody: files are closed, and the
        # directory may be another run's by then.
        self.sinks.clear()

    def _each(self, method: str, *arguments: Any, among: list[Sink] | None = None) -> None:
        for sink in list(self.sinks) if among is None else among:
            try:
                getattr(sink, method)(*arguments)
            except Exception as error:
                # Dropped before it is reported: the report goes to the sinks that are left.
                if sink in self.sinks:
                    self.sinks.remove(sink)
                self._failed(type(sink).__name__, error)
