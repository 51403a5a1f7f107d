"""Add and remove hooks around an optimizer's step, also while a step is running.

torch iterates over the dictionary of an optimizer's hooks.  If a hook adds or removes another one (a
cool-down ends, an alert starts a remedy), ``optimizer.step()`` raises an error.  So one pair of hooks is
registered for each optimizer, once, and stays.  It iterates over a copy of its own list.  Rejected: a new
dictionary for each change, because torch's handles refer to the old one and could not remove hooks any more.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from nfi_monitor._moved import left
from nfi_monitor.registry import open_monitors
from nfi_monitor.replay.replayed_step import REPLAY, acts

Hook = Callable[[Optimizer], None]
_STEPS: weakref.WeakKeyDictionary[Optimizer, _Steps] = weakref.WeakKeyDictionary()


def around_steps(
    optimizer: Optimizer, before: Hook | None = None, after: Hook | None = None
) -> Callable[[], None]:
    """Call ``before(optimizer)`` and ``after(optimizer)`` around each step. Returns a function that stops it.

    Of several pairs, the ``after`` functions run in reverse order, so that the last change is undone first.
    This may be called inside a step, unless it is the first pair on an optimizer with other hooks after the
    running one.
    """
    steps = _STEPS.get(optimizer)
    if steps is None:
        steps = _STEPS[optimizer] = _Steps(optimizer)
    key = object()
    steps.pairs[key] = step_now(optimizer), before, after
    return lambda: steps.take_off(key)


def hooks_on(optimizer: Optimizer) -> int:
    """Return the number of pairs of hooks on ``optimizer``."""
    steps = _STEPS.get(optimizer)
    return 0 if steps is None else len(steps.pairs)


class _Steps:
    """Call the pairs of one optimizer. It has no reference to the optimizer, which references it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.pairs: dict[object, tuple[int | None, Hook | None, Hook | None]] = {}
        before, after = self._before, self._after
        if "torch._dynamo" in sys.modules:  # a compiled step must not trace a list that changes
            before, after = torch.compiler.disable(before), torch.compiler.disable(after)
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def take_off(self, key: object) -> None:
        self.pairs.pop(key, None)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for since, before, _ in list(self.pairs.values()):
            if before is not None and (REPLAY.step is None or acts(since)):
                before(optimizer)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for since, _, after in reversed(list(self.pairs.values())):
            if after is not None and (REPLAY.step is None or acts(since)):
                after(optimizer)


def step_now(optimizer: Optimizer | None, head: nn.Module | None = None) -> int | None:
    """Return the last optimizer step that an open monitor has counted; None without such a monitor."""
    watching = [] if head is None and optimizer is None else open_monitors(head, optimizer)
    return int(watching[0].step) if watching else None


if not TYPE_CHECKING:  # for a type checker, any name would exist

    def __getattr__(name: str) -> Any:
        return left(__name__, name)
