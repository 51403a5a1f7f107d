"""List the monitors that are open in this process (:func:`open_monitors`), without importing their class.

A replay pauses the monitors of its model, and a remedy reads the step from one.  An adapter closes a monitor
that an interrupted run has left open.
"""

from __future__ import annotations

import itertools
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


_OPEN: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Number → monitor, in the order in which they were attached."""
_WATCHED: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
"""Number of a monitor → the module that it watches. No keys: a module may have an ``__eq__`` of its own."""
_NUMBERS = itertools.count()


def register(monitor: OpenMonitor, module: nn.Module) -> None:
    """Add an open monitor. ``module``: its head, or its model where it has no head."""
    number = next(_NUMBERS)
    _OPEN[number], _WATCHED[number] = monitor, module


def unregister(monitor: OpenMonitor, module: nn.Module) -> None:
    """Remove a monitor that closes. Removing it again does nothing."""
    for number in [number for number, one in list(_OPEN.items()) if one is monitor]:
        _OPEN.pop(number, None)
        _WATCHED.pop(number, None)


def watcher(module: nn.Module) -> Any:
    """Return the open monitor that was registered with this module, or None."""
    numbers = [number for number, one in list(_WATCHED.items()) if one is module]
    return next((_OPEN[number] for number in reversed(numbers) if number in _OPEN), None)


def open_monitors(model: nn.Module | None = None, optimizer: Any = None) -> list[Any]:
    """Return the open monitors of this process, oldest first; those of a model or an optimizer, if given.

    A monitor stays open until ``close()``, also if no variable holds it any more. For example, after an
    exception in a notebook's cell: ``for monitor in nfi_monitor.open_monitors(): monitor.close()``.
    """
    found = list(_OPEN.values())
    if model is None and optimizer is None:
        return found
    return [one for one in found if one.watches(nn.Module() if model is None else model, optimizer)]


def _forget_all() -> None:
    """Remove every monitor in a forked process, which inherits them but does not run their training."""
    _OPEN.clear()
    _WATCHED.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
