"""Record what an Autopilot does, and end a training with an exception."""

from __future__ import annotations

from dataclasses import dataclass


class AutopilotStop(RuntimeError):
    """Raised from ``optimizer.step()`` under ``Policy(stop="raise")`` if the training should end."""


@dataclass(frozen=True)
class Action:
    """One action after optimizer step ``step``; in a dry run, the action that would have been taken."""

    step: int
    what: str  # "loss", "projection", "cool", "release", "stop", or "nothing" if a rung cannot be applied
    alert: str  # id of the alert that caused it
    message: str
