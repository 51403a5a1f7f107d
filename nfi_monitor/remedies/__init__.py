"""Apply the remedies that alerts advise, each in one line that can be undone.

Losses replace the training's own loss; the other remedies return a :class:`Handle` whose ``undo()`` ends
them. Remedies that no alert recommends are in :mod:`nfi_monitor.remedies.experimental`.  Names are resolved
on first use (PEP 562), as in the package itself.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nfi_monitor.remedies.action import Action, AutopilotStop
    from nfi_monitor.remedies.autopilot import Autopilot
    from nfi_monitor.remedies.cooling import CoolDown, cool_down
    from nfi_monitor.remedies.cross_entropy import (
        ZeroSumCrossEntropyLoss,
        float64_cross_entropy,
        zero_sum_cross_entropy,
    )
    from nfi_monitor.remedies.epsilon import raise_epsilon
    from nfi_monitor.remedies.handle import Handle
    from nfi_monitor.remedies.huggingface import causal_lm_loss, classification_loss
    from nfi_monitor.remedies.linear import linear_zero_sum_cross_entropy
    from nfi_monitor.remedies.policy import Policy
    from nfi_monitor.remedies.projection import project_zero_sum

_HOMES = {
    "Action": "action",
    "Autopilot": "autopilot",
    "AutopilotStop": "action",
    "CoolDown": "cooling",
    "Policy": "policy",
    "causal_lm_loss": "huggingface",
    "classification_loss": "huggingface",
    "cool_down": "cooling",
    "Handle": "handle",
    "float64_cross_entropy": "cross_entropy",
    "linear_zero_sum_cross_entropy": "linear",
    "project_zero_sum": "projection",
    "raise_epsilon": "epsilon",
    "zero_sum_cross_entropy": "cross_entropy",
    "ZeroSumCrossEntropyLoss": "cross_entropy",
}

__all__ = [
    "Action",
    "Autopilot",
    "AutopilotStop",
    "CoolDown",
    "Handle",
    "Policy",
    "ZeroSumCrossEntropyLoss",
    "causal_lm_loss",
    "classification_loss",
    "cool_down",
    "float64_cross_entropy",
    "linear_zero_sum_cross_entropy",
    "project_zero_sum",
    "raise_epsilon",
    "zero_sum_cross_entropy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        experimental = importlib.import_module(f"{__name__}.experimental")
        if name == "experimental":
            return experimental
        if name in experimental.HOMES:
            warnings.warn(
                f"{name} has moved: from nfi_monitor.remedies.experimental import {name}.",
                DeprecationWarning,
                stacklevel=2,
            )
            return getattr(experimental, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
