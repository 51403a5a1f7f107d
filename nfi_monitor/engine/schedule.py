"""Which optimizer steps are read in full, and what that costs.

Reading costs the same few hundred small kernels whatever the model, so a small model feels it and a large
one does not.  Where τ leaves room, the monitor reads a small healthy model less often; where that is not
enough, it reads fewer rows and coordinates of it.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from nfi_monitor.capture.sampling import auto_interval
from nfi_monitor.detect.detector import Attention

SAMPLES = 32
"""Steps and readings whose medians are taken: one slow step (a checkpoint, a compilation) is no cost."""
FIRST_CHANGE = 64
"""Optimizer step from which the interval is first decided on; again at each doubling."""
ALL_READ = 8
"""The first steps are read in full: they show whether anything can be seen at all."""


def next_read(
    step: int, every: int | str, attention: Attention, tau: float, healthy: int | None = None
) -> int:
    """The first step after ``step`` that is to be read, while nothing changes. ``healthy``: steps between
    readings while nothing is going on, default :func:`nfi_monitor.capture.sampling.auto_interval`."""
    following = step + 1
    if isinstance(every, int):
        return -(-following // every) * every
    if attention is Attention.ALWAYS or following <= ALL_READ:
        return following
    if attention is Attention.OFTEN:
        often = auto_interval(tau, at_risk=True)
        return -(-following // often) * often
    # Two neighbours and a longer pause: curvature, alignment and swing need the step before as well.
    pair = 2 * (healthy or auto_interval(tau))
    return following if following % pair <= 1 else -(-following // pair) * pair


def shared_schedule(every: int | str) -> Callable[[int, Attention, float], int]:
    """Return ``next_read(step, attention, tau)`` for ranks that are read together."""
    return lambda step, attention, tau: next_read(step, every, attention, tau)


class Schedule:
    """The monitor's own seconds beside the training's, and the longest pause between readings they call for.

    ``budget`` is the share of the training's own time that healthy steps may cost; None: no matter.
    """

    def __init__(self, budget: float | None) -> None:
        self.budget = budget
        self.own = 0.0  # seconds
        self.readings = 0
        self.healthy: int | None = None
        """Steps between readings while nothing is going on; None: τ alone decides."""
        self.reduced_sample = False
        """Whether readings hold fewer rows and coordinates."""
        self._started = self._last = time.perf_counter()
        self._own_before = 0.0
        self._finished: float | None = None
        self._next_decision = FIRST_CHANGE
        self._steps = self._unplanned = 0  # since the last decision; readings that a stirring loss called for
        self._stirs = 0.0
        """Such readings a step, as found at the last decision."""
        self._training: deque[float] = deque(maxlen=SAMPLES)
        self._reading: deque[float] = deque(maxlen=SAMPLES)
        self._passing: deque[float] = deque(maxlen=4 * SAMPLES)

    @property
    def training(self) -> float:
        """Seconds since the beginning that were not the monitor's."""
        end = self._finished if self._finished is not None else time.perf_counter()
        return end - self._started - self.own

    def spend(self, seconds: float) -> None:
        """What a hook took between two steps."""
        self.own += seconds

    def step_done(self, read: bool, now: float, *, unplanned: bool = False) -> None:
        """An optimizer step is over, and all that the monitor had to do for it. ``unplanned``: nothing but an
        unusual loss had it read, of a healthy run."""
        self._steps += 1
        self._unplanned += read and unplanned
        own = self.own - self._own_before
        self._training.append(now - self._last - own)
        if read:
            self.readings += 1
            self._reading.append(own)
        else:
            self._passing.append(own)
        self._last, self._own_before = now, self.own

    def leave_out(self, seconds: float) -> None:
        """Time in which nothing was trained or watched."""
        self._started += seconds
        self._last += seconds

    def give_up_budget(self) -> None:
        """Let τ alone decide, and read full samples: ranks have to agree, and no two clocks do."""
        self.budget = self.healthy = None
        self.reduced_sample = False

    def finish(self) -> None:
        self._finished = time.perf_counter()

    def decide(self, step: int, tau: float, *, can_reduce: Callable[[], bool] = lambda: True) -> bool:
        """A few times in a run: fit the interval to the budget, between the one of τ and a tenth of τ.

        Only so far: what precedes a slingshot lasts for some τ, and must still be seen.  In its first τ steps
        a second moment remembers no more than those, and slingshots build up as fast: hence the 32nd part of
        the steps done.  (τ/5 at once lost: hinge slingshots of the first τ came without a warning.)  What a
        stirring loss has read costs as well: a minibatch loss may stir as often as all else is read.  Seldom,
        so that the cadence does not follow every mood of the machine.  Where the interval is as long as it
        will ever be and a healthy step still costs too much, rows and coordinates are lowered, if
        ``can_reduce`` says so; for good, because what is measured of two samples differs by more than what
        grows in a few steps.  True if something was lowered that was not before.
        """
        if self.budget is None or step < self._next_decision:
            return False
        self._next_decision = 1 << step.bit_length()
        if not (self._reading and self._passing):
            return False
        shortest, longest = auto_interval(tau), round(min(tau / 10, step / 32))
        self._stirs, self._steps, self._unplanned = self._unplanned / max(self._steps, 1), 0, 0
        reading = statistics.median(self._reading)
        left = (
            self.budget * statistics.median(self._training) - self._passing_seconds() - self._stirs * reading
        )
        interval = shortest
        while interval < longest and reading > left * interval:
            interval = min(2 * interval, longest)
        before, self.healthy = self.healthy or shortest, interval if interval > shortest else None
        dear = step / 32 >= tau / 10 and reading > left * interval
        lower = dear and not self.reduced_sample and can_reduce()
        self.reduced_sample = self.reduced_sample or lower
        return interval > before or lower

    def expected(self, tau: float) -> float:
        """Share of the training's own time that a healthy step costs at the present interval."""
        interval = self.healthy or auto_interval(tau)
        cost = self._passing_seconds() + statistics.median(self._reading) * (1 / interval + self._stirs)
        return cost / max(statistics.median(self._training), 1e-9)

    def _passing_seconds(self) -> float:
        """Mean seconds of a step without a reading: losses are judged a few at a time, so no median; and
        without the slowest, which may have been a garbage collection."""
        return (sum(self._passing) - max(self._passing)) / max(len(self._passing) - 1, 1)

    def reading_seconds(self) -> float:
        """Median seconds of a reading."""
        return statistics.median(self._reading)

    def step_seconds(self) -> float:
        """Median seconds of a step's training."""
        return statistics.median(self._training)
