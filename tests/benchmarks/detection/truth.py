"""Say where a recorded loss had a slingshot, without the detector that is judged by it.

A slingshot is a rise of the training loss that stands out of the run's own past and lasts.  In plain words, a
reading begins one if all of these hold:

1. **It stands out.**  The loss is compared with the median of the quiet readings before it (of the last 50,
   or of the last 200 if that is lower: the first follows a descent, the second does not follow a slow rise).
   The rise is more than 6 σ, where σ comes from the differences of neighbouring readings.
2. **The run has not just come from there.**  Nine in ten of the last 150 quiet readings are lower.  A blip on
   the way down, which goes back to where the loss was some steps ago, is none.  After an event, the loss must
   double from its lowest value since: a loss that goes on falling does not begin another one.
3. **It is large**, in one of these ways:
   - a *leap*: at least three decades, to more than 1e-3, where losses below 1e-7 count as 1e-7.  Only a
     cross-entropy has a tail in which decades mean something.  Another loss must get above 1e-2, below which
     a slingshot is over;
   - W. Wu's levels (2024): from below 1e-2 to more than 1e-1;
   - tenfold, to more than 1e-1;
   - one nat or more, measured on the loss itself;
   - a *collapse*: a cross-entropy that had fallen to three quarters of its early level is back there.
4. **It lasts**: two of four readings are that large, or three in a row where only the one nat is reached.
   One hard minibatch is no slingshot.  (Two of four, because a step too long throws the loss up and down.)
   More than half of 20 readings are enough if their median stands out of the medians of 20 readings before:
   a rise may be slow, or each reading within the noise.  A collapse needs 120 of 200 readings.
   Where readings are some steps apart, a rise also lasts if the next one is more than half of the way up.

A loss that is NaN or infinite is an event for itself.  A slingshot ends when the loss has been low again for
a while, or, if it does not come back, when the new level has become the normal one.

The levels are in nats.  A loss that is no cross-entropy has a unit of its own, so it is divided by the median
of its first 20 readings: a run told in metres and one told in millimetres have the same slingshots.  A loss
that goes below zero has no floor to leave, and neither has that of one of two players (``floor=False``).
Only NaN and Inf are events there.

Where a run records the loss of a fixed part of its training set (``truth_loss``), that one is judged: a
minibatch that is hard says nothing about it.  The labels look at the whole run, also at what comes later; no
warning can.  Numbers in, numbers out; nothing of ``nfi_monitor`` is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

SHORT, LONG, RECENT = 50, 200, 150
"""Quiet readings in the two medians, and in the check that the run has not just come from there."""
LOWER = 0.9
"""Share of the recent readings that are below a slingshot's first."""
FIRST = 20
"""First steps, the median of whose losses is the early level: the unit of a loss that is no cross-entropy."""
LEAST_SIGMA = 0.02
"""Smallest noise assumed of a logarithm of the loss."""
AGAIN = 2.0
"""Ratio to the lowest loss since the last event that begins another one."""
SLOW = 400
"""Quiet readings within which the lowest level of a slow rise is looked for: the lowest median of 50."""
SOME, MANY = (11, 20), (120, 200)
"""(n, of m readings) that must be high in a slow rise, and in a collapse."""
FURTHER = 2.0
"""A slow rise is this much farther above the median of those readings than their 95th percentile."""
LEARNED = 0.75
"""Share of its early level to which a loss that collapses has fallen."""


@dataclass(frozen=True)
class Levels:
    """How large a rise must be; losses in nats, or in units of the run's first loss."""

    floor: float = 1e-7
    leap: float = 1e3
    leap_to: float = 1e-3
    low: float = 1e-2
    high: float = 1e-1
    ratio: float = 10.0
    nats: float = 1.0
    sigmas: float = 6.0

    def near(self) -> Levels:
        """Levels of a near miss: too small for a slingshot, too large to call an alarm before it false."""
        return Levels(self.floor, 1e2, 0.1 * self.leap_to, 0.1 * self.low, 0.1 * self.high, 5.0, 0.25, 4.0)

    def without_tail(self) -> Levels:
        """Levels of a loss that is no cross-entropy."""
        return replace(self, leap_to=max(self.leap_to, self.low))


@dataclass(frozen=True)
class Event:
    """A stretch of steps [start, end], both included."""

    start: int
    end: int


def slingshots(
    steps: Sequence[int],
    losses: Sequence[float],
    tau: float,
    *,
    nats: bool = True,
    floor: bool = True,
    levels: Levels | None = None,
) -> tuple[Event, ...]:
    """Return the slingshots of a recorded loss, in order.

    ``nats``: the loss is a cross-entropy or another log-likelihood, so levels in nats mean something.
    ``floor``: the loss has a lowest value that the run descends to.  ``tau``: 1/(1−β2) in steps.
    """
    at = np.asarray(steps, dtype=np.int64)
    loss = np.asarray(losses, dtype=np.float64)
    finite = np.isfinite(loss)
    levels = levels or Levels()
    first = finite & (at < at[0] + FIRST) if len(at) else finite
    early = float(np.median(np.abs(loss[first]))) if first.any() else 0.0
    if not nats:
        levels = levels.without_tail()
        loss = loss / early if early > 0 else loss
    # Rounding puts a divergence that is nearly 0 below it; a tenth of the lower level is no rounding.
    has_floor = floor and not bool((loss[finite] < -1e-3).mean() > 0.01 if finite.any() else False)
    return tuple(_Labeller(at, loss, tau, levels, has_floor, early if nats else math.inf).run())


def recovery_steps(tau: float) -> float:
    """Steps for which the loss must have been low before a slingshot is over."""
    return min(max(2.0 * tau, 10.0), 200.0)


class _Labeller:
    def __init__(
        self,
        steps: NDArray[np.int64],
        loss: NDArray[np.float64],
        tau: float,
        levels: Levels,
        has_floor: bool,
        early: float,
    ) -> None:
        self.steps, self.levels, self.has_floor, self.early = steps, levels, has_floor, early
        self.loss = np.where(np.isfinite(loss), loss, math.inf)
        self.log = np.log(np.maximum(self.loss, levels.floor))
        self.recovery = recovery_steps(tau)
        self.apart = len(steps) > 1 and bool(np.median(np.diff(steps)) > 1)
        self.patience = max(5.0 * tau, 500.0)
        self.quiet: list[int] = []
        """Indices of the readings outside events, since the last change of level."""
        self.left_at = -math.inf
        """Lowest log loss since the last event: a loss that only falls from there does not rise."""

    def run(self) -> list[Event]:
        events: list[Event] = []
        index, count = 0, len(self.steps)
        while index < count:
            level = self._begins(index)
            if level is None:
                if math.isfinite(self.loss[index]):
                    self.quiet.append(index)
                    self.left_at = min(self.left_at, float(self.log[index]))
                index += 1
                continue
            end, index = self._end(index, level)
            self.left_at = float(self.log[end[1]])
            events.append(Event(int(self.steps[end[0]]), int(self.steps[end[1]])))
        return events

    def _end(self, begin: int, level: float) -> tuple[tuple[int, int], int]:
        """((first, last) index of the event that begins here, index at which judging goes on)."""
        count = len(self.steps)
        high = begin
        for index in range(begin, count):
            if self.log[index] >= level:
                high = index
            since = self.steps[index] - self.steps[high]
            if since > self.recovery:
                return (begin, index - 1), index
            if self.steps[index] - self.steps[begin] > self.patience and high == index:
                self.quiet.clear()  # the loss stays: its new level becomes the normal one
                return (begin, index), index + 1
        return (begin, count - 1), count

    def _begins(self, index: int) -> float | None:
        """Log of the level below which the event that begins at this reading is over; None if none does."""
        if not math.isfinite(self.loss[index]):
            return self._recent_level()
        levels = self.levels
        if not self.has_floor or self.loss[index] <= levels.leap_to or len(self.quiet) < SHORT:
            return None
        return self._jumps(index) or self._rises_slowly(index)

    def _jumps(self, index: int) -> float | None:
        """Level of an event that a few readings show."""
        past = self.log[self.quiet[-LONG:]]
        base = min(float(np.median(past)), float(np.median(past[-SHORT:])))
        if self.log[index] - self.left_at < math.log(AGAIN):
            return None
        # Cheap and necessary; what follows costs more.
        if self.log[index] - base < math.log(1.1):
            return None
        if np.quantile(past[-RECENT:], LOWER) >= self.log[index]:
            return None
        for needed, within, least in self._smallest_rise(past, base):
            if self._lasts(index, needed, within, least) or self._checked_twice(index, base, least):
                return self._back(base, least)
        return None

    def _checked_twice(self, index: int, base: float, least: float) -> bool:
        """Whether readings that are some steps apart show a rise that lasts from one to the next.

        Two of four such readings would ask for ten steps or more, where two are enough.
        """
        ahead = self.log[index : index + 2]
        return self.apart and len(ahead) == 2 and ahead[0] > least and ahead[1] > 0.5 * (base + least)

    def _rises_slowly(self, index: int) -> float | None:
        """Level of an event that is slow, or within the noise of a reading, or a collapse."""
        levels, past = self.levels, self.log[self.quiet[-SLOW:]]
        if len(past) < LONG or np.quantile(past[-RECENT:], LOWER) >= self.log[index]:
            return None
        medians = [float(np.median(part)) for part in _parts(past, SHORT)]
        base = min(medians)
        usual = math.exp(base)
        climb = max(math.log(min(usual + levels.nats, usual * levels.ratio)), math.log(levels.high))
        collapse = math.log(self.early) if 0 < usual < LEARNED * self.early < math.inf else math.inf
        if self.log[index] <= min(climb, collapse):
            return None
        visible = np.maximum(past, math.log(0.01 * levels.high))
        some = np.array([np.median(part) for part in _parts(visible, SOME[1])])
        noise = levels.sigmas * max(_sigma(some), LEAST_SIGMA)
        wander = FURTHER * float(np.quantile(some, 0.95) - np.median(some))
        for (needed, within), level in ((SOME, climb), (MANY, collapse)):
            least = max(level, base + noise, float(np.median(some)) + wander)
            if self._lasts(index, needed, within, least):
                return self._back(base, level)
        return None

    def _lasts(self, index: int, needed: int, within: int, least: float) -> bool:
        ahead = self.log[index : index + within]
        return bool(ahead[0] > least) and int((ahead > least).sum()) >= needed

    def _back(self, base: float, least: float) -> float:
        """Log of the level below which the loss has come back."""
        half_way, low = 0.5 * (base + least), math.log(self.levels.low)
        return max(half_way, low) if base < low else half_way

    def _smallest_rise(self, past: NDArray[np.float64], base: float) -> list[tuple[int, int, float]]:
        """(n, of m readings, log of the loss that n must exceed), one of which makes a slingshot."""
        levels = self.levels

        def clear(low: float) -> float:
            # Where the loss is a hundredth of what counts, its noise does not matter: 0 and 1e-9 are equal.
            spread = max(_sigma(np.maximum(past, math.log(0.01 * low))), LEAST_SIGMA)
            return max(base, math.log(0.01 * low)) + levels.sigmas * spread

        leap = max(base + math.log(levels.leap), math.log(levels.leap_to), clear(levels.leap_to))
        high = max(math.log(levels.high), clear(levels.high))
        ways = [(2, 4, leap), (2, 4, max(base + math.log(levels.ratio), high))]
        if base < math.log(levels.low):
            ways.append((2, 4, high))
        usual = math.exp(base)
        spread = max(_sigma(np.exp(past)), LEAST_SIGMA * usual)
        return [*ways, (3, 3, math.log(usual + max(levels.nats, levels.sigmas * spread)))]

    def _recent_level(self) -> float:
        past = self.log[self.quiet[-SHORT:]]
        return float(np.median(past)) + math.log(2.0) if len(past) else math.inf


def _sigma(values: NDArray[np.float64]) -> float:
    """Robust σ of the noise, from the differences of neighbours: a trend hardly counts."""
    if len(values) < 3:
        return math.inf
    changes = np.diff(values)
    return float(1.4826 * np.median(np.abs(changes - np.median(changes))) / math.sqrt(2.0))


def _parts(values: NDArray[np.float64], length: int) -> list[NDArray[np.float64]]:
    """Split the values into parts of this length, the last ones first; a shorter rest is left out."""
    ends = range(len(values), length - 1, -length)
    return [values[end - length : end] for end in ends]
