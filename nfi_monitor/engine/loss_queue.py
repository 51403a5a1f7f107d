"""Queue the losses of optimizer steps that are not read, and judge them together.

Most steps of a healthy run are not read, and their loss cannot begin an alert.  Judging such a loss at its
own step would cost more than all other work of the monitor there: the code is no longer in the CPU's
caches.  So these losses are deferred and judged together.  On an accelerator the host does not know the loss
yet: those losses stay on the device and are copied together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nfi_monitor.capture import devices
from nfi_monitor.capture.host_transfer import HostTransfer
from nfi_monitor.detect.loss_baseline import highest_usual
from nfi_monitor.types import Thresholds

TOGETHER = 32
"""Most losses that are deferred before they are judged together."""

SECONDS = 0.1
"""Longest time for which a loss is deferred.  Where a step takes longer, its loss is judged at once."""

MOST = 256
"""Most losses of one step that are kept one by one. More are added up, so that the queue cannot grow."""


class _Sums(NamedTuple):
    """``total`` of the ``finite`` ones of ``every`` losses."""

    total: Tensor | float
    finite: Tensor | int
    every: int


class LossQueue:
    """Hold losses until they are judged.

    Attributes:
        observed: losses of this step's micro-batches.
        deferred: (step, loss) of earlier steps, oldest first.
        share: None if each observed loss is a mean over its micro-batch. Else each loss is a share of the
            step's loss, which is their sum times this factor.
        averaged: number of losses of the step whose mean was asked for last.
        usual_below: a loss from 0 up to this cannot begin an alert and may be deferred; −inf: defer none.
    """

    def __init__(self, is_unusual: Callable[[int, float], bool], limits: Thresholds) -> None:
        """``is_unusual(step, loss)``, called at each step: whether the next steps must be read."""
        self._is_unusual = is_unusual
        self._limits = limits
        self._unit = 1.0
        self._lowest = math.inf  # of the deferred losses
        self._asked = self._begun = -math.inf  # time of the last step, and of the first deferred loss
        self.observed: list[Tensor | float] = []
        self.share: float | None = None
        self.averaged = 0
        self.usual_below = -math.inf
        self.deferred: list[tuple[int, float]] = []
        self._late: list[tuple[int, Tensor]] = []  # on an accelerator, not copied yet
        self._added: _Sums | None = None  # losses of this step that are no longer in ``observed``

    def observe(self, loss: Tensor | float) -> None:
        """Add the loss of a micro-batch."""
        if len(self.observed) >= MOST:
            with torch.no_grad():
                self._added = self._sums()
            self.observed.clear()
        self.observed.append(loss)

    def _sums(self) -> _Sums:
        """Return sum and number of this step's finite losses; of tensors and numbers, those of numbers."""
        numbers = [loss for loss in self.observed if not isinstance(loss, Tensor)]
        added = self._added
        if numbers or not self.observed or (added is not None and not isinstance(added.total, Tensor)):
            finite = [number for number in numbers if math.isfinite(number)]
            now = _Sums(sum(finite), len(finite), len(numbers))
        else:
            losses = self._stacked()
            usable = torch.isfinite(losses)
            now = _Sums(torch.where(usable, losses, 0.0).sum(), usable.sum(), len(losses))
        if added is None or isinstance(added.total, Tensor) != isinstance(now.total, Tensor):
            return now
        return _Sums(added.total + now.total, added.finite + now.finite, added.every + now.every)

    def _stacked(self) -> Tensor:
        """Return the mean of each observed tensor, on one device."""
        tensors = [loss.mean(dtype=_mean_dtype(loss)) for loss in self.observed if isinstance(loss, Tensor)]
        return torch.stack(devices.together(tensors))

    def defer(self, step: int) -> bool:
        """Defer an ordinary loss of a step that is not read. Returns False if it must be judged now.

        This changes no result: a loss that may begin a slingshot is judged at once.
        """
        observed, usual_below = self.observed, self.usual_below
        if usual_below < 0:
            return False
        if not observed:
            return True
        loss = observed[0]
        if len(observed) > 1 or self._added or self.share is not None or not self._in_time():
            return False
        if isinstance(loss, Tensor):
            if loss.ndim or not devices.on_host(loss):
                return False
            loss = loss.item()
        if not 0.0 <= loss < usual_below or self._is_unusual(step, loss):
            return False
        self._lower_limit(loss)
        self.deferred.append((step, loss))
        observed.clear()
        return True

    def _in_time(self) -> bool:
        """Return whether one more loss may be deferred: sinks get the deferred ones soon."""
        now = time.monotonic()
        last, self._asked = self._asked, now
        if not self.deferred:
            self._begun = now
        return len(self.deferred) < TOGETHER and now - last < SECONDS and now - self._begun < SECONDS

    def look_ahead(self, usual_below: float, unit: float = 1.0) -> None:
        """Set ``usual_below``, then lower it for the losses deferred so far. ``unit``: the loss's unit."""
        self.usual_below, self._unit, self._lowest = usual_below, unit, math.inf
        for _, loss in self.deferred:
            self._lower_limit(loss)

    def _lower_limit(self, loss: float) -> None:
        """Lower ``usual_below`` for a deferred loss, which lowers the average of later comparisons."""
        if loss < self._lowest:  # a larger loss cannot lower the limit further
            self._lowest = loss
            self.usual_below = min(self.usual_below, highest_usual(loss, self._limits, self._unit))

    def forget(self) -> None:
        """Clear the present step's losses."""
        self.observed.clear()
        self.share = self._added = None

    def take_deferred(self) -> list[tuple[int, float]]:
        """Return and clear the deferred losses, before they are judged: a callback may call this again."""
        deferred, self.deferred = self.deferred, []
        return deferred

    def mean(self) -> Tensor | float | None:
        """Return the mean over the micro-batches, a 0-d tensor or a number; None without losses.

        The mean is in the widest precision of the losses.  NaN and Inf are left out unless all losses are NaN
        or Inf: after a step that a gradient scaler skipped, its loss is still here.
        """
        observed = self.observed
        if not observed:
            return None
        self.averaged = len(observed)
        alone = len(observed) == 1 and self._added is None
        if alone and self.share is None and getattr(observed[0], "ndim", 0) == 0:
            return observed[0]  # the usual case, at every step: start no kernel
        with torch.no_grad():
            if self._added is not None:
                sums = self._sums()
                if not isinstance(sums.total, Tensor):
                    return sums.total / sums.finite if sums.finite else math.nan
                average = sums.total / sums.finite
                return average if self.share is None else average * (sums.every * self.share)
            numbers = [loss for loss in observed if not isinstance(loss, Tensor)]
            if numbers:
                finite = [number for number in numbers if math.isfinite(number)] or numbers
                return sum(finite) / len(finite)
            losses = self._stacked()
            mean = torch.where(torch.isfinite(losses), losses, torch.nan).nanmean()
            return mean if self.share is None else mean * (len(losses) * self.share)

    def keep_late(self, step: int, loss: Tensor) -> None:
        """Keep a copy of a loss on an accelerator until :meth:`flush`.

        The training may overwrite the tensor meanwhile, with the mean of all ranks or a later loss.
        """
        self._late.append((step, loss.clone()))

    def flush(self, transfer: HostTransfer) -> None:
        """Send the late losses to the host in one copy, labelled with the list of their steps."""
        late, self._late = self._late, []  # clear first, so that an error below happens once
        if late:
            losses = devices.together([loss.reshape(()) for _, loss in late])
            transfer.put([step for step, _ in late], torch.stack(losses))


def _mean_dtype(loss: Tensor) -> torch.dtype:
    return loss.dtype if loss.dtype in (torch.float32, torch.float64) else torch.float32
