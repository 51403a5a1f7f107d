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


@dataclass(frozen=True)
class Causes:
    """Smoothed signals in the steps before the event; NaN where a signal was not seen."""

    violation: float  # zero-sum violation; NaN also where the loss breaks the zero-sum by design
    rms_t: float  # largest RMS_t of the last τ
    decay: float  # decades that sqrt(v̂) has fallen
    curvature: float  # largest secant curvature × lr of the last τ
    stability_limit: float  # 2(1+β1)/(1−β1); NaN without Adam's β1
    decoupled_decay: bool  # AdamW-style weight decay is on


def name_mechanism(causes: Causes, rms_t_limit: float) -> tuple[Mechanism, float]:
    """(mechanism, confidence in [0, 1])."""
    violation = causes.violation
    if violation >= NUMERIC_ABOVE:
        strength = min(1.0, math.log(violation / NUMERIC_ABOVE) / math.log(4.0))
        return Mechanism.NUMERICAL_FEATURE_INFLATION, 0.6 + 0.35 * strength
    doubt = 0.0 if violation < NUMERIC_BELOW else 0.2  # NaN (not seen) and the grey zone alike
    behind = causes.rms_t >= rms_t_limit
    steep = causes.curvature >= causes.stability_limit
    forgotten = causes.decay <= -0.3  # sqrt(v̂) is half of what it was, or less
    if behind and forgotten and causes.decoupled_decay:
        return Mechanism.SECOND_MOMENT, (0.8 if not steep else 0.6) - doubt
    if steep:
        return Mechanism.EDGE_OF_STABILITY, (0.6 if behind else 0.5) - doubt
    if behind and forgotten:
        return Mechanism.SECOND_MOMENT, 0.6 - doubt
    return Mechanism.UNKNOWN, 0.0
