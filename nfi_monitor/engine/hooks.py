"""Keep all hooks of one monitor together, and its pauses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nfi_monitor.capture.model_hooks import ForwardHook
from nfi_monitor.capture.step_hooks import StepHooks


class RunHooks:
    """The hooks of one monitor: around the optimizer's step, and on modules of the model.

    The arguments are those of :class:`~nfi_monitor.capture.step_hooks.StepHooks`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[Sequence[Any]], None],
        after: Callable[[], None],
        failed: Callable[[str, BaseException], None],
    ) -> None:
        self.step = StepHooks(optimizer, before, after, failed)
        self._forward: list[ForwardHook] = []
        self._others: list[Any] = []

    def add(self, module: nn.Module, hook: Any) -> None:
        """Register a forward hook (a :class:`~nfi_monitor.capture.model_hooks.ModelHook`) on a module."""
        # Keep it before it is registered: Ctrl-C in between must not leave a hook that nobody removes.
        added = ForwardHook(module, hook)
        self._forward.append(added)
        added.register()

    def drop(self, hook: Any) -> None:
        """Remove a hook of :meth:`add`. Not while its module is being called: torch cannot do that."""
        for added in [one for one in self._forward if one.hook is hook]:
            added.remove()
            self._forward.remove(added)

    def keep(self, handle: Any) -> None:
        """Remove ``handle``, which has a method ``remove``, with the hooks on modules."""
        self._others.append(handle)

    def is_on(self, module: nn.Module) -> bool:
        """Return whether one of the hooks is still registered on ``module``."""
        return any(hook.is_on(module) for hook in self._forward)

    def remove_forward(self) -> None:
        """Remove the hooks on modules. A second call does nothing."""
        while self._others:
            self._others[-1].remove()
            self._others.pop()
        while self._forward:
            self._forward[-1].remove()
            self._forward.pop()


class Pauses(set[object]):
    """Hold the open ``paused()`` blocks: true while there is one. ``left_out(seconds)`` follows the last.

    A block that Ctrl-C interrupts anywhere is closed all the same.
    """

    def __init__(self, left_out: Callable[[float], None]) -> None:
        super().__init__()
        self._left_out = left_out

    @contextmanager
    def block(self) -> Iterator[None]:
        """Open a block for the time of a ``with`` statement."""
        started, block = time.perf_counter(), object()
        try:
            try:
                self.add(block)
                yield
            finally:
                self.discard(block)
        finally:
            self.discard(block)
            if not self:
                self._left_out(time.perf_counter() - started)
