"""Decide how long the Autopilot keeps the learning rate low, and when the rate may come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nfi_monitor.remedies.policy import Policy

RELAPSE = 10.0
"""A cool-down that begins within so many τ after the last one lasts longer."""


class RateHold:
    """Keep the times of the cool-downs. All steps are optimizer steps.

    Attributes:
        held_since: the step at which the rate was lowered; None while it is not low.
        held_for: the step until which the rate stays low at least.
        calm_since: the step at which the last alert that asked for a smaller rate ended.
        released: the step at which the rate last came back; None if it was never low.
        repeated: number of cool-downs in a row that came too soon after one another.
    """

    def __init__(self) -> None:
        self.held_since: int | None = None
        self.held_for = 0
        self.calm_since = 0
        self.released: int | None = None
        self.repeated = 0

    def ask(self, step: int, tau: float, policy: Policy) -> int | None:
        """Start or extend a cool-down at ``step``. Returns its steps, or None if the rate is low already."""
        if self.held_since is None:
            soon = self.released is not None and step - self.released <= RELAPSE * tau
            self.repeated = self.repeated + 1 if soon else 0
        hold = policy.hold_in_steps(tau, self.repeated)
        self.held_for = max(self.held_for, step + hold)
        return hold if self.held_since is None else None

    def may_end(self, step: int, tau: float, policy: Policy) -> bool:
        """Return whether the rate has been low long enough, provided that no alert asks for a low rate."""
        calm = round(policy.calm * tau)
        return step - self.calm_since >= calm and step >= self.held_for

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. Raises KeyError for a missing key."""
        for name in vars(self):
            setattr(self, name, state[name])
