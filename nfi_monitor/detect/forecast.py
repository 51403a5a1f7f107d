"""Forecast how many optimizer steps are left before a numeric slingshot.

δ is the displacement of the logits by one update, in nats.  δ grows before a numeric slingshot.  The loss
rises when δ over a twentieth of τ is about one nat.  δ grows for two reasons:

1. The second moment decays.  Under a constant gradient Adam's updates then grow by −½ ln β2 a step (Liu et
   al. 2026, section 3: gradients flat at the absorbed floor).  Only the absorbed part of the gradient is
   constant.  The zero-sum violation measures the share of that part.
2. The features inflate.  The measured slope of ln δ shows this growth, with much noise.

So

    steps ≈ ln(1/δ) / (−½ ln β2 · violation + 0.3 · slope).

Once a slingshot is *imminent*, this formula no longer holds: the rise of δ slows down near one nat.  There
the time left is read from the rise itself, by a law that was measured:

    steps ≈ 8.2 τ / sqrt(rise of δ above its recent minimum)

Fitted on the quick and the full suite.  tests/benchmarks/detection/FROZEN.md shows how right it is on
families on which it was not fitted, the newest of which were trained afterwards.

Rejected: the slope alone, because the last τ says little about the next ten.  Its forecasts were three times
too short at 10 τ.  Rejected: the decay alone, because it is right at β2 = .95, but up to three times too long
at .99 and .999.
"""

from __future__ import annotations

import math

SPREAD = 2.0
"""Factor between the median and the ends of the interval."""
SLOPE = 0.3
"""Share of the measured slope that lasts. Fitted on the proving ground; .2 and .4 do almost as well."""
NEAREST = 4.5
"""Shortest forecast, in τ.

Near one nat δ stops growing, so the formula does not hold below this.  There the phase *imminent* warns."""
FARTHEST = 15.0
"""Longest forecast, in τ. In a longer time the run changes too much."""
LEAVING = 0.5
"""Rise of log loss, in nats, from which on no forecast is given: the loss is already leaving its floor."""

NEAR_SPREAD = 3.0
"""Factor between the median and the ends of the interval of a slingshot that is *imminent*."""
LEAST_RISE = 3.0
"""Smallest rise of δ that tells the time left. Four in five of the readings below belong to runs in which no
slingshot follows."""
AT_NO_RISE = 8.2
"""Time left in τ, extrapolated to a δ that has not risen."""


def steps_when_imminent(rise: float, loss_rise: float, tau: float) -> tuple[int, int, int] | None:
    """Return (low, median, high) in steps once a slingshot is *imminent*, or None where it would be a guess.

    ``rise``: ratio of δ to its recent minimum.  ``loss_rise``: nats of log loss above its recent minimum; NaN
    if it was not measured.
    """
    if not LEAST_RISE <= rise < math.inf or loss_rise >= LEAVING:
        return None
    median = AT_NO_RISE * tau / math.sqrt(rise)
    return max(round(median / NEAR_SPREAD), 1), max(round(median), 1), max(round(median * NEAR_SPREAD), 1)


def steps_to_spike(
    displacement: float,
    violation: float,
    slope: float,
    loss_rise: float,
    beta2: float,
    tau: float,
    clock: float = 1.0,
) -> tuple[int, int, int] | None:
    """Return (low, median, high) in steps, or None where a number would be a guess.

    ``displacement``: δ (RMS) in nats over a twentieth of τ.  ``violation``: zero-sum violation in [0, 1].
    ``slope``: d ln δ / d step.  ``loss_rise``: nats of log loss above its recent minimum.  ``slope`` and
    ``loss_rise`` are NaN if they were not measured.  ``clock``: sqrt(v̂)/(sqrt(v̂) + ε_A) in [0, 1].  The
    closer it is to 0, the less a decay of v̂ makes updates grow.
    """
    if not (math.isfinite(displacement) and 0 < displacement < 1 and violation > 0 and 0 < beta2 < 1):
        return None
    rate = -0.5 * math.log(beta2) * violation * clock + (SLOPE * slope if slope > 0 else 0.0)
    if rate <= 0.0:
        return None
    median = -math.log(displacement) / rate
    if not NEAREST * tau <= median <= FARTHEST * tau or loss_rise >= LEAVING:
        return None
    return round(median / SPREAD), round(median), round(median * SPREAD)
