"""Look for the ranks that train together until the first optimizer step.

A framework may wrap the model in DistributedDataParallel after the monitor is attached, and around the model
that the monitor knows.  The wrapper is then found while its forward pass runs, or an adapter names it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from nfi_monitor.capture.head import Head
from nfi_monitor.capture.inert_hook import InertInCopies
from nfi_monitor.engine.faults import Faults
from nfi_monitor.engine.schedule import Schedule
from nfi_monitor.ranks.membership import Membership


class RankSearch:
    """Find the other ranks for ``membership``; a budget in seconds has no meaning with several ranks."""

    def __init__(
        self,
        membership: Membership,
        schedule: Schedule,
        faults: Faults,
        watched: tuple[nn.Module, Optimizer, Head | None],
    ) -> None:
        self._membership, self._schedule, self._faults = membership, schedule, faults
        self._model, self._optimizer, self._head = watched
        self._handle: Any = None

    @property
    def open(self) -> bool:
        """Whether ranks are still looked for."""
        return self._membership.searching and self._membership.exchange is None

    def begin(self) -> str | None:
        """Look for the ranks when the monitor attaches; return the reason if that failed."""
        apart = self._look(self._model)
        if self.open and self._membership.processes > 1:
            look = InertInCopies(lambda module, kwargs, output: self.again(), self._faults.failed)
            self._handle = self._model.register_forward_hook(look, with_kwargs=True)
        return apart

    def again(self, model: nn.Module | None = None) -> None:
        """Look again, in ``model`` if it is given: the watched model with the wrappers around it."""
        if self.open:
            with self._faults.guarded("ranks"):
                apart = self._look(self._model if model is None else model)
                self._membership.share_head(self._head, apart)

    def end(self) -> None:
        """Stop looking: the first optimizer step begins. Note if other processes were not found."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.again()
        if self.open:
            self._membership.none_found()

    def watch(self, head: Head | None) -> bool:
        """Watch another head on all ranks. Returns False if they already read the present one together."""
        if not self._membership.watch(self._model, self._optimizer, head):
            return False
        self._head = head
        return True

    def _look(self, model: nn.Module) -> str | None:
        apart = self._membership.find(model, self._optimizer, self._head)
        if self._membership.exchange is not None:
            self._model = model
            self._schedule.give_up_budget()
        return apart

    def release(self) -> None:
        """Drop the model and the optimizer."""
        if self._handle is not None:
            self._handle.remove()
        del self._model, self._optimizer, self._head
