"""Check the arguments of a monitor before it attaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor.alert_handler import AlertHandler
from nfi_monitor.caller import by_adapter, call_with
from nfi_monitor.capture.foreign_optimizer import ForeignOptimizer
from nfi_monitor.capture.head import Head, find_head
from nfi_monitor.capture.names import HeadLike
from nfi_monitor.capture.unwrap import choose, trained, watchable
from nfi_monitor.errors import AlreadyMonitoredError, HeadNotFoundError
from nfi_monitor.ranks import processes
from nfi_monitor.registry import watcher
from nfi_monitor.replay.snapshots import check_stateful
from nfi_monitor.report.sink import Sink
from nfi_monitor.report.sinks import check_sink
from nfi_monitor.safe_open import absolute
from nfi_monitor.types import Alert, Thresholds

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Options:
    """The keyword arguments of :class:`nfi_monitor.Monitor`, checked by :meth:`check`."""

    head: HeadLike | bool | None
    run_dir: str | PathLike[str] | None
    console: bool | Console | None
    on_alert: Callable[[Alert], None] | None
    probe: tuple[Any, Tensor] | None
    thresholds: Thresholds | None
    every: int | str
    overhead_budget: float | None
    snapshots: int | str | bool
    stateful: Any
    sinks: Sequence[Sink]
    group: Any

    def __post_init__(self) -> None:
        """Make ``run_dir`` absolute: the run stays there when the working directory changes."""
        if self.run_dir is not None:
            path = absolute(self.run_dir)
            object.__setattr__(self, "run_dir", str(path) if isinstance(self.run_dir, str) else path)

    def check(self, model: nn.Module) -> None:
        """Raise TypeError or ValueError, saying what to pass instead, for an argument of the wrong kind."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"Monitor needs a torch.nn.Module, got {type(model).__name__}.")
        every, budget = self.every, self.overhead_budget
        if not (every == "auto" or (isinstance(every, int) and not isinstance(every, bool) and every >= 1)):
            raise ValueError(f'every={every!r}: use "auto" or a number of optimizer steps ≥ 1.')
        if budget is not None and not (isinstance(budget, (int, float)) and 0 < budget < math.inf):
            raise ValueError(f"overhead_budget={budget!r}: use a share such as 0.01, or None.")
        if self.head is True:
            raise ValueError(
                "head=True is no head: name the module, or leave head= out and the monitor finds it."
            )
        listed = self.head if isinstance(self.head, (list, tuple)) else [self.head]
        if not all(one is None or isinstance(one, (nn.Module, nn.Parameter, str, bool)) for one in listed):
            raise TypeError(
                f"head={type(self.head).__name__} is no head: pass a module, a parameter, the qualified name "
                f"of one, or a list of these: {call_with('head=...')}."
            )
        if self.thresholds is not None and not isinstance(self.thresholds, Thresholds):
            raise TypeError(f"thresholds must be a Thresholds(...), got {type(self.thresholds).__name__}.")
        if self.probe is not None and not (isinstance(self.probe, (tuple, list)) and len(self.probe) == 2):
            raise ValueError("probe must be a pair (inputs, targets).")
        if self.on_alert is not None and not callable(self.on_alert):
            raise TypeError(f"on_alert must be callable, got {type(self.on_alert).__name__}.")
        if isinstance(self.on_alert, AlertHandler) and type(self.on_alert).__call__ is AlertHandler.__call__:
            raise TypeError(f"{type(self.on_alert).__name__} must define __call__(alert).")
        if not isinstance(self.sinks, Sequence):
            raise TypeError(f"sinks must be a list, got {type(self.sinks).__name__}: sinks=[it].")
        for sink in self.sinks:
            check_sink(sink)
        limit = self.snapshot_limit
        if not (limit == "auto" or (type(limit) is int and limit >= 0)):
            raise ValueError(f'snapshots={limit!r}: use "auto", False, or bytes that they may take.')
        if not isinstance(self.stateful, Sequence):
            name = type(self.stateful).__name__
            raise TypeError(f"stateful must be a list, got {name}: stateful=[it].")
        for one in self.stateful:
            check_stateful(one)
        processes.check_group(self.group)

    @property
    def snapshot_limit(self) -> int | str:
        """Bytes that all snapshots may take together, or "auto"; 0 keeps none."""
        return 0 if self.snapshots is False else self.snapshots


def find_watched(
    model: nn.Module, optimizer: Any, head: HeadLike | bool | None
) -> tuple[Head | None, Optimizer]:
    """Return the head to watch and the optimizer that trains it, without wrappers.

    A model in which no head is found is watched without one.  Raises AlreadyMonitoredError if an open monitor
    watches that head (or that model, if it has no head).  Raises HeadNotFoundError for a named head that the
    model lacks, and the errors of :func:`~nfi_monitor.capture.unwrap.watchable`.
    """
    try:
        several = watchable(optimizer)
    except TypeError:
        if not by_adapter():
            raise
        several = [cast(Optimizer, ForeignOptimizer(optimizer))]  # a note says that it makes no steps
    found = None
    if not isinstance(head, bool):
        parameters = set().union(*map(trained, several))
        try:
            found = find_head(model, head, parameters)
        except HeadNotFoundError:
            if head is not None:
                raise
    chosen = choose(several, found)
    earlier = watcher(model if found is None else found.module)
    if earlier is not None:
        where = found.describe() if found is not None else type(model).__name__
        raise AlreadyMonitoredError(
            f"{where} is already watched by an open monitor, at step {earlier.step}: one monitor sees "
            "everything that two would see. Close it first: monitor.close(), or leave its with block. If no "
            "variable holds it any more: for monitor in nfi_monitor.open_monitors(): monitor.close(). This "
            "error's attribute 'monitor' is that monitor.",
            earlier,
        )
    return found, chosen
