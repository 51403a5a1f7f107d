"""What the advice tells people to do, as functions: exact, undoable, one line each.

Names are resolved on first use (PEP 562), as in the package itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nfi_monitor.remedies.cross_entropy import ZeroSumCrossEntropyLoss, zero_sum_cross_entropy

_HOMES = dict.fromkeys(
    ("ZeroSumCrossEntropyLoss", "zero_sum_cross_entropy"), "nfi_monitor.remedies.cross_entropy"
)

__all__ = ["ZeroSumCrossEntropyLoss", "zero_sum_cross_entropy"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
