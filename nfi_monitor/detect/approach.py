"""Measure how far updates are from the levels at which *imminent* begins while rows are absorbed."""

from __future__ import annotations

import math

from nfi_monitor.detect.rules.numeric import Imminent
from nfi_monitor.detect.situation import Situation


def growth_to_imminent(now: Situation) -> float:
    """Return the nats by which δ, or the movement of the layers below, must grow to reach *imminent*.

    0 where it is there; ∞ where neither was measured.  If δ grows, so does its rise, and the level falls with
    the square of the rise (``displacement_level``).  So a factor g of growth counts three times there.
    """
    return max(min(_of_displacement(now), _of_swing(now)), 0.0)


def _of_displacement(now: Situation) -> float:
    signals, limits = now.signals, now.limits
    delta, rise = signals.displacement, signals.displacement_rise
    if not (delta > 0 and rise > 0):
        return math.inf
    height = signals.rate_rise * now.level_of(Imminent.name)
    added_up = delta * now.displacement_steps ** (0.5 if signals.other_rows else 1.0)
    risen = max(
        math.log(limits.imminent_rise / rise),
        math.log(limits.imminent_lowest * height / added_up),
        math.log(limits.imminent_product * height / (added_up * rise**2)) / 3.0,
    )
    return min(math.log(limits.imminent_displacement * height / delta), risen)


def _of_swing(now: Situation) -> float:
    signals, limits, height = now.signals, now.limits, now.level_of(Imminent.name)
    if not (signals.swing > 0 and signals.swell > 0):
        return math.inf
    swing, swell = height * limits.imminent_exit, height * limits.imminent_swell
    return max(math.log(swing / signals.swing), math.log(swell / signals.swell))
