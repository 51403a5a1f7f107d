"""Keep the usual level of the loss, its noise and its unit.

A rise of the loss is measured from a running average of log loss, in standard deviations.

- The average is the larger one of two running averages.  While a loss falls quickly, the slower one is
  larger.  So a blip on the way down is compared with earlier losses.
- The noise is the larger one of two scales: the mean change between two losses, and the mean excursion above
  the average.  A loss without a floor (a GAN) wanders slowly, and only the second scale shows that.
"""

from __future__ import annotations

import math
from bisect import insort
from typing import Any

from nfi_monitor.detect.smoothing import Stateful
from nfi_monitor.types import Reading, Thresholds

MEMORY = 50  # losses in the running average and the noise of log loss; before, no slingshot is found
SLOW_MEMORY = 100  # losses in the slow average; before, a climb from above ``spike_low`` must be a divergence
LONG_MEMORY = 200  # losses in the mean excursion above the average, and in which the highest loss fades
FIRST = 20  # number of first losses whose median is the early level
HIGHEST_NATS = 20.0  # largest early level of a cross-entropy: that of 500 million equal classes
VISIBLE = 1e-2
"""Share of ``spike_low`` below which differences are no noise of a climb: a hinge loss jumps between 0 and
1e-4 U once it fits."""
DIFFERS = 0.2
"""Relative difference between an early loss and the head's cross-entropy that shows another loss: a hinge."""
FREE = 0.3  # a change of log loss up to this updates the averages in full


class LossBaseline(Stateful):
    """The running averages and the noise of log loss, and the loss's unit U."""

    __slots__ = (
        "average", "excursion", "excursion_visible", "first", "highest", "last", "last_visible", "nats",
        "noise", "noise_visible", "of_head", "readings", "slow", "unit",
    )  # fmt: skip

    def __init__(self) -> None:
        self.nats: bool | None = True  # the loss is a cross-entropy in nats; None: unknown
        self.of_head = True  # the loss is the cross-entropy of the head's logits: no hinge, no penalties
        self.unit = 1.0  # U
        self.first: list[float] = []  # the first losses in ascending order, until U is known
        self.average = math.nan  # running average of log loss
        self.slow = math.nan  # slower running average of log loss
        self.noise = 0.0  # mean absolute change of log loss from reading to reading: a trend hardly counts
        self.excursion = 0.0  # mean of max(log loss − average, 0)
        self.last = math.nan  # log loss of the last reading
        self.noise_visible = 0.0  # the same three of the loss without its smallest differences
        self.excursion_visible = 0.0
        self.last_visible = math.nan
        self.readings = 0  # number of readings in the average
        self.highest = 0.0  # largest loss; it fades within about LONG_MEMORY losses

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, also by an earlier version."""
        super().load_state_dict(state)
        self.first.sort()  # earlier versions kept the order in which they came
        if "of_head" not in state:
            self.of_head = self.nats is True
        if "highest" not in state:
            self.highest = self.unit
        if "slow" not in state:  # earlier versions had one average and one noise
            self.slow, self.last_visible, self.noise_visible = self.average, self.last, self.noise

    @property
    def level(self) -> float:
        """Log of the loss from which a rise is measured."""
        return self.average if self.average > self.slow else self.slow

    @property
    def early(self) -> float:
        """The loss at which the run began, if it is the cross-entropy of the head's logits; else ∞."""
        known = len(self.first) == FIRST or self.readings >= MEMORY  # an earlier version kept fewer losses
        early = self.first[len(self.first) // 2] if known and self.first else math.inf
        return early if self.of_head and 0.0 < early <= HIGHEST_NATS else math.inf

    @property
    def sigma(self) -> float:
        """Standard deviation of log loss."""
        return _spread(self.noise, self.excursion)

    @property
    def sigma_visible(self) -> float:
        """Standard deviation of log loss without its smallest differences."""
        return _spread(self.noise_visible, self.excursion_visible)

    def find_kind(self, reading: Reading, *, no_classes: bool, broken: bool) -> None:
        """Note from an early reading whether the loss is a cross-entropy, and that of the head.

        ``no_classes``: the head has a single output.  ``broken``: the loss breaks the zero-sum by design.
        A loss that differs from the head's cross-entropy may be a hinge, or a cross-entropy with a penalty.
        """
        if self.readings < MEMORY:
            head = reading.get("head_loss")
            differs = abs(reading.get("loss") - head) > DIFFERS * head
            self.nats = False if no_classes else None if broken or differs else True
            self.of_head = self.nats is True

    def add(self, log_loss: float, limits: Thresholds) -> None:
        """Add a log loss to the running averages."""
        self.readings = readings = self.readings + 1
        floor = math.log(VISIBLE * limits.spike_low * self.unit)
        visible = log_loss if log_loss > floor else floor
        if readings == 1:
            self.average = self.slow = self.last = log_loss
            self.last_visible = visible
            return
        fades = 1.0 - 1.0 / LONG_MEMORY if readings > SLOW_MEMORY else 1.0
        self.highest = max(math.exp(log_loss), self.highest * fades)
        average = self.average
        rise, change, slow_rise = log_loss - average, abs(log_loss - self.last), log_loss - self.slow
        above = visible - (average if average > floor else floor)
        change_visible = abs(visible - self.last_visible)
        if readings <= MEMORY:
            weight = slow_weight = long_weight = 1.0 / readings
        else:
            weight = 1.0 / MEMORY
            slow_weight = 1.0 / (readings if readings < SLOW_MEMORY else SLOW_MEMORY)
            long_weight = 1.0 / (readings if readings < LONG_MEMORY else LONG_MEMORY)
            if rise > FREE or change > FREE:
                # Cap upward updates, so that the first, small steps of a spike do not raise its own baseline.
                cap = max(3.0 * self.sigma, FREE)
                cap_visible = max(3.0 * self.sigma_visible, FREE)
                if rise > cap:
                    rise, slow_rise = cap, min(slow_rise, cap)
                if above > cap_visible:
                    above = cap_visible
                change = change if change < cap else cap
                change_visible = change_visible if change_visible < cap_visible else cap_visible
        self.average = average + weight * rise
        self.slow += slow_weight * slow_rise
        self.noise += weight * (change - self.noise)
        self.noise_visible += weight * (change_visible - self.noise_visible)
        self.excursion += long_weight * ((rise if rise > 0.0 else 0.0) - self.excursion)
        self.excursion_visible += long_weight * ((above if above > 0.0 else 0.0) - self.excursion_visible)
        self.last, self.last_visible = log_loss, visible

    def find_unit(self, loss: float) -> None:
        """Set the unit from the early level: the median of the first losses."""
        if len(self.first) < FIRST:
            insort(self.first, loss)
        early = self.first[len(self.first) // 2]
        if early == 0.0:
            self.unit = 1.0
        elif self.nats is False or early > HIGHEST_NATS:
            self.unit = early
        else:
            # If unknown: a regression that begins at .3 has a smaller unit; a language model at 11 has not.
            self.unit = 1.0 if self.nats else min(early, 1.0)

    def restart(self, level: float, noise: float) -> None:
        """Continue from another level and noise of log loss."""
        self.average = self.slow = level
        self.noise = self.noise_visible = noise
        self.excursion = self.excursion_visible = noise / (1.128 * 2.507)

    def raise_to(self, level: float) -> None:
        """Raise the averages to at least ``level``."""
        self.average, self.slow = max(self.average, level), max(self.slow, level)


def highest_usual(loss: float, limits: Thresholds, unit: float = 1.0) -> float:
    """Return the largest loss that cannot begin a spike, where the average loss is ``loss``."""
    # Slightly less than the exact limit, because exp and log round.
    return (1.0 - 1e-9) * min(highest_of_each(loss, limits, unit))


def highest_of_each(
    loss: float, limits: Thresholds, unit: float, *, of_head: bool = True
) -> tuple[float, float]:
    """Return the largest losses that are no climb, and no leap, where the average loss is ``loss``.

    ``of_head``: the loss is the cross-entropy of the head's logits.
    """
    climb = min(loss + limits.spike_nats * unit, loss * math.exp(limits.spike_rise))
    leap = loss * 10.0**limits.spike_leap
    # A hinge loss that is 0 says nothing about the margins. So the decades above it say nothing, either.
    visible = limits.spike_leap_loss if of_head else limits.spike_low
    return max(climb, limits.spike_high * unit), max(leap, visible * unit)


def _spread(noise: float, excursion: float) -> float:
    """Return σ of log loss from its mean absolute change and its mean excursion above the average."""
    # Of a normal distribution, σ is the mean absolute difference of two readings / 1.128, and 2.507 times
    # the mean of the positive part.
    changes, above = noise / 1.128, 2.507 * excursion
    spread = changes if changes > above else above
    return spread if spread > 1e-6 else 1e-6
