"""What a slingshot is, in the loss: where it starts and when it is over.

W. Wu's levels (2024, footnote 6): it starts when the training loss, having been below 1e-2, exceeds 1e-1,
and ends when it is back below 1e-2.  Taken reading by reading they make a slingshot of every minibatch run
whose loss wanders between the two; so "having been below" is said of the running average of log loss, and
the rise has to stand out of the loss's own noise.  A run whose loss never gets that low (a language model)
is held against its own past: a rise beyond ``spike_rise`` nats, on two readings in a row, because one bad
minibatch is no slingshot.  Aftershocks within ``recovered`` τ belong to the same event; a loss that does
not come back has changed its level (a new data set, another schedule), and that becomes the new normal.
"""

from __future__ import annotations

import math

from nfi_monitor.detect.smoothing import Stateful
from nfi_monitor.types import Thresholds

QUIET, RISEN, FALLEN = "quiet", "risen", "fallen"
MEMORY = 50
"""Readings that the running average and the noise of log loss remember, and that both need to begin with."""


class SpikeDetector(Stateful):
    """Feed it the loss of every reading; ``state`` is QUIET, RISEN (in the spike) or FALLEN (recovering)."""

    __slots__ = (
        "average", "fallen_at", "floor", "height", "last", "level", "negative", "noise", "peak", "readings",
        "start", "state", "stayed", "streak",
    )  # fmt: skip

    def __init__(self) -> None:
        self.state = QUIET
        self.average = math.nan  # of log loss
        self.noise = 0.0  # mean absolute change of log loss from reading to reading: blind to a trend
        self.last = math.nan  # log loss of the last reading
        self.readings = 0
        self.streak = 0  # unusual readings in a row
        self.start = 0
        self.level = math.nan  # what the loss must fall below for the event to end
        self.height = math.nan  # what it has to exceed to count as risen
        self.floor = math.nan  # the loss before it rose: its running (geometric) average
        self.peak = 0.0
        self.fallen_at = 0
        self.stayed = math.nan  # where the last event ended without a way back: the loss then
        self.negative = False  # it was below zero by more than rounding: judged no more

    def update(self, step: int, loss: float, tau: float, limits: Thresholds) -> str:
        """The state after this reading. NaN and Inf are not judged: they are an alert of their own."""
        if not math.isfinite(loss) or self.negative:
            return self.state
        if loss <= -limits.spike_low:  # it has no floor to leave, and no logarithm
            self.negative = True
            if self.state == RISEN:
                self.fallen_at = step
            self._end(level_changed=False)
            return self.state
        loss = max(loss, 0.0)  # rounding: a divergence that is fitted may come out a hair below zero
        if self.state == QUIET:
            self._watch(step, loss, limits)
            return self.state
        if step < self.fallen_at:  # the counter was set back: the time that has passed is not known
            self.start, self.fallen_at = min(self.start, step), step
        self.peak = max(self.peak, loss)
        if loss >= self.level:
            # An aftershock: below the height it started at it prolongs the recovery, no more.
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
        """A loss from 0 to this one begins nothing at the next reading: it only adds to the average.

        ``ahead``: readings after which this still holds, if each of them is at least as large as the average.
        """
        if self.state != QUIET:
            return -math.inf
        if self.readings + ahead < MEMORY:
            return math.inf
        return highest_usual(math.exp(self.average), limits)

    def _watch(self, step: int, loss: float, limits: Thresholds) -> None:
        # Below a tenth of Wu's lower level differences mean nothing: 1e-9 and 0 are the same loss.
        log_loss = math.log(max(loss, 0.1 * limits.spike_low))
        spread = self.noise / 1.128  # mean absolute difference of two readings → σ of a normal
        rise = log_loss - self.average
        was_low = self.average < math.log(limits.spike_low)
        visible = self.readings >= MEMORY and loss > limits.spike_high and rise > limits.spike_rise
        clear = visible and rise > limits.spike_sigmas * spread
        fair = visible and rise > 0.5 * limits.spike_sigmas * spread
        self.streak = self.streak + 1 if fair else 0
        if self.streak == 1:
            self.start = step
        if (clear and (was_low or self.streak >= 2)) or self.streak >= 4:
            noisy = math.exp(self.average + 0.5 * limits.spike_sigmas * spread)
            half_way = math.exp(self.average + 0.5 * limits.spike_rise)
            self.level = max(limits.spike_low if was_low else half_way, noisy)
            self.height = max(limits.spike_high, math.exp(self.average + limits.spike_rise), self.level)
            self.state, self.peak, self.streak = RISEN, loss, 0
            self.floor, self.stayed = math.exp(self.average), math.nan
            return
        if fair:
            return  # what may be the beginning of a spike is not averaged into what it is measured by
        self.readings += 1
        if math.isnan(self.average):
            self.average = self.last = log_loss
            return
        # Upwards only so far: the first, small steps of a rise must not raise what it is measured by.
        most = max(3.0 * spread, 0.3) if self.readings > MEMORY else math.inf
        weight = 1.0 / min(self.readings, MEMORY)
        self.noise += weight * (min(abs(log_loss - self.last), most) - self.noise)
        self.average += weight * min(rise, most)
        self.last = log_loss

    def _end(self, *, level_changed: bool) -> None:
        """The event is over; what was normal before it still is, unless the loss stayed where it rose to."""
        self.state, self.streak = QUIET, 0
        if level_changed:
            self.readings, self.average, self.noise, self.last = 0, math.nan, 0.0, math.nan


def highest_usual(loss: float, limits: Thresholds) -> float:
    """The largest loss that begins nothing where the usual one is ``loss``."""
    # A little less than where a rise begins: exp and log round.
    return max(limits.spike_high, (1.0 - 1e-9) * math.exp(limits.spike_rise) * loss)


def recovery_steps(tau: float, limits: Thresholds) -> float:
    """How long the loss must stay back before a new event may begin, in steps."""
    return min(max(limits.recovered * tau, 10.0), 200.0)
