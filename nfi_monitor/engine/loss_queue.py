"""The losses of optimizer steps: those of the present step, and those that wait to be judged together.

Most steps of a healthy run are not read, and their loss begins nothing.  Code that runs once a step finds
none of itself in the CPU's caches, so judging such a loss at its own step would cost more than everything
else that the monitor does there.  Such losses wait and are judged together.  On an accelerator a loss is not
known yet: those losses wait on the device and are copied together.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nfi_monitor.capture import devices
from nfi_monitor.capture.host_transfer import HostTransfer
from nfi_monitor.detect.spike import highest_usual
from nfi_monitor.types import Thresholds

TOGETHER = 32
"""Losses judged at once."""


class LossQueue:
    """Holds losses until they are judged.

    Attributes:
        observed: losses of this step's micro-batches.
        deferred: (step, loss) of earlier steps, oldest first.
        share: factor by which a step's losses add up to its own; None where each is a mean of its own.
        usual_below: losses from 0 up to this begin nothing and may wait; −inf while none may.
    """

    def __init__(self, is_unusual: Callable[[int, float], bool], limits: Thresholds) -> None:
        """``is_unusual(step, loss)``: whether a loss calls for closer attention; called at its step."""
        self._is_unusual = is_unusual
        self._limits = limits
        self._lowest = math.inf  # of the deferred losses
        self.observed: list[Tensor | float] = []
        self.share: float | None = None
        self.usual_below = -math.inf
        self.deferred: list[tuple[int, float]] = []
        self._late: list[tuple[int, Tensor]] = []  # on an accelerator, not copied yet

    def defer(self, step: int) -> bool:
        """Defer the loss of a step that is not read, if it begins nothing. False: judge it now.

        This changes no result: a loss that may begin a slingshot is judged at once.
        """
        observed, usual_below = self.observed, self.usual_below
        if usual_below < 0:
            return False
        if not observed:
            return True
        loss = observed[0]
        if len(observed) > 1 or self.share is not None or len(self.deferred) >= TOGETHER:
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

    def look_ahead(self, usual_below: float) -> None:
        """Set what is usual from here on, deferred losses included (also those from before a resume)."""
        self.usual_below, self._lowest = usual_below, math.inf
        for _, loss in self.deferred:
            self._lower_limit(loss)

    def _lower_limit(self, loss: float) -> None:
        """Lower ``usual_below``: a deferred loss may lower the average that later ones are compared with."""
        if loss < self._lowest:  # a larger one cannot lower it further
            self._lowest = loss
            self.usual_below = min(self.usual_below, highest_usual(loss, self._limits))

    def forget(self) -> None:
        """Clear the present step's losses, once they were judged."""
        self.observed.clear()
        self.share = None

    def take_deferred(self) -> list[tuple[int, float]]:
        """Return and clear the deferred losses. Cleared first: a callback may call this again meanwhile."""
        deferred, self.deferred = self.deferred, []
        return deferred

    def mean(self) -> Tensor | float | None:
        """Return the mean over the micro-batches, a 0-d tensor or a number, in the widest precision given.

        A NaN or Inf is left out unless all losses are: a step that a gradient scaler skipped leaves its loss
        behind.  None without losses.
        """
        observed = self.observed
        if not observed:
            return None
        if len(observed) == 1 and self.share is None and getattr(observed[0], "ndim", 0) == 0:
            return observed[0]  # the usual case, at every step: start no kernel
        with torch.no_grad():
            tensors = [x.mean(dtype=_mean_dtype(x)) for x in observed if isinstance(x, Tensor)]
            numbers = [loss for loss in observed if not isinstance(loss, Tensor)]
            if numbers:
                finite = [number for number in numbers if math.isfinite(number)] or numbers
                return sum(finite) / len(finite)
            losses = torch.stack(devices.together(tensors))
            mean = torch.where(torch.isfinite(losses), losses, torch.nan).nanmean()
            return mean if self.share is None else mean * (len(tensors) * self.share)

    def keep_late(self, step: int, loss: Tensor) -> None:
        """Keep a copy of a loss on an accelerator until :meth:`flush`.

        By then the tensor itself may hold the mean of all ranks, or the loss of another step.
        """
        self._late.append((step, loss.clone()))

    def flush(self, transfer: HostTransfer) -> None:
        """Send the late losses to the host in one copy, labelled with the list of their steps."""
        late, self._late = self._late, []  # cleared first: a failure below happens once
        if late:
            losses = devices.together([loss.reshape(()) for _, loss in late])
            transfer.put([step for step, _ in late], torch.stack(losses))


def _mean_dtype(loss: Tensor) -> torch.dtype:
    return loss.dtype if loss.dtype in (torch.float32, torch.float64) else torch.float32
