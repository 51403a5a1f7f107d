"""What the monitor raises. Only constructing it, or asking it for something that is not there, raises."""

from __future__ import annotations


class MonitorError(RuntimeError):
    """Base class of everything raised by nfi-monitor."""


class HeadNotFoundError(MonitorError):
    """No module, or more than one, could be the classifier head."""


class AlreadyMonitoredError(MonitorError):
    """Another open monitor watches the same head."""
