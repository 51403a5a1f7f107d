"""How many optimizer steps are left.

δ, the displacement of one update in nats, grows exponentially before a numeric slingshot; the loss
feels it when it is about one nat.  Two rates drive it: what is measured, and the second moment's own
decay, under which a constant gradient gives updates that grow by −½ ln β2 a step (Liu et al. 2026,
section 3: gradients flat at the absorbed floor).  steps ≈ ln(1/δ) / max(measured slope, −½ ln β2).
"""

from __future__ import annotations

import math

SPREAD = 2.0
"""Factor of the interval around the median: measured, within 2× in four cases of five at 3–10 τ."""


def steps_to_spike(
    displacement: float, slope: float, beta2: float, tau: float
) -> tuple[int, int, int] | None:
    """(low, median, high) in steps, or None where a number would be a guess.

    ``displacement`` δ rms in nats, ``slope`` d ln δ / d step.  None inside the last τ: there the state
    *imminent* says all there is to say.
    """
    if not (math.isfinite(displacement) and displacement > 0):
        return None
    rate = max(slope if math.isfinite(slope) else 0.0, -0.5 * math.log(beta2) if 0 < beta2 < 1 else 0.0)
    if rate <= 0 or displacement >= 1.0:
        return None
    median = -math.log(displacement) / rate
    if median < tau or median > 1e6:
        return None
    return round(median / SPREAD), round(median), round(median * SPREAD)
