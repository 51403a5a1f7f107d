"""List the monitors that are open in this process, without importing the class Monitor.

A replay pauses the monitors of its model, and a remedy reads the step from one.  An adapter closes a monitor
that an interrupted run has left open.
"""

from __future__ import annotations

import os
import weakref
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn


class OpenMonitor(Protocol):
    """The methods of a monitor that callers of this module use."""

    @property
    def step(self) -> int:
        """Optimizer steps seen so far."""
        ...

    @property
    def closed(self) -> bool:
        """Whether the monitor has detached."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Ignore forward passes, steps and losses inside a block."""
        ...

    def watches(self, model: nn.Module, optimizer: Any) -> bool:
        """Return whether the monitor watches this optimizer, or the head of this model."""
        ...

    def close(self) -> None:
        """Detach the monitor."""
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
    """Remove every monitor in a forked process, which inherits them but does not run their training."""
    _OPEN.clear()
    _WATCHED.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
