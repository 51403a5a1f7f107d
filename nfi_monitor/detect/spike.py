"""Recognize slingshots in the loss: where a slingshot starts and when it is over.

A slingshot is a rise of the loss that is large, far outside the loss's own noise, and lasts for at least two
losses.  U is the loss's unit: 1 for a loss in nats, else about the loss at which the run began.

- A *leap* is large: three decades above the running average, and above 1e-3 U.  Losses below 1e-7 U count as
  1e-7 U.  A loss that is no cross-entropy must get above 1e-2 U.
- A *climb* is large: a decade or 1 U above the running average, and above 1e-1 U.  From below 1e-2 U these
  are the levels of W. Wu (2024, footnote 6).
- A rise that only the means of many losses show is found by ``slow_rise.py``.

The running average, the noise and U are those of ``loss_baseline.py``.  High losses that led to nothing raise
the number of losses that the next rise must last, unless each step has the same rows.  In a run that fits its
data, hard minibatches give such losses again and again.

An event ends when the loss has come back, or when it no longer falls: then it has stayed at a new level,
which becomes the baseline.  Aftershocks within ``recovered`` τ belong to the same event.
"""

from __future__ import annotations

import math
from typing import Any

from nfi_monitor.detect.loss_baseline import (
    MEMORY,
    SLOW_MEMORY,
    VISIBLE,
    LossBaseline,
    highest_of_each,
    highest_usual,
)
from nfi_monitor.detect.slow_rise import LENGTH, SlowRise
from nfi_monitor.detect.smoothing import Stateful
from nfi_monitor.types import Thresholds

QUIET, RISEN, FALLEN = "quiet", "risen", "fallen"
DECADE = math.log(10.0)
ENOUGH, ENOUGH_HIGH = 0.5, 0.8
"""Share of ``spike_sigmas`` by which each loss must rise, from a low and from a high average. The noise of a
high loss lasts for many losses, so that they are no independent evidence."""
DIVERGED = 3.0  # ratio to the highest of the first losses that a climb must reach before SLOW_MEMORY losses
LEAK = 2.5  # evidence that every loss of a streak must bring, in σ: else the streak ends
SIGMA_CAP = 10.0  # most that one loss adds to the evidence, in σ: one bad minibatch is no slingshot
LONGEST_STREAK = 12  # losses within which a streak must become a slingshot
ABOVE_ALL = 4.0
"""Multiple of the highest recent loss above which a loss stands out in any noise, if rows are the same."""
NOISY = 0.5
"""σ of log loss above which a streak needs one more high loss: two hard minibatches in a row are chance."""
SHALLOW = 0.7  # a smaller rise of log loss (less than a doubling) needs ``LASTING`` high losses
LASTING = 4  # so many high losses may rise moderately, if their mean is as far outside the noise
FORGETS = 1.0 - 1.0 / 1000.0  # factor per loss by which the number of lone high losses fades
MOST_NEEDED = 8  # most high losses that a streak may need because of them
FEW = 4  # an event of no more high losses than this makes a later event need one more
BLOCK = 50  # losses in a block of an event
STILL_FALLING = 0.1  # smallest fall of the mean log loss from block to block of a loss that comes back
LONGEST = 500  # steps after which every event ends


class SpikeDetector(Stateful):
    """Judge the loss of every reading; ``state`` is QUIET, RISEN (in the spike) or FALLEN (recovering)."""

    __slots__ = (
        "baseline", "block", "block_before", "block_change", "block_count", "block_high", "burst_at",
        "burst_loss_at", "burst_peak", "burst_start", "evidence", "fallen_at", "floor", "height", "highs",
        "level", "lone", "negative", "peak", "pending", "pending_start", "recent", "same_rows", "slow_rise",
        "start", "state", "stayed", "streak", "streak_readings",
    )  # fmt: skip

    def __init__(self) -> None:
        self.state = QUIET
        self.same_rows = False  # each step has the same rows, as far as is known
        self.baseline = LossBaseline()
        self.slow_rise = SlowRise()
        self.lone = 0.0  # fading number of high losses that led to nothing
        self.pending = 0  # high losses since ``pending_start``, which may still lead to a slingshot
        self.pending_start = 0
        self.streak = 0  # number of high readings in a streak that may become an event
        self.streak_readings = 0  # readings since the streak began
        self.evidence = 0.0  # sum of their rises in σ, less ``LEAK`` for each
        self.start = 0  # first step of that streak, and so of the event
        self.burst_start = 0  # first step of the last burst; 0: none yet
        self.burst_at = 0  # last step of the last burst
        self.burst_loss_at = 0  # last step whose loss may belong to a burst
        self.burst_peak = 0.0  # largest loss of the last burst
        self.level = math.nan  # the event ends when the loss falls below this
        self.height = math.nan  # within an event, a loss at or above this is a new rise
        self.floor = math.nan  # the loss before the event: its running (geometric) average
        self.highs = 0  # high losses of the event
        self.peak = 0.0  # largest loss of the streak or the event
        self.fallen_at = 0  # last step of the event at which the loss was high, or fell below ``level``
        self.stayed = math.nan  # the loss at the end of the last event if it did not come back, else NaN
        self.recent = math.nan  # average of log loss over about 10 readings of the event
        self.block = 0.0  # sum of log loss in this block of the event
        self.block_before = math.inf  # mean log loss of the block before
        self.block_change = 0.0  # sum of absolute changes of log loss in this block
        self.block_count = 0  # readings in this block
        self.block_high = 0  # readings of this block at or above ``level``
        self.negative = False  # the loss was below zero by more than rounding: it is judged no more

    def update(
        self, step: int, loss: float, tau: float, limits: Thresholds, *, same_rows: bool = False
    ) -> str:
        """Judge a loss; return the new state. NaN and Inf are skipped: they have an alert of their own.

        ``same_rows``: each step is known to have the same rows, so none of them is a hard minibatch.
        """
        self.same_rows = same_rows
        if not math.isfinite(loss) or self.negative:
            return self.state
        if loss < 0.0:
            if loss <= -limits.spike_low * self.baseline.unit:  # a negative loss has no logarithm
                self.negative = True
                if self.state == RISEN:
                    self.fallen_at = step
                self.state, self.streak, self.evidence = QUIET, 0, 0.0
                return self.state
            loss = 0.0  # rounding can put a divergence that is nearly 0 slightly below 0
        if self.state == QUIET:
            self._look_for_rise(step, loss, limits)
        else:
            self._follow_event(step, loss, tau, limits)
        return self.state

    def usual_below(self, limits: Thresholds, ahead: int = 0) -> float:
        """Return the loss below which the next reading cannot begin a spike.

        A loss from 0 to this value only updates the averages.  ``ahead``: number of readings after which this
        still holds, if each of their losses is at least as large as the average.
        """
        if self.state != QUIET or self.streak:
            return -math.inf
        if self.baseline.readings + ahead < MEMORY:
            return math.inf
        baseline = self.baseline
        usual = highest_usual(math.exp(baseline.level), limits, baseline.unit)
        return min(usual, self.slow_rise.usual_below(baseline, limits))

    def least_of_each(self, limits: Thresholds) -> tuple[float, float]:
        """Return the least losses of a climb and of a leap from where the loss is now."""
        return self._highest_of_each(self.baseline.level, limits)

    def state_dict(self) -> dict[str, Any]:
        """Return name → value of each attribute, those of the baseline among them."""
        state = super().state_dict()
        del state["baseline"]
        return state | self.baseline.state_dict() | {"slow_rise": self.slow_rise.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, also by an earlier version."""
        super().load_state_dict({name: value for name, value in state.items() if name != "slow_rise"})
        self.slow_rise = SlowRise()
        self.slow_rise.load_state_dict(state.get("slow_rise", {}))  # earlier versions had none
        self.baseline.load_state_dict(state)
        if "slow" not in state:  # earlier versions had one average and one noise
            self.recent = self.baseline.last

    # --- before an event -------------------------------------------------------------------------------

    def _look_for_rise(self, step: int, loss: float, limits: Thresholds) -> None:
        """Begin an event if the loss has risen; else update the running averages."""
        if self.baseline.readings < MEMORY:
            self.baseline.find_unit(loss)
        floor = limits.spike_floor * self.baseline.unit
        log_loss = math.log(loss if loss > floor else floor)
        if self.baseline.readings >= MEMORY:
            if self._rises_slowly(step, loss, log_loss, limits):
                self.start, self.peak = min(self.slow_rise.since, step), loss
                self.streak = 2 * LENGTH  # so many losses were high
                self._begin(log_loss, self.slow_rise.floor, self.slow_rise.height, limits)
                return
            base = self.baseline.level
            rise = log_loss - base
            # loss · rise is at least the rise of the loss itself. So this holds for every loss that counts.
            if (
                self.streak
                or rise > limits.spike_rise
                or rise > limits.spike_burst * DECADE
                or loss * rise > limits.spike_nats * self.baseline.unit
            ) and self._stands_out(step, loss, log_loss, base, limits):
                if self._is_slingshot(rise, limits):
                    self._begin(log_loss, base, min(self._highest_of_each(base, limits)), limits)
                return  # a starting spike must not raise its own baseline
        self.baseline.add(log_loss, limits)
        self.lone *= FORGETS

    def _highest_of_each(self, base: float, limits: Thresholds) -> tuple[float, float]:
        baseline = self.baseline
        return highest_of_each(math.exp(base), limits, baseline.unit, of_head=baseline.of_head)

    def _rises_slowly(self, step: int, loss: float, log_loss: float, limits: Thresholds) -> bool:
        """Return whether this loss completes a slow rise."""
        visible = math.log(VISIBLE * limits.spike_low * self.baseline.unit)
        self.slow_rise.add(step, max(log_loss, visible), self.baseline, limits)
        return loss > self.slow_rise.height

    def _stands_out(self, step: int, loss: float, log_loss: float, base: float, limits: Thresholds) -> bool:
        """Return whether this loss may belong to a slingshot; add it to the streak, and to a burst."""
        climbs, leaps = self._highest_of_each(base, limits)
        low = limits.spike_low * self.baseline.unit
        is_low = base < math.log(low)
        if self.baseline.readings < SLOW_MEMORY and not is_low:
            # While the loss first falls, only a loss far above those at which the run began counts.
            climbs = max(climbs, DIVERGED * self.baseline.highest)
        rise = log_loss - base
        bursts = rise > limits.spike_burst * DECADE
        if not (loss > climbs or loss > leaps or bursts or self.streak):
            return False
        # In σ of log loss, not of the loss: where the noise is small beside the loss, both are the same.
        sigmas = rise / self.baseline.sigma
        if bursts and sigmas > limits.spike_sigmas:
            self._note_burst(step, loss)
        visible = math.log(VISIBLE * low)
        rise_visible = max(log_loss, visible) - max(base, visible)
        sigmas_visible = rise_visible / self.baseline.sigma_visible
        clear = sigmas_visible >= (ENOUGH if is_low else ENOUGH_HIGH) * limits.spike_sigmas
        if self.same_rows and is_low and loss > ABOVE_ALL * self.baseline.highest:
            # The same rows have no hard minibatches, so the loss was never this high by chance.  A hinge loss
            # jumps between 0 and 1e-3: in decades, that noise hides everything.
            clear, sigmas_visible = True, max(sigmas_visible, SIGMA_CAP)
        leap = loss > leaps and sigmas >= ENOUGH * limits.spike_sigmas
        high = leap or (clear and loss > climbs)
        if not (high or self.streak):
            return False
        # In a streak, a loss that has risen half of the way counts, too: an oscillation has low losses.
        half_way = math.exp(0.5 * (base + math.log(climbs)))
        counts = high or (clear and loss > max(low, half_way))
        self._extend_streak(
            step, loss, max(sigmas, sigmas_visible) if leap else sigmas_visible, counts=counts
        )
        return counts

    def _note_burst(self, step: int, loss: float) -> None:
        """Record a loss of a burst, which has two such losses within three steps, and pauses up to MEMORY."""
        before, self.burst_loss_at = self.burst_loss_at, step
        if 0 < step - before <= 3:
            if not 0 <= step - self.burst_at <= MEMORY:
                self.burst_start, self.burst_peak = before, 0.0
            self.burst_at, self.burst_peak = step, max(self.burst_peak, loss)

    def _extend_streak(self, step: int, loss: float, sigmas: float, *, counts: bool) -> None:
        """Begin a streak with a high loss, or add a loss to it; end a streak that leads to nothing."""
        if self.streak == 0:
            self.start, self.evidence, self.streak_readings, self.peak = step, 0.0, 0, 0.0
        self.peak = max(self.peak, loss)
        self.streak += counts
        self.streak_readings += 1
        self.evidence += min(max(sigmas, 0.0), SIGMA_CAP) - LEAK
        if self.evidence > 0.0 and self.streak_readings <= LONGEST_STREAK:
            return
        # A slingshot often begins with a few jumps. They count as noise only if no slingshot follows.
        if not 0 <= self.start - self.pending_start <= MEMORY:
            self.lone += self.pending
            self.pending, self.pending_start = 0, self.start
        self.pending += self.streak
        self.streak, self.evidence = 0, 0.0

    def _is_slingshot(self, rise: float, limits: Thresholds) -> bool:
        """Return whether the streak is long enough."""
        noisy = self.baseline.sigma > NOISY
        needed = 2 if self.same_rows else min(2 + noisy + int(self.lone), MOST_NEEDED)
        if rise < SHALLOW:
            needed = max(needed, LASTING)
        if self.streak < needed:
            return False
        if self.evidence > 2.0 * limits.spike_sigmas:
            return True
        n = self.streak_readings
        return self.streak >= LASTING and self.evidence + LEAK * n > 1.2 * limits.spike_sigmas * math.sqrt(n)

    # --- in an event -----------------------------------------------------------------------------------

    def _begin(self, log_loss: float, base: float, height: float, limits: Thresholds) -> None:
        """Begin an event. ``base``: log of the loss before. ``height``: the least loss of a rise."""
        self.floor, self.height = math.exp(base), height
        if base < math.log(limits.spike_low * self.baseline.unit):
            back = min(self.height, limits.spike_low * self.baseline.unit)
        else:
            back = math.sqrt(self.floor * self.height)
        noisy = math.exp(base + 0.5 * limits.spike_sigmas * self.baseline.sigma)
        self.level = max(back, min(noisy, self.height))
        self.state, self.stayed, self.highs = RISEN, math.nan, self.streak
        self.streak, self.evidence, self.pending, self.fallen_at = 0, 0.0, 0, self.start
        self.recent, self.block_before = log_loss, math.inf
        self._begin_block()
        self._note_peak(limits)

    def _note_peak(self, limits: Thresholds) -> None:
        """Raise the levels of a leap that reaches Wu's upper level: it ends at his lower level."""
        high, low = limits.spike_high * self.baseline.unit, limits.spike_low * self.baseline.unit
        if self.peak > high > self.height:
            self.height, self.level = high, max(self.level, low)

    def _follow_event(self, step: int, loss: float, tau: float, limits: Thresholds) -> None:
        """Update the event with a loss; end it if the loss has come back, or stays."""
        if step < self.fallen_at:  # the step counter was set back: the elapsed time is unknown
            self.start, self.fallen_at = min(self.start, step), step
        if loss > self.peak:
            self.peak = loss
            self._note_peak(limits)
        high = loss >= self.level
        if high:
            self.highs += 1
            # An aftershock below ``height`` only prolongs the recovery.
            self.fallen_at = step
            if loss >= self.height:
                self.state = RISEN
        elif self.state == RISEN:
            self.state, self.fallen_at = FALLEN, step
        elif step - self.fallen_at >= recovery_steps(tau, limits):
            self._end()
            return
        log_loss = math.log(max(loss, limits.spike_floor * self.baseline.unit))
        self.recent += 0.1 * (log_loss - self.recent)
        self.block += log_loss
        self.block_change += abs(log_loss - self.baseline.last)
        self.block_count += 1
        self.block_high += high
        self.baseline.last = log_loss
        late = step - self.start > LONGEST
        if self.block_count >= BLOCK or late:
            self._end_block(loss, late=late)

    def _begin_block(self) -> None:
        self.block = self.block_change = 0.0
        self.block_count = self.block_high = 0

    def _end_block(self, loss: float, *, late: bool) -> None:
        """End the event if the loss no longer falls, or if the event is ``late``; else begin a block."""
        mean = self.block / self.block_count
        high = 2 * self.block_high > self.block_count
        if high and (late or mean > self.block_before - STILL_FALLING):
            # The loss stays at a new level, which becomes the baseline.
            self.state, self.stayed = QUIET, loss
            self.baseline.restart(mean, self.block_change / self.block_count)
            self.slow_rise.restart()
        elif late:
            # High losses came again and again, and the loss was low in between: that is the run's noise.
            self.lone += MOST_NEEDED
            self._end()
        self.block_before = mean
        self._begin_block()

    def _end(self) -> None:
        """End an event whose loss has come back. What it still lies above the old averages is no new rise."""
        self.state = QUIET
        self.baseline.raise_to(self.recent)
        self.slow_rise.restart()
        if self.highs <= FEW:
            self.lone += 1.0


def recovery_steps(tau: float, limits: Thresholds) -> float:
    """Return for how many steps the loss must stay low before a new event may begin."""
    return min(max(limits.recovered * tau, 10.0), 200.0)
