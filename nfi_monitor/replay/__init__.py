"""Find the cause of a slingshot by replay: restore an earlier step, remove one possible cause, train again.

Names are resolved on first use (PEP 562): a report reads verdicts and must not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nfi_monitor import _moved

if TYPE_CHECKING:
    from nfi_monitor.replay.arm import Arm, ArmContext, combined
    from nfi_monitor.replay.arms import (
        ARMS,
        AS_IT_WAS,
        FLOAT64_LOSS,
        LARGER_EPS,
        LR_HELD,
        NUDGED,
        OTHER_DATA,
        SECOND_MOMENT_HELD,
        SECOND_MOMENT_RESET,
        SMALLER_LR,
        ZERO_SUM,
    )
    from nfi_monitor.replay.optimizer_arms import larger_eps, smaller_lr
    from nfi_monitor.replay.run import replay
    from nfi_monitor.replay.snapshots import Snapshot
    from nfi_monitor.replay.verdict import Outcome, ReplayVerdict

_HOMES = {
    "Outcome": "verdict",
    "ReplayVerdict": "verdict",
    "Snapshot": "snapshots",
    "replay": "run",
    **dict.fromkeys(("Arm", "ArmContext", "combined"), "arm"),
    **dict.fromkeys(("larger_eps", "smaller_lr"), "optimizer_arms"),
    **dict.fromkeys(
        (
            "ARMS", "AS_IT_WAS", "FLOAT64_LOSS", "LARGER_EPS", "LR_HELD", "NUDGED", "OTHER_DATA",
            "SECOND_MOMENT_HELD", "SECOND_MOMENT_RESET", "SMALLER_LR", "ZERO_SUM",
        ),
        "arms",
    ),
}  # fmt: skip

__all__ = [
    "ARMS", "AS_IT_WAS", "FLOAT64_LOSS", "LARGER_EPS", "LR_HELD", "NUDGED", "OTHER_DATA",
    "SECOND_MOMENT_HELD", "SECOND_MOMENT_RESET", "SMALLER_LR", "ZERO_SUM", "Arm", "ArmContext",
    "Outcome", "ReplayVerdict", "Snapshot", "combined", "larger_eps", "replay", "smaller_lr",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        return _moved.left(__name__, name)
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
