"""Tell whether anything moves while a run is *at risk*: a state without movement may last for good.

What moves is δ over the learning rate, or the movement of the logits by the layers below the head.  It counts
only if it goes beyond its highest value since the state began.  Each time that the run has rested, a larger
rise is needed, so that a state which comes and goes is told a few times only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nfi_monitor.detect.smoothing import Stateful

RISE = 1.5
"""Ratio to the highest value so far that counts as a movement, at first."""
LARGEST_RISE = 6.0
"""Largest such ratio."""
STILL = 10.0
"""Time in τ without movement after which a warning becomes information."""
RESTING = 30.0
"""Time in τ without movement after which the state is no alert any more."""
LONGEST = 50.0
"""Longest of these τ, in steps: with torch's default β2, 10 τ would be longer than most runs."""


class Movement(Stateful):
    """Follow several movements while the run is *at risk*. ``moved_at``: last step at which one counted."""

    __slots__ = ("began", "highest", "moved_at", "needed")

    def __init__(self) -> None:
        self.began = False
        self.highest: list[float] = []
        self.moved_at = 0
        self.needed = RISE

    def update(self, step: int, moved: Sequence[float], tau: float, *, at_risk: bool) -> None:
        """Add the movements of a reading, each in a unit of its own; NaN where one was not measured."""
        if not at_risk:
            self.began = False
            return
        values = [value if math.isfinite(value) else 0.0 for value in moved]
        if not self.began:
            self.began, self.highest, self.moved_at = True, values, step
            return
        if any(value > self.needed * most for value, most in zip(values, self.highest, strict=True)):
            if self.is_still(step, tau):
                self.needed = min(self.needed * 2.0, LARGEST_RISE)
            self.moved_at = step
            self.highest = [max(pair) for pair in zip(values, self.highest, strict=True)]

    def is_still(self, step: int, tau: float) -> bool:
        """Return whether nothing has moved for STILL τ."""
        return self.began and step - self.moved_at > STILL * min(tau, LONGEST)

    def is_resting(self, step: int, tau: float) -> bool:
        """Return whether nothing has moved for RESTING τ."""
        return self.began and step - self.moved_at > RESTING * min(tau, LONGEST)

    def forget(self) -> None:
        """Begin anew after a slingshot."""
        self.began, self.needed = False, RISE
