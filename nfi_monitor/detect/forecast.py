"""How many optimizer steps are left.

δ, the displacement of one update in nats, grows before a numeric slingshot; the loss feels it when over a
twentieth of τ it is about one nat.  Two clocks drive it.  Under a constant gradient Adam's updates grow as
its second moment decays, by −½ ln β2 a step (Liu et al. 2026, section 3: gradients flat at the absorbed
floor); only the absorbed part of the gradient is constant, and its share is what the zero-sum violation
measures.  And the features inflate: that shows in the measured slope of ln δ, noisy as it is.  So

    steps ≈ ln(1/δ) / (−½ ln β2 · violation + 0.3 · slope).

The slope alone lost: the last τ says little about the next ten, and its forecasts were three times too short
at 10 τ.  The first clock alone is right at β2 = .95 and up to three times too long at .99 and .999.
"""

from __future__ import annotations

import math

SPREAD = 2.0
"""Factor of the interval around the median."""
SLOPE = 0.3
"""Share of the measured slope that lasts. Fitted on the proving ground; .2 and .4 do almost as well."""
NEAREST = 4.5
"""τ. Near one nat δ grows no more, and below this the law has nothing to say: the state *imminent* has."""
FARTHEST = 15.0
"""τ. Beyond this the run will have changed."""
LEAVING = 0.5
"""Nats that log loss has risen: it is leaving its floor, and the time for numbers is over."""


def steps_to_spike(
    displacement: float, violation: float, slope: float, loss_rise: float, beta2: float, tau: float
) -> tuple[int, int, int] | None:
    """(low, median, high) in steps, or None where a number would be a guess.

    ``displacement`` δ rms in nats over a twentieth of τ, ``violation`` zero-sum violation in [0, 1],
    ``slope`` d ln δ / d step, ``loss_rise`` nats of log loss above its lowest of late (both NaN where they
    were not seen).
    """
    if not (math.isfinite(displacement) and 0 < displacement < 1 and violation > 0 and 0 < beta2 < 1):
        return None
    rate = -0.5 * math.log(beta2) * violation + (SLOPE * slope if slope > 0 else 0.0)
    median = -math.log(displacement) / rate
    if not NEAREST * tau <= median <= FARTHEST * tau or loss_rise >= LEAVING:
        return None
    return round(median / SPREAD), round(median), round(median * SPREAD)
