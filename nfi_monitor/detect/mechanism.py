"""Name the mechanism of an event from its signals.

A zero-sum violation proves that rounding takes part.  It does not exclude other causes, so causes from
outside are looked for first.  Only a replay proves that rounding is the cause.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nfi_monitor._moved import left
from nfi_monitor.detect.causes import FAR, NUMERIC_ABOVE, NUMERIC_BELOW, UNMOVED, Causes
from nfi_monitor.detect.outside import BURST, JUMP, LEAP, OutsideWatch
from nfi_monitor.detect.rules import RULES
from nfi_monitor.detect.smoothing import Hysteresis
from nfi_monitor.types import Mechanism


def name_mechanism(causes: Causes) -> tuple[Mechanism, float]:
    """Return the mechanism and its confidence in [0, 1]."""
    outside = outside_cause(causes)
    if outside:
        return Mechanism.EXTERNAL, outside
    violation = causes.violation
    if violation >= NUMERIC_ABOVE:
        strength = min(1.0, math.log(violation / NUMERIC_ABOVE) / math.log(4.0))
        return Mechanism.NUMERICAL_FEATURE_INFLATION, 0.6 + 0.35 * strength
    # The violation was not measured, or lies between the two levels: all other mechanisms are less certain.
    doubt = 0.0 if violation < NUMERIC_BELOW or causes.no_classes else 0.2
    # Check the last rule first: it switches on nearest to the event.
    for rule in reversed(RULES):
        cause = rule.cause(causes) if rule.name in causes.on else None
        if cause is not None:
            mechanism, confidence = cause
            return mechanism, confidence - doubt
    if causes.curvature >= causes.stability_limit or _gradient_builds_up(causes):
        return Mechanism.EDGE_OF_STABILITY, 0.6 - doubt
    if causes.update_jump <= UNMOVED and not causes.rms_t > UNMOVED:  # NaN: no second moment is known
        return Mechanism.EXTERNAL, 0.6 - doubt
    if causes.outside.burst >= BURST:
        return Mechanism.EXTERNAL, 0.5 - doubt
    if causes.outside.outgrown:
        return Mechanism.EXTERNAL, 0.6 - doubt
    return Mechanism.UNKNOWN, 0.0


def outside_cause(causes: Causes) -> float:
    """Return the confidence that the cause came from outside, or 0 if nothing proves it.

    This is decided before the violation is looked at.  In a run that absorbs, the violation is always there,
    also before a spike that a corrupt batch made.
    """
    outside = causes.outside
    if outside.rate_jump >= JUMP or causes.learning_rate_jump >= JUMP:
        return 0.85
    if outside.corrupt_gradient:
        return 0.85
    if _comes_from_afar(causes):
        return 0.6
    if not outside.unexplained_leap or not set(causes.on).isdisjoint(_BUILD_UPS):
        return 0.0
    if _gradient_builds_up(causes):
        return 0.0
    if not outside.read_before:  # updates may have grown since the last reading
        return 0.6
    if not causes.update_jump > UNMOVED:
        return 0.85
    # An update that has grown may move the logits by more than was measured, but not without limit.
    return 0.7 if outside.leaps_beyond(causes.update_jump) else 0.0


def raised_by_data(causes: Causes) -> bool:
    """Return whether the rows of a step raised the loss, and neither its update nor a corrupt gradient.

    The weights are as good as before.  It happens by design, too: at the next part of a curriculum.
    """
    outside = causes.outside
    jumped = outside.rate_jump >= JUMP or causes.learning_rate_jump >= JUMP
    return outside_cause(causes) > 0 and not (jumped or outside.corrupt_gradient)


def _comes_from_afar(causes: Causes) -> bool:
    """Return whether the loss leapt in a run that absorbs, although the updates hardly moved the logits.

    Before a numeric slingshot they do, and then every step is read.  So something unread came between: a
    corrupt gradient, for example.
    """
    leapt = causes.outside.leap >= LEAP and set(causes.on).isdisjoint(_BUILD_UPS)
    absorbs = causes.violation >= NUMERIC_ABOVE
    return leapt and absorbs and FAR <= causes.approach < math.inf  # infinite: not measured


def _gradient_builds_up(causes: Causes) -> bool:
    """Return whether the gradient grew before the loss did, and the second moment does not know it yet.

    An oscillation may build up between two readings.  A bad batch leaves the gradients before it as they
    were, and a corrupt gradient fills the second moment.
    """
    return causes.outside.gradient_grew and not causes.rms_t <= UNMOVED  # NaN: no second moment is known


def with_outside(
    causes: Causes, watch: OutsideWatch, switches: Mapping[str, Hysteresis], start: int, tau: float
) -> Causes:
    """Add what came from outside before an event that starts at step ``start``. ``tau``: in steps.

    ``switches``: name of a rule → its switch.  What follows a leap is no build-up to it: neither a rule that
    was switched on afterwards nor the update after it counts.
    """
    before = watch.before(start, tau)
    if math.isfinite(before.leap):
        on = tuple([name for name in causes.on if switches[name].since <= watch.leap_at])
        jump = causes.update_jump if causes.step < watch.leap_at else math.nan
        causes = replace(causes, on=on, update_jump=jump)
    return replace(causes, outside=before)


_BUILD_UPS = {"kicking", "overshooting", "swinging", "diverging", "surging", "overreaching", "imminent"}
"""Rules that see an event build up. An event that was seen to come did not come at once."""


if not TYPE_CHECKING:  # for a type checker, any name would exist

    def __getattr__(name: str) -> Any:
        return left(__name__, name)
