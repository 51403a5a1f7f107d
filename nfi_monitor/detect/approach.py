"""Measure how far updates are from the levels at which *imminent* begins, and what else names a cause."""

from __future__ import annotations

import math

from nfi_monitor.detect.causes import Causes
from nfi_monitor.detect.rules.numeric import Imminent, Inflating
from nfi_monitor.detect.situation import Situation


def growth_to_imminent(now: Situation, *, usual: bool = False) -> float:
    """Return the nats by which δ, or the movement of the layers below, must grow to reach *imminent*.

    0 where it is there; ∞ where neither was measured.  If δ grows, so does its rise, and the level falls with
    the square of the rise (``displacement_level``).  So a factor g of growth counts three times there.
    ``usual``: to the usual levels, not to those that earlier alarms have raised.
    """
    height = 1.0 if usual else now.level_of(Imminent.name)
    return max(min(_of_displacement(now, height), _of_swing(now, height)), 0.0)


def hidden_growth(now: Situation) -> bool:
    """Return whether the layers below the head may move the logits further and further, unmeasured.

    Between minibatches their movement is not known, but the feature mean shows that they grow.
    """
    return now.on(Inflating.name) and now.signals.other_rows


def _of_displacement(now: Situation, height: float) -> float:
    signals, limits = now.signals, now.limits
    delta, rise = signals.displacement, signals.displacement_rise
    if not (delta > 0 and rise > 0):
        return math.inf
    height *= signals.rate_rise
    added_up = delta * now.displacement_steps ** (0.5 if signals.other_rows else 1.0)
    risen = max(
        math.log(limits.imminent_rise / rise),
        math.log(limits.imminent_lowest * height / added_up),
        math.log(limits.imminent_product * height / (added_up * rise**2)) / 3.0,
    )
    return min(math.log(limits.imminent_displacement * height / delta), risen)


def _of_swing(now: Situation, height: float) -> float:
    signals, limits = now.signals, now.limits
    if not (signals.swing > 0 and signals.swell > 0):
        return math.inf
    swing, swell = height * limits.imminent_exit, height * limits.imminent_swell
    return max(math.log(swing / signals.swing), math.log(swell / signals.swell))


def causes_now(now: Situation) -> Causes:
    """Return the present signals in the form that names a mechanism."""
    signals, context = now.signals, now.context
    return Causes(
        step=signals.last_step,
        violation=signals.violation,
        no_classes=context.no_classes,
        on=tuple([name for name, switch in now.switches.items() if switch.on]),
        gone=now.gradient_vanished,
        decay=signals.decay_lowest,
        curvature=signals.curvature_peak,
        stability_limit=context.stability_limit,
        learning_rate_jump=signals.learning_rate_jump,
        update_jump=signals.update_jump,
        rms_t=signals.rms_t_peak,
        approach=math.inf if hidden_growth(now) else growth_to_imminent(now, usual=True),
        outside=now.outside,
    )
