"""Collect the signals that name a cause, and the levels that separate the causes.

The zero-sum violation separates numeric slingshots from all others.  Its median before numeric slingshots is
.11–.99.  It is 1e-8 before spikes that survive float64, and 1e-3 before early instability.  The cosine of the
global means, RMS_t and the decay of the second moment overlap between mechanisms.  None of these three
decides alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nfi_monitor.detect.outside import JUMP, Outside
from nfi_monitor.detect.signals import NUMERIC_ABOVE
from nfi_monitor.schema import decode

NUMERIC_BELOW = 0.01
"""Zero-sum violation below which rounding is not the cause. Between the two levels the cause is uncertain."""
FORGOTTEN = -0.3
"""Decay of sqrt(v̂) in decades at which the second moment counts as decayed: half of its recent maximum.

Rejected: a larger decay, because sqrt(v̂) has fallen only 2 to 20 times before hinge-loss slingshots, and
"fell a hundredfold" is a wrong alarm."""
FALLEN_FAR = -1.5
"""Decay of sqrt(v̂) in decades that shows by itself that the gradient had vanished.

Without a gradient, sqrt(v̂) falls by 0.22 decades per τ at most.  Measured: down to −1.43 before slingshots
that come although the second moment is held."""
STAYS_GONE = 4.0
"""Time in τ for which a vanished gradient counts. It may come back over some τ before the loss rises."""
LEARNED = 2.0
"""Time, in τ, before the second moment can have forgotten a gradient.

Until then bias correction makes it an average over all gradients so far.  Holding it there averted no
slingshot (0 of 3 replayed)."""
__all__ = [
    "FAR", "FORGOTTEN", "JUMP", "LEARNED", "NUMERIC_ABOVE", "NUMERIC_BELOW", "UNMOVED", "Causes", "Outside",
]  # fmt: skip

UNMOVED = 1.5
"""Largest ratio of an ordinary update's RMS to its own average.

If the loss rises after such an update, the weights did not cause the rise."""

FAR = 0.8
"""Least growth of the updates to *imminent*, in nats, from which no numeric slingshot comes at once."""


@dataclass(frozen=True)
class Causes:
    """Signals in the steps before the event. A signal that was not measured is NaN."""

    step: int  # step of the reading that the signals come from
    violation: float  # zero-sum violation, smoothed; NaN also if the loss breaks the zero-sum by design
    no_classes: bool  # the head has one output: no correct class, so no absorption
    on: tuple[str, ...]  # names of the rules that were on
    gone: bool  # the gradient had nearly vanished not long ago, after the second moment had LEARNED it
    decay: float  # log10 of sqrt(v̂) over its maximum: decades, ≤ 0
    curvature: float  # largest secant curvature × lr just before
    stability_limit: float  # 2(1+β1)/(1−β1)
    learning_rate_jump: float  # ratio of the learning rate to its own average
    update_jump: float  # ratio of the RMS of the last update before the event to its own average
    rms_t: float  # largest RMS_t of the last few steps before the event
    approach: float = math.nan  # nats by which updates must grow to reach *imminent* of rounding
    outside: Outside = field(default_factory=Outside)  # what came from outside before the event

    @property
    def forgotten(self) -> bool:
        """Whether the second moment has decayed: sqrt(v̂) is at most half of its recent maximum."""
        return self.decay <= FORGOTTEN

    def state_dict(self) -> dict[str, Any]:
        """Return the fields as plain types."""
        return asdict(self) | {"on": list(self.on)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Causes:
        """Restore what :meth:`state_dict` returned. Version 0.1 saved one flag for each rule instead.

        Raises ValueError for missing fields, and fields of other types.
        """
        flags = {"kicked": "kicking", "coasting": "coasting", "swinging": "swinging"}
        on = [rule for flag, rule in flags.items() if state.get(flag, False)]
        found: Causes = decode(cls, {"gone": False, "step": 0, "on": on, **state})
        return found
