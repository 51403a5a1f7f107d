"""Decide from the loss alone when to read every step.

The loss is known at every step; readings are taken at some steps only.  An oscillation at the edge of
stability builds up within 5–10 steps.  That is less than the pause between two readings of a healthy run.
The loss shows the first sign: a steadily falling loss rises, or a low loss leaves its recent range.
Minibatches cause both now and then, so an unusual loss is no alarm.  It only costs a few extra readings.
Where a low loss leaves its range again and again, it must leave it farther each time.

On accelerators and in runs of many processes, a loss becomes known only with the next reading.  There an
unusual loss helps only if it comes right before a reading."""

from __future__ import annotations

import math

from nfi_monitor.detect.loss_baseline import MEMORY
from nfi_monitor.detect.smoothing import Stateful
from nfi_monitor.types import Thresholds

FALLS = 8
"""Falls in a row after which a rise is unusual. Minibatch noise has so many falls once in 2^8 steps."""
BLOCK = 16
"""Number of losses in a block. Each loss is compared with the present block and the block before."""
LEAP = 1.5
"""A low loss above this multiple of the largest loss of both blocks is unusual."""
LEARNS, FORGETS = 1.3, 0.99
"""Factors by which that multiple grows at each such loss, and returns at every other loss: then about one
loss in 240 of a noisy run is unusual."""
MOST = 1e3
"""Largest such multiple."""
WATCHED = 1e-2
"""Share of ``spike_leap_loss`` below which all losses count as equal."""
STEPS = 6
"""Number of steps to read after an unusual loss. A growing oscillation rises again within that time."""


class LossWatch(Stateful):
    """Check every loss. ``until`` is the last step to read because of an unusual loss."""

    __slots__ = ("average", "before", "count", "falls", "highest", "last", "leap", "losses", "step", "until")

    def __init__(self) -> None:
        self.step = 0  # step of the last loss
        self.last = math.nan  # the last finite loss
        self.average = math.nan  # average of log loss over about MEMORY losses
        self.losses = 0  # number of losses in the average, at most MEMORY
        self.falls = 0  # number of falls in a row
        self.highest = 0.0  # largest loss of this block
        self.before = math.inf  # largest loss of the block before
        self.count = 0  # number of losses in this block
        self.leap = LEAP  # multiple of the largest recent loss at which a low loss is unusual now
        self.until = 0

    def update(self, step: int, loss: float, limits: Thresholds, unit: float = 1.0) -> bool:
        """Add a loss; return whether it is unusual. ``unit``: the loss's unit (``loss_baseline.py``).

        Skip a step that was added before.  Skip NaN and Inf, too: the rule ``non_finite`` alerts about them.
        """
        if self.step - 2 * BLOCK < step <= self.step:
            return False
        if step < self.step:  # the step counter was set back
            self.until = 0
        self.step = step
        if not math.isfinite(loss):
            return False
        # Rejected: a higher floor (1e-4), because a slingshot at τ = 1000 is only a step or two away there.
        floor = WATCHED * limits.spike_leap_loss
        high = limits.spike_high
        if self.losses >= MEMORY:  # in the first losses the unit is not known
            floor, high = floor * unit, high * unit
        # Comparisons and not max(): this runs at every step.
        floored = loss if loss > floor else floor
        log_loss, average = math.log(floored), self.average
        highest, before = self.highest, self.before
        low = average <= math.log(high)
        leaps = low and floored > self.leap * (highest if highest > before else before)
        if leaps:
            self.leap = min(self.leap * LEARNS, MOST)
        elif self.leap > LEAP:
            self.leap = max(self.leap * FORGETS, LEAP)
        unusual = leaps or (loss > self.last and self.falls >= FALLS)
        if self.losses < MEMORY:
            self.losses += 1
        self.average = log_loss if average != average else average + (log_loss - average) / self.losses
        self.falls = self.falls + 1 if loss < self.last else 0
        self.last = loss
        if self.count == BLOCK:
            self.before, self.highest, self.count = self.highest, 0.0, 0
        if floored > self.highest:
            self.highest = floored
        self.count += 1
        if unusual:
            self.until = step + STEPS
        return unusual
