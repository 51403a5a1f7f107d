"""Recognize slingshots in the loss: where a slingshot starts and when it is over.

W. Wu's levels (2024, footnote 6): a slingshot starts when the training loss, having been below 1e-2, exceeds
1e-1.  It ends when the loss is back below 1e-2.

- Applied to single readings, these levels call every minibatch run a slingshot whose loss wanders between
  them.  So "having been below" refers to the running average of log loss, and the rise must exceed the loss's
  own noise.
- A run whose loss never gets that low (a language model) is compared with its own past.  A rise beyond
  ``spike_rise`` nats starts a slingshot on two readings in a row, because one bad minibatch is no slingshot.
- Aftershocks within ``recovered`` τ belong to the same event.
- A loss that does not come back has changed its level (a new data set, another schedule).  The new level
  becomes the normal one.
"""

from __future__ import annotations

import math

from nfi_monitor.detect.smoothing import Stateful
from nfi_monitor.types import Thresholds

QUIET, RISEN, FALLEN = "quiet", "risen", "fallen"
MEMORY = 50
"""Readings in the running average and the noise of log loss. With fewer readings no slingshot is found."""


class SpikeDetector(Stateful):
    """Judge the loss of every reading; ``state`` is QUIET, RISEN (in the spike) or FALLEN (recovering)."""

    __slots__ = (
        "average", "fallen_at", "floor", "height", "last", "level", "negative", "noise", "peak", "readings",
        "start", "state", "stayed", "streak",
    )  # fmt: skip

    def __init__(self) -> None:
        self.state = QUIET
        self.average = math.nan  # running average of log loss
        self.noise = 0.0  # mean absolute change of log loss from reading to reading: a trend hardly counts
        self.last = math.nan  # log loss of the last reading
        self.readings = 0  # number of readings in the average
        self.streak = 0  # number of readings in a row that may begin a spike
        self.start = 0  # first step of that streak, and so of the event
        self.level = math.nan  # the event ends when the loss falls below this
        self.height = math.nan  # within an event, a loss at or above this is a new rise
        self.floor = math.nan  # the loss before the event: its running (geometric) average
        self.peak = 0.0  # largest loss of the event
        self.fallen_at = 0  # last step of the event at which the loss was high, or fell below ``level``
        self.stayed = math.nan  # the loss at the end of the last event if it did not come back, else NaN
        self.negative = False  # the loss was below zero by more than rounding: it is judged no more

    def update(self, step: int, loss: float, tau: float, limits: Thresholds) -> str:
        """Judge a loss; return the new state. NaN and Inf are skipped: they have an alert of their own."""
        if not math.isfinite(loss) or self.negative:
            return self.state
        if loss <= -limits.spike_low:  # a negative loss has no floor to leave, and no logarithm
            self.negative = True
            if self.state == RISEN:
                self.fallen_at = step
            self._end(level_changed=False)
            return self.state
        loss = max(loss, 0.0)  # rounding can put a divergence that is nearly 0 slightly below 0
        if self.state == QUIET:
            self._look_for_rise(step, loss, limits)
            return self.state
        if step < self.fallen_at:  # the step counter was set back: the elapsed time is unknown
            self.start, self.fallen_at = min(self.start, step), step
        self.peak = max(self.peak, loss)
        if loss >= self.level:
            # An aftershock below ``height`` only prolongs the recovery.
            self.fallen_at = step
            if loss >= self.height:
                self.state = RISEN
            if step - self.start > max(5 * tau, 500.0):
                self._end(level_changed=True)
                self.stayed = loss
        elif self.state == RISEN:
            self.state, self.fallen_at = FALLEN, step
        elif step - self.fallen_at >= recovery_steps(tau, limits):
            self._end(level_changed=False)
        return self.state

    def usual_below(self, limits: Thresholds, ahead: int = 0) -> float:
        """Return the loss below which the next reading cannot begin a spike.

        A loss from 0 to this value only updates the average.  ``ahead``: number of readings after which this
        still holds, if each of their losses is at least as large as the average.
        """
        if self.state != QUIET:
            return -math.inf
        if self.readings + ahead < MEMORY:
            return math.inf
        return highest_usual(math.exp(self.average), limits)

    def _look_for_rise(self, step: int, loss: float, limits: Thresholds) -> None:
        """Begin an event if the loss has risen; else update the running averages."""
        # Below a tenth of Wu's lower level, differences do not matter: 1e-9 and 0 count as equal.
        log_loss = math.log(max(loss, 0.1 * limits.spike_low))
        spread = self.noise / 1.128  # mean absolute difference of two readings → σ of a normal distribution
        rise = log_loss - self.average
        was_low = self.average < math.log(limits.spike_low)
        visible = self.readings >= MEMORY and loss > limits.spike_high and rise > limits.spike_rise
        certain = visible and rise > limits.spike_sigmas * spread
        possible = visible and rise > 0.5 * limits.spike_sigmas * spread
        self.streak = self.streak + 1 if possible else 0
        if self.streak == 1:
            self.start = step
        if (certain and (was_low or self.streak >= 2)) or self.streak >= 4:
            noisy = math.exp(self.average + 0.5 * limits.spike_sigmas * spread)
            half_way = math.exp(self.average + 0.5 * limits.spike_rise)
            self.level = max(limits.spike_low if was_low else half_way, noisy)
            self.height = max(limits.spike_high, math.exp(self.average + limits.spike_rise), self.level)
            self.state, self.peak, self.streak = RISEN, loss, 0
            self.floor, self.stayed = math.exp(self.average), math.nan
            return
        if possible:
            return  # a starting spike must not raise its own baseline
        self.readings += 1
        if math.isnan(self.average):
            self.average = self.last = log_loss
            return
        # Cap upward updates, so that the first, small steps of a spike do not raise its own baseline.
        cap = max(3.0 * spread, 0.3) if self.readings > MEMORY else math.inf
        weight = 1.0 / min(self.readings, MEMORY)
        self.noise += weight * (min(abs(log_loss - self.last), cap) - self.noise)
        self.average += weight * min(rise, cap)
        self.last = log_loss

    def _end(self, *, level_changed: bool) -> None:
        """End the event. Keep the averages, unless the loss stayed at a new level."""
        self.state, self.streak = QUIET, 0
        if level_changed:
            self.readings, self.average, self.noise, self.last = 0, math.nan, 0.0, math.nan


def highest_usual(loss: float, limits: Thresholds) -> float:
    """Return the largest loss that cannot begin a spike, where the average loss is ``loss``."""
    # Slightly less than the level at which a rise begins, because exp and log round.
    return max(limits.spike_high, (1.0 - 1e-9) * math.exp(limits.spike_rise) * loss)


def recovery_steps(tau: float, limits: Thresholds) -> float:
    """Return for how many steps the loss must stay low before a new event may begin."""
    return min(max(limits.recovered * tau, 10.0), 200.0)
