"""Stand for the loop in a copy of a monitor: a deep copy of a model or trainer that keeps its monitor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.engine.loss_queue import LossQueue
from nfi_monitor.engine.notes import NoteTaker
from nfi_monitor.errors import MonitorError
from nfi_monitor.history import History
from nfi_monitor.types import Phase, Thresholds

TEXT = (
    "This is a copy of a monitor, made with a copy of what keeps it. It is closed, watches nothing and holds "
    "no results. Use the original; for a run of the copied model, attach a monitor of its own."
)


class CopiedLoop:
    """The loop of a monitor that was copied: closed, without results, and with a note that says so.

    Calls that a training step makes do nothing. All that needs a run raises MonitorError.
    """

    closed = True
    closing = False
    endings: tuple[()] = ()
    step = 0
    run_dir = None

    def __init__(self) -> None:
        self.thresholds = Thresholds()
        self.detector = Detector(self.thresholds, RunContext())
        self.judge = SimpleNamespace(history=History(), phases=[(0, Phase.HEALTHY)])
        self.notes = NoteTaker(lambda note: None)
        self.notes.note("copied_monitor", TEXT, 0)
        self.replays: list[Any] = []
        self.recent_snapshots = SimpleNamespace(snapshots=[])
        self.losses = LossQueue(self.detector.is_unusual, self.thresholds)
        self.membership = SimpleNamespace(may_act=lambda step: False)
        self.loss_sources = _NoLosses()
        self.paused = _Unpaused()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise MonitorError(TEXT)


class _NoLosses:
    """Take a loss from any source, and do nothing with it."""

    untrained = ""

    def report(self, loss: Any) -> None:
        pass

    def end_micro_batch(self) -> None:
        pass

    @contextmanager
    def backward(self, loss: Any, *, shares: bool) -> Iterator[None]:
        yield


class _Unpaused:
    def __bool__(self) -> bool:
        return False

    @contextmanager
    def block(self) -> Iterator[None]:
        yield
