"""Name the cause, with the evidence it rests on.

The zero-sum violation tells numeric slingshots from all others: medians before a spike .11–.99
against 1e-8 (spikes that survive float64) and 1e-3 (early instability).  The cosine of the global
means, RMS_t and the decay of the second moment overlap between mechanisms: alone they decide nothing.
A violation proves that rounding is at work, not that nothing else is; the proof is a replay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nfi_monitor.types import Mechanism

NUMERIC_ABOVE = 0.05
"""Zero-sum violation above which rounding is at work ..."""
NUMERIC_BELOW = 0.01
"""... and below which it is not; between the two, nobody knows."""


FORGOTTEN = -0.3
"""Decades: sqrt(v̂) is half of its recent maximum or less. More is not needed: before hinge-loss
slingshots it has fallen 2 to 20 times, and "fell a hundredfold" is a wrong alarm."""


LEARNED = 2.0
"""Steps, in τ, before a second moment can have forgotten: until then bias correction makes it an average over
all gradients so far, and holding it averted nothing (0 of 3 replayed)."""


JUMP = 3.0
"""Factor by which the learning rate leaves its own average in a step: no schedule that warms up does."""
UNMOVED = 1.5
"""Update RMS against its own average up to which the last update was an ordinary one: then it was not the
weights that made the loss rise."""


@dataclass(frozen=True)
class Causes:
    """Signals in the steps before the event; NaN where a signal was not seen."""

    step: int  # the reading that they are of
    violation: float  # zero-sum violation, smoothed; NaN also where the loss breaks it by design
    no_classes: bool  # the head has one output: absorption of a correct class does not exist
    kicked: bool  # RMS_t rose above its limit before the loss did
    coasting: bool  # no gradient to speak of: weight decay alone moved the weights
    gone: bool  # within the last τ there was next to no gradient, on a second moment that had LEARNED one
    swinging: bool  # successive gradients opposed each other, and the features swung with growing amplitude
    decay: float  # decades that sqrt(v̂) had fallen
    curvature: float  # largest secant curvature × lr just before
    stability_limit: float  # 2(1+β1)/(1−β1)
    learning_rate_jump: float  # against its own average
    update_jump: float  # RMS of the last update before the event, against its own average
    rms_t: float  # largest of the last few steps before the event


def name_mechanism(causes: Causes) -> tuple[Mechanism, float]:
    """(mechanism, confidence in [0, 1])."""
    violation = causes.violation
    if violation >= NUMERIC_ABOVE:
        strength = min(1.0, math.log(violation / NUMERIC_ABOVE) / math.log(4.0))
        return Mechanism.NUMERICAL_FEATURE_INFLATION, 0.6 + 0.35 * strength
    # Not seen, or in the grey zone between rounding and not: everything else is less certain.
    doubt = 0.0 if violation < NUMERIC_BELOW or causes.no_classes else 0.2
    if causes.learning_rate_jump >= JUMP:
        return Mechanism.EXTERNAL, 0.8 - doubt
    forgotten = causes.decay <= FORGOTTEN
    steep = causes.curvature >= causes.stability_limit
    # In the last steps both look alike: a kick is thrown back and forth, a swing refills the second moment.
    # What came before tells: only where the gradient was gone did the second moment let go of it for nothing.
    if causes.kicked or causes.swinging:
        if forgotten and causes.gone:
            return Mechanism.SECOND_MOMENT, 0.9 - doubt
        return Mechanism.EDGE_OF_STABILITY, (0.9 if causes.swinging else 0.8) - doubt
    if forgotten and causes.coasting:
        return Mechanism.SECOND_MOMENT, 0.8 - doubt
    if steep:
        return Mechanism.EDGE_OF_STABILITY, 0.6 - doubt
    if causes.update_jump <= UNMOVED and causes.rms_t <= UNMOVED:
        return Mechanism.EXTERNAL, 0.6 - doubt
    return Mechanism.UNKNOWN, 0.0
