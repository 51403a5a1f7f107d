"""Monitor PyTorch trainings: warn before slingshot loss spikes, and name their cause.

    from nfi_monitor import Monitor
    with Monitor(model, optimizer):
        ...                                  # the training loop, unchanged

Names are resolved on first use (PEP 562), so that importing the package does not import torch: a
command line or a TensorBoard plugin must not pay for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nfi_monitor import _beside, _moved
from nfi_monitor._version import __version__

if TYPE_CHECKING:
    from nfi_monitor.alert_handler import AlertHandler
    from nfi_monitor.errors import AlreadyMonitoredError, HeadNotFoundError, MonitorError
    from nfi_monitor.monitor import Monitor
    from nfi_monitor.registry import open_monitors
    from nfi_monitor.remedies.autopilot import Autopilot
    from nfi_monitor.replay.snapshots import Snapshot
    from nfi_monitor.report.sink import SinkBase
    from nfi_monitor.types import (
        Alert,
        AlertKind,
        AlertState,
        Change,
        Evidence,
        Mechanism,
        Note,
        Outcome,
        Phase,
        Reading,
        Severity,
        Thresholds,
    )  # fmt: skip

_HOMES = {
    "AlertHandler": "nfi_monitor.alert_handler",
    "Autopilot": "nfi_monitor.remedies.autopilot",
    "Monitor": "nfi_monitor.monitor",
    "SinkBase": "nfi_monitor.report.sink",
    "Snapshot": "nfi_monitor.replay.snapshots",
    "open_monitors": "nfi_monitor.registry",
    **dict.fromkeys(("AlreadyMonitoredError", "HeadNotFoundError", "MonitorError"), "nfi_monitor.errors"),
    **dict.fromkeys(
        ("Alert", "AlertKind", "AlertState", "Change", "Evidence", "Mechanism", "Note", "Outcome", "Phase",
         "Reading", "Severity", "Thresholds"),
        "nfi_monitor.types",
    ),
}  # fmt: skip

__all__ = [
    "Alert", "AlertHandler", "AlertKind", "AlertState", "AlreadyMonitoredError", "Autopilot", "Change",
    "Evidence", "HeadNotFoundError", "Mechanism", "Monitor", "MonitorError", "Note", "Outcome", "Phase",
    "Reading", "Severity", "SinkBase", "Snapshot", "Thresholds", "__version__",
    "open_monitors",
]  # fmt: skip

_beside.install()
_moved.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nfi_monitor' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
