"""What a slingshot is, in the loss: where it starts and when it is over.

W. Wu's rule (2024, footnote 6): it starts when the training loss, having been below 1e-2, exceeds
1e-1, and ends when it is back below 1e-2.  A run whose loss never gets that low (a language model) is
held against its own past instead: a rise of log loss beyond ``spike_rise`` nats and ``spike_sigmas``
robust standard deviations over its running baseline, on two readings in a row, because one bad
minibatch is no slingshot.  Aftershocks within ``recovered`` τ belong to the same event.
"""

from __future__ import annotations

import math

from nfi_monitor.detect.smoothing import Stateful
from nfi_monitor.types import Thresholds

QUIET, RISEN, FALLEN = "quiet", "risen", "fallen"


class SpikeDetector(Stateful):
    """Feed it the loss of every reading; ``state`` is QUIET, RISEN (in the spike) or FALLEN (recovering)."""

    __slots__ = (
        "baseline", "deviation", "fallen_at", "height", "last_step", "level", "peak", "readings", "start",
        "state", "streak", "was_low",
    )  # fmt: skip

    def __init__(self) -> None:
        self.state = QUIET
        self.was_low = False
        self.baseline = math.nan  # of log loss
        self.deviation = math.nan  # mean absolute deviation of log loss
        self.readings = 0
        self.last_step = 0
        self.streak = 0
        self.start = 0
        self.level = math.nan  # what the loss must fall below for the event to end
        self.height = math.nan  # what it has to exceed to count as risen again
        self.peak = 0.0
        self.fallen_at = 0

    def update(self, step: int, loss: float, tau: float, limits: Thresholds) -> str:
        """The state after this reading. NaN and Inf are not judged: they are an alert of their own."""
        if not math.isfinite(loss):
            return self.state
        if self.state == QUIET:
            self._watch(step, loss, tau, limits)
        else:
            self.peak = max(self.peak, loss)
            if loss >= self.level:
                # An aftershock: below the level it started at it prolongs the recovery, no more.
                self.fallen_at = step
                if loss >= self.height:
                    self.state = RISEN
            elif self.state == RISEN:
                self.state, self.fallen_at = FALLEN, step
            elif step - self.fallen_at >= recovery_steps(tau, limits):
                self.state = QUIET
                self.baseline, self.deviation, self.readings = math.nan, math.nan, 0
        self.was_low = loss < limits.spike_low or (self.was_low and self.state == QUIET)
        return self.state

    def _watch(self, step: int, loss: float, tau: float, limits: Thresholds) -> None:
        if self.was_low and loss > limits.spike_high:
            self._rise(step, loss, limits.spike_low, limits.spike_high)
            return
        log_loss = math.log(max(loss, 1e-30))
        rise = log_loss - self.baseline
        spread = 1.2533 * self.deviation  # mean absolute deviation → σ of a normal
        window = min(max(limits.spike_baseline * tau, 50.0), 500.0)
        unusual = (
            self.readings >= 50
            and loss > limits.spike_high  # below it, Wu's levels say that nothing visible happened
            and not self.was_low
            and rise > max(limits.spike_rise, limits.spike_sigmas * spread)
        )
        self.streak = self.streak + 1 if unusual else 0
        if unusual:
            if self.streak == 1:
                self.start = step
            if self.streak >= 2:
                level = math.exp(self.baseline + 0.5 * limits.spike_rise)
                self._rise(self.start, loss, level, math.exp(self.baseline + limits.spike_rise))
            return
        gap = max(step - self.last_step, 1)
        weight = 1.0 - math.exp(-gap / window)
        if math.isnan(self.baseline):
            self.baseline, self.deviation = log_loss, 0.0
        else:
            self.deviation += weight * (abs(log_loss - self.baseline) - self.deviation)
            self.baseline += weight * (log_loss - self.baseline)
        self.readings += 1
        self.last_step = step

    def _rise(self, step: int, loss: float, level: float, height: float) -> None:
        self.state, self.start, self.peak, self.streak = RISEN, step, loss, 0
        self.level, self.height = level, height


def recovery_steps(tau: float, limits: Thresholds) -> float:
    """How long the loss must stay back before a new event may begin, in steps."""
    return min(max(limits.recovered * tau, 10.0), 200.0)
