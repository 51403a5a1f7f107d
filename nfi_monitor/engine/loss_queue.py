"""The losses of optimizer steps: what was told of the one at hand, and those that wait to be judged.

Most steps of a healthy run are not read, and all that is known of them is a loss that begins nothing.  Code
that runs once a step finds none of itself in the CPU's caches, so judging such a loss at its own step costs
more than all else that the monitor does there.  They wait for each other instead.  On an accelerator a loss
is a number that is not known yet: those wait on the device, and are copied together.
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
    """``observed`` of the micro-batches of this step, ``waiting`` (step, loss) of earlier ones, oldest first.

    ``share``: where not None, losses, times this, add up to the step's.  ``usual_below``: losses from 0 up to
    here begin nothing and may wait; −inf while none may.
    """

    def __init__(self, is_unusual: Callable[[int, float], bool], limits: Thresholds) -> None:
        """``is_unusual(step, loss)``: whether a loss calls for closer attention; asked at its own step."""
        self._is_unusual = is_unusual
        self._limits = limits
        self._lowest = math.inf  # of those that wait
        self.observed: list[Tensor | float] = []
        self.share: float | None = None
        self.usual_below = -math.inf
        self.waiting: list[tuple[int, float]] = []
        self._late: list[tuple[int, Tensor]] = []  # on an accelerator: not copied yet

    def defer(self, step: int) -> bool:
        """Let the loss of a step that is not read wait, if it begins nothing; False: it has to be judged now.

        What is judged does not change by it, nor when something is seen: the loss that may begin a slingshot
        is judged at once.
        """
        observed, usual_below = self.observed, self.usual_below
        if usual_below < 0:
            return False
        if not observed:
            return True
        loss = observed[0]
        if len(observed) > 1 or self.share is not None or len(self.waiting) >= TOGETHER:
            return False
        if isinstance(loss, Tensor):
            if loss.ndim or not devices.on_host(loss):
                return False
            loss = loss.item()
        if not 0.0 <= loss < usual_below or self._is_unusual(step, loss):
            return False
        self._lower(loss)
        self.waiting.append((step, loss))
        observed.clear()
        return True

    def look_ahead(self, usual_below: float) -> None:
        """What is usual from here on; losses that wait since before a resume count."""
        self.usual_below, self._lowest = usual_below, math.inf
        for _, loss in self.waiting:
            self._lower(loss)

    def _lower(self, loss: float) -> None:
        """What waits may lower the average that a loss is held against, but not below its own smallest."""
        if loss < self._lowest:  # larger ones change nothing
            self._lowest = loss
            self.usual_below = min(self.usual_below, highest_usual(loss, self._limits))

    def forget(self) -> None:
        """The step is over, and its loss was judged."""
        self.observed.clear()
        self.share = None

    def take_waiting(self) -> list[tuple[int, float]]:
        """Those that wait, for good: what an alert calls may ask for them while they are judged."""
        waiting, self.waiting = self.waiting, []
        return waiting

    def mean(self) -> Tensor | float | None:
        """Mean over the micro-batches, in the widest precision given; a 0-d tensor or a number.

        A micro-batch whose loss is NaN or Inf counts only if all are: a gradient scaler that skipped a step
        leaves that step's loss behind.
        """
        observed = self.observed
        if not observed:
            return None
        if len(observed) == 1 and self.share is None and getattr(observed[0], "ndim", 0) == 0:
            return observed[0]  # the usual case, and one that every step passes through: no kernel
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
        """One that is on an accelerator, until :meth:`flush`.

        A copy: by then the tensor may hold the mean of all ranks, or the loss of another step.
        """
        self._late.append((step, loss.clone()))

    def flush(self, transfer: HostTransfer) -> None:
        """Send the late ones to the host in one copy, labelled with the list of their steps."""
        late, self._late = self._late, []  # should it fail below, it fails once
        if late:
            losses = devices.together([loss.reshape(()) for _, loss in late])
            transfer.put([step for step, _ in late], torch.stack(losses))


def _mean_dtype(loss: Tensor) -> torch.dtype:
    return loss.dtype if loss.dtype in (torch.float32, torch.float64) else torch.float32
