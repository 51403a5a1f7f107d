"""Decide from the loss alone when to look closely.

The loss is known at every step, a reading only at some.  An oscillation at the edge of stability builds up
within 5–10 steps, less than the pause between two readings of a healthy run.  Its first sign is in the
loss: one that had been falling steadily rises, or a low one leaves its recent range.  Neither is an alarm,
because minibatches do both now and then; it costs a few readings.

On accelerators and in runs of many processes, losses become known with the next reading.  There this comes
too late to help, except for an unusual loss right before a reading."""

from __future__ import annotations

import math

from nfi_monitor.detect.smoothing import Stateful
from nfi_monitor.detect.spike import MEMORY
from nfi_monitor.types import Thresholds

FALLS = 8
"""Falls in a row after which a rise is unusual. Minibatch noise makes that many once in 2^8 steps."""
BLOCK = 16
"""Steps in a block of losses. A loss is compared with the last one to two blocks."""
LEAP = 1.5
"""Ratio to the largest loss of these blocks from which on a low loss is unusual."""
STEPS = 6
"""Steps to look closely after an unusual loss. A growing oscillation rises again within that time."""


class LossWatch(Stateful):
    """Watch every loss at its step. ``until`` is the last step to read because of an unusual loss."""

    __slots__ = ("average", "before", "count", "falls", "highest", "last", "losses", "step", "until")

    def __init__(self) -> None:
        self.step = 0
        self.last = math.nan
        self.average = math.nan  # of log loss, over some MEMORY losses
        self.losses = 0
        self.falls = 0  # in a row
        self.highest = 0.0  # of this block
        self.before = math.inf  # highest of the block before
        self.count = 0  # losses in this block
        self.until = 0

    def update(self, step: int, loss: float, limits: Thresholds) -> bool:
        """Return whether this loss is unusual.

        A step that was seen already is skipped. NaN and Inf are skipped too; they are alerts of their own.
        """
        if self.step - 2 * BLOCK < step <= self.step:
            return False
        if step < self.step:  # the counter was set back
            self.until = 0
        self.step = step
        if not math.isfinite(loss):
            return False
        # Smaller ones are the same: a hinge loss wanders between 0 and 1e-5.  (A tenth, as the spike detector
        # has it, lost: from there to a slingshot at τ = 1000 it is a step or two, and 17 of 41 were seen.)
        size = max(loss, 0.01 * limits.spike_low)
        low = self.average <= math.log(limits.spike_high)
        unusual = (loss > self.last and self.falls >= FALLS) or (
            low and size > LEAP * max(self.highest, self.before)
        )
        self.losses = min(self.losses + 1, MEMORY)
        self.average = (
            math.log(size)
            if math.isnan(self.average)
            else self.average + (math.log(size) - self.average) / self.losses
        )
        self.falls = self.falls + 1 if loss < self.last else 0
        self.last = loss
        if self.count == BLOCK:
            self.before, self.highest, self.count = self.highest, 0.0, 0
        self.highest = max(self.highest, size)
        self.count += 1
        if unusual:
            self.until = step + STEPS
        return unusual
