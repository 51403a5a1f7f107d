"""Choose the optimizer steps to read in full, and keep the cost of readings within a budget.

A reading starts a few hundred small kernels for any model: that slows down a small model, not a large one.
Where τ leaves room, the monitor reads a small healthy model less often.  If that is not enough, it reads
fewer rows and coordinates.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from nfi_monitor.capture.sampling import auto_interval
from nfi_monitor.detect.attention import Attention

SAMPLES = 32
"""Number of steps, and of readings, in a median. With a median, one slow step (a checkpoint) hardly
counts."""
FIRST_CHANGE = 64
"""First optimizer step at which the interval is chosen. It is chosen again each time the step doubles."""
ALL_READ = 8
"""Number of steps at the start that are all read: they show what the monitor can see."""


def next_read(
    step: int, every: int | str, attention: Attention, tau: float, healthy: int | None = None
) -> int:
    """Return the first step after ``step`` that is to be read, if attention stays as it is.

    ``healthy``: steps between readings of a healthy run, default
    :func:`nfi_monitor.capture.sampling.auto_interval`.
    """
    following = step + 1
    if isinstance(every, int):
        return -(-following // every) * every
    if attention is Attention.ALWAYS or following <= ALL_READ:
        return following
    if attention is Attention.OFTEN:
        often = auto_interval(tau, at_risk=True)
        return -(-following // often) * often
    # Read two neighbouring steps, then pause longer: curvature, alignment and swing need the step before.
    unit = auto_interval(tau) if attention in (Attention.SOMETIMES, Attention.SOON) else None
    pair = attention.units * (unit or healthy or auto_interval(tau))
    return following if following % pair <= 1 else -(-following // pair) * pair


def shared_schedule(every: int | str) -> Callable[[int, Attention, float], int]:
    """Return ``next_read(step, attention, tau)`` for ranks that are read together."""
    return lambda step, attention, tau: next_read(step, every, attention, tau)


class Schedule:
    """Measure the monitor's own time, and choose the interval between readings and their sample size.

    ``budget``: share of the training's own time that the monitor may take at healthy steps; None: no limit.
    """

    def __init__(self, budget: float | None) -> None:
        self.budget = budget
        self.own_seconds = 0.0  # taken by the monitor so far
        self.readings = 0
        self.healthy_interval: int | None = None
        """Steps between readings of a healthy run; None: τ alone decides."""
        self.reduced_sample = False
        """Whether readings hold a reduced sample of rows and coordinates."""
        self._started = self._last = time.perf_counter()
        self._own_before = 0.0
        self._finished: float | None = None
        self._next_decision = FIRST_CHANGE
        # Since the last decision: all steps, and readings that only an unusual loss caused.
        self._steps = self._unplanned = 0
        self._unplanned_share = 0.0
        """Unplanned readings per step, before the last decision."""
        self._training: deque[float] = deque(maxlen=SAMPLES)
        self._reading: deque[float] = deque(maxlen=SAMPLES)
        self._passing: deque[float] = deque(maxlen=4 * SAMPLES)

    @property
    def training(self) -> float:
        """Seconds since the start without those of the monitor."""
        end = self._finished if self._finished is not None else time.perf_counter()
        return end - self._started - self.own_seconds

    def spend(self, seconds: float) -> None:
        """Add the seconds that a hook took between two steps."""
        self.own_seconds += seconds

    def step_done(self, read: bool, now: float, *, unplanned: bool = False) -> None:
        """Count an optimizer step, after all work of the monitor on it.

        ``unplanned``: only an unusual loss caused the reading, in a healthy run.
        """
        self._steps += 1
        self._unplanned += read and unplanned
        own = self.own_seconds - self._own_before
        self._training.append(now - self._last - own)
        if read:
            self.readings += 1
            self._reading.append(own)
        else:
            self._passing.append(own)
        self._last, self._own_before = now, self.own_seconds

    def leave_out(self, seconds: float) -> None:
        """Do not count a time in which the monitor was paused."""
        self._started += seconds
        self._last += seconds

    def give_up_budget(self) -> None:
        """Drop the budget: ranks must read the same steps, but their clocks differ."""
        self.budget = self.healthy_interval = None
        self.reduced_sample = False

    def finish(self) -> None:
        """Stop the clock at the end of the training."""
        self._finished = time.perf_counter()

    def decide(self, step: int, tau: float, *, can_reduce: Callable[[], bool] = lambda: True) -> bool:
        """Fit interval and sample size to the budget. Return whether one became sparser.

        The interval stays between the default one and τ/10, because the signs of a slingshot last some τ.  It
        is also at most 1/32 of the steps so far: in the first τ steps slingshots build up faster.  (Rejected:
        τ/5 at once, because hinge slingshots in the first τ then came without a warning.)  Unplanned readings
        count towards the cost: a minibatch loss may cause as many of them as the schedule.  The interval is
        chosen a few times in a run only, so that it does not follow the machine's load.

        If the longest interval still costs too much, the sample is reduced, if ``can_reduce()``.  This is
        never undone: a change of sample size would look like growth.
        """
        if self.budget is None or step < self._next_decision:
            return False
        self._next_decision = 1 << step.bit_length()
        if not (self._reading and self._passing):
            return False
        shortest, longest = auto_interval(tau), round(min(tau / 10, step / 32))
        self._unplanned_share, self._steps, self._unplanned = self._unplanned / max(self._steps, 1), 0, 0
        reading = statistics.median(self._reading)
        left = (
            self.budget * statistics.median(self._training)
            - self._passing_seconds()
            - self._unplanned_share * reading
        )
        interval = shortest
        while interval < longest and reading > left * interval:
            interval = min(2 * interval, longest)
        before, self.healthy_interval = (
            self.healthy_interval or shortest,
            interval if interval > shortest else None,
        )
        too_costly = step / 32 >= tau / 10 and reading > left * interval
        reduce = too_costly and not self.reduced_sample and can_reduce()
        self.reduced_sample = self.reduced_sample or reduce
        return interval > before or reduce

    def expected(self, tau: float) -> float:
        """Return the share of the training's own time that a healthy step costs at the present interval."""
        interval = self.healthy_interval or auto_interval(tau)
        cost = self._passing_seconds() + statistics.median(self._reading) * (
            1 / interval + self._unplanned_share
        )
        return cost / max(statistics.median(self._training), 1e-9)

    def _passing_seconds(self) -> float:
        """Return the mean seconds of a step without a reading, without the slowest such step.

        A mean, because losses are judged several at a time.  The slowest step may have been a garbage
        collection.
        """
        return (sum(self._passing) - max(self._passing)) / max(len(self._passing) - 1, 1)

    def reading_seconds(self) -> float:
        """Return the median seconds of a reading."""
        return statistics.median(self._reading)

    def step_seconds(self) -> float:
        """Return the median seconds of a step's training."""
        return statistics.median(self._training)
