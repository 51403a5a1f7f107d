"""Define the errors of the monitor. They are raised by calls of the user, never inside a training step."""

from __future__ import annotations

from typing import Any


class MonitorError(RuntimeError):
    """Base class of everything raised by nfi-monitor."""


class HeadNotFoundError(MonitorError):
    """No module could be the classifier head, or more than one."""


class AlreadyMonitoredError(MonitorError):
    """Another open monitor already watches the same head. ``monitor`` is that monitor."""

    def __init__(self, message: str, monitor: Any = None) -> None:
        super().__init__(message)
        self.monitor = monitor
