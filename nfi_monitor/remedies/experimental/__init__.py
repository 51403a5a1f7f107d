"""Collect the remedies that no alert recommends, for comparison.

``tests/benchmarks/remedies/RESULTS.md`` shows the result of each.  Names are resolved on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nfi_monitor.remedies.experimental.centering import center_classifier, center_features
    from nfi_monitor.remedies.experimental.penalties import z_loss
    from nfi_monitor.remedies.experimental.second_moment import reset_second_moment
    from nfi_monitor.remedies.experimental.stablemax import orthogonal_gradients, stablemax_cross_entropy
    from nfi_monitor.remedies.experimental.update_clip import clip_update_rms

HOMES = {
    "center_classifier": "centering",
    "center_features": "centering",
    "clip_update_rms": "update_clip",
    "orthogonal_gradients": "stablemax",
    "reset_second_moment": "second_moment",
    "stablemax_cross_entropy": "stablemax",
    "z_loss": "penalties",
}
"""Name → module of this package."""

__all__ = [
    "center_classifier",
    "center_features",
    "clip_update_rms",
    "orthogonal_gradients",
    "reset_second_moment",
    "stablemax_cross_entropy",
    "z_loss",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
