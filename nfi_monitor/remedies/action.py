"""Record what an Autopilot does, and end a training with an exception."""

from __future__ import annotations

from dataclasses import dataclass


class AutopilotStop(RuntimeError):
    """Training should end. Raised from ``optimizer.step()`` under ``Policy(stop="raise")``."""


@dataclass(frozen=True)
class Action:
    """One action after optimizer step ``step``; in a dry run, one that would have been taken."""

    step: int
    what: str  # "loss", "projection", "cool", "release", "stop", or "nothing" where a rung is out of reach
    alert: str  # id of the alert that caused it
    message: str
