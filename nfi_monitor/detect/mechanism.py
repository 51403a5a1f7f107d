"""Name the cause, with the evidence it rests on.

A violation proves that rounding is at work, not that nothing else is; the proof is a replay.
"""

from __future__ import annotations

import math

from nfi_monitor.detect.causes import JUMP, NUMERIC_ABOVE, NUMERIC_BELOW, UNMOVED, Causes
from nfi_monitor.detect.rules import RULES
from nfi_monitor.types import Mechanism


def name_mechanism(causes: Causes) -> tuple[Mechanism, float]:
    """Return (mechanism, confidence in [0, 1])."""
    violation = causes.violation
    if violation >= NUMERIC_ABOVE:
        strength = min(1.0, math.log(violation / NUMERIC_ABOVE) / math.log(4.0))
        return Mechanism.NUMERICAL_FEATURE_INFLATION, 0.6 + 0.35 * strength
    # Not seen, or in the grey zone between rounding and not: everything else is less certain.
    doubt = 0.0 if violation < NUMERIC_BELOW or causes.no_classes else 0.2
    if causes.learning_rate_jump >= JUMP:
        return Mechanism.EXTERNAL, 0.8 - doubt
    # The last rule is the nearest to the event: it knows best.
    for rule in reversed(RULES):
        found = rule.cause(causes) if rule.name in causes.on else None
        if found is not None:
            return found[0], found[1] - doubt
    if causes.curvature >= causes.stability_limit:
        return Mechanism.EDGE_OF_STABILITY, 0.6 - doubt
    if causes.update_jump <= UNMOVED and causes.rms_t <= UNMOVED:
        return Mechanism.EXTERNAL, 0.6 - doubt
    return Mechanism.UNKNOWN, 0.0
