"""What an Autopilot has done, and how it ends a training."""

from __future__ import annotations

from dataclasses import dataclass


class AutopilotStop(RuntimeError):
    """Raised from ``optimizer.step()`` where ``Policy(stop="raise")`` asks for it."""


@dataclass(frozen=True)
class Action:
    """Something that was done, or in a dry run would have been, after optimizer step ``step``."""

    step: int
    what: str  # "loss", "projection", "cool", "release", "stop", or "nothing" where a rung is out of reach
    alert: str  # id of the alert that it answers
    message: str
