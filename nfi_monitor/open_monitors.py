"""The monitors that are open in this process, for whatever trains, replays or attaches beside them.

A replay pauses the monitors of its model, a remedy asks one of them for the step, an adapter closes what an
interrupted run has left open.  None of these has to know the class :class:`nfi_monitor.Monitor` for it.
"""

from __future__ import annotations

import os
import weakref
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn


class OpenMonitor(Protocol):
    """What a monitor offers to those that found it here."""

    @property
    def step(self) -> int:
        """Optimizer steps seen so far."""
        ...

    @property
    def closed(self) -> bool:
        """Whether it has detached."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Ignore forwards, steps and losses while this is open."""
        ...

    def watches(self, model: nn.Module, optimizer: Any) -> bool:
        """Return whether it would take steps of this optimizer or of this model for the run's."""
        ...

    def close(self) -> None:
        """Detach."""
        ...


_OPEN: weakref.WeakSet[Any] = weakref.WeakSet()
_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def register(monitor: OpenMonitor, module: nn.Module) -> None:
    """Add an open monitor. ``module``: its head, or its model where it has no head."""
    _WATCHED.add(module)
    _OPEN.add(monitor)


def unregister(monitor: OpenMonitor, module: nn.Module) -> None:
    """Remove a monitor that closes. Removing it again does nothing."""
    _WATCHED.discard(module)
    _OPEN.discard(monitor)


def is_watched(module: nn.Module) -> bool:
    """Return whether an open monitor was registered with this module."""
    return module in _WATCHED


def open_monitors(model: nn.Module, optimizer: Any) -> list[Any]:
    """Return the open monitors (:class:`OpenMonitor`) of this model or of this optimizer."""
    return [monitor for monitor in _OPEN if monitor.watches(model, optimizer)]


def _forget_all() -> None:
    """Forget every monitor: a forked process has inherited them, but what it runs is not their run."""
    _OPEN.clear()
    _WATCHED.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
