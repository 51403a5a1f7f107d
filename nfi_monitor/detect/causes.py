"""The signals by which a cause is named, and the levels that tell causes apart.

The zero-sum violation tells numeric slingshots from all others: medians before a spike .11–.99
against 1e-8 (spikes that survive float64) and 1e-3 (early instability).  The cosine of the global
means, RMS_t and the decay of the second moment overlap between mechanisms: alone they decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

NUMERIC_ABOVE = 0.05
"""Zero-sum violation from which on rounding is at work."""
NUMERIC_BELOW = 0.01
"""Zero-sum violation below which rounding is not at work. Between the two levels, nobody knows."""
FORGOTTEN = -0.3
"""Decades: sqrt(v̂) is half of its recent maximum or less. More is not needed: before hinge-loss
slingshots it has fallen 2 to 20 times, and "fell a hundredfold" is a wrong alarm."""
LEARNED = 2.0
"""Steps, in τ, before a second moment can have forgotten. Until then bias correction makes it an average over
all gradients so far, and holding it averted nothing (0 of 3 replayed)."""
JUMP = 3.0
"""Factor by which the learning rate leaves its own average in a step: no schedule that warms up does."""
UNMOVED = 1.5
"""Largest ratio of an ordinary update's RMS to its own average. After such an update it was not the weights
that made the loss rise.
"""


@dataclass(frozen=True)
class Causes:
    """Signals in the steps before the event. A signal that was not seen is NaN."""

    step: int  # the reading that the signals are of
    violation: float  # zero-sum violation, smoothed; NaN also where the loss breaks it by design
    no_classes: bool  # the head has one output: absorption of a correct class does not exist
    on: tuple[str, ...]  # names of the rules that were on
    gone: bool  # within the last τ there was next to no gradient, on a second moment that had LEARNED one
    decay: float  # decades that sqrt(v̂) had fallen
    curvature: float  # largest secant curvature × lr just before
    stability_limit: float  # 2(1+β1)/(1−β1)
    learning_rate_jump: float  # against its own average
    update_jump: float  # RMS of the last update before the event, against its own average
    rms_t: float  # largest of the last few steps before the event

    @property
    def forgotten(self) -> bool:
        """Whether the second moment has let go of the gradient."""
        return self.decay <= FORGOTTEN

    def state_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return asdict(self) | {"on": list(self.on)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Causes:
        """Read what :meth:`state_dict` returned, or what version 0.1 saved: it kept a flag for each rule."""
        values = {"gone": False, "step": 0, **state}
        flags = {"kicked": "kicking", "coasting": "coasting", "swinging": "swinging"}
        on = [rule for flag, rule in flags.items() if values.pop(flag, False)]
        return cls(**{**values, "on": tuple(values.get("on", on))})
