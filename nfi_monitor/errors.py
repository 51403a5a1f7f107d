"""Define the errors of the monitor. It raises when it is made, or when asked for what is missing; never in
training."""

from __future__ import annotations


class MonitorError(RuntimeError):
    """Base class of everything raised by nfi-monitor."""


class HeadNotFoundError(MonitorError):
    """No module could be the classifier head, or more than one."""


class AlreadyMonitoredError(MonitorError):
    """Another open monitor already watches the same head."""
