"""Define the base class of objects for ``Monitor(on_alert=...)`` that are more than a function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from nfi_monitor.types import Alert


class AlertHandler:
    """Base class for an ``on_alert`` that needs its monitor, has a state, or may end the training.

    A subclass defines ``__call__``.  All other methods do nothing unless they are overridden.
    :class:`nfi_monitor.remedies.Autopilot` is one.
    """

    def attach(self, monitor: Any) -> None:
        """Get the :class:`nfi_monitor.Monitor`, once, when it attaches. An error here closes the monitor."""

    def __call__(self, alert: Alert) -> None:
        """Handle an alert that begins, changes or ends. An error here is reported once."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(alert).")

    @property
    def should_stop(self) -> bool:
        """Whether the training should end. The adapters check it after each optimizer step."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run, in types that JSON can hold. The adapters save it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""


def handler_of(on_alert: Callable[[Alert], None] | None) -> AlertHandler | None:
    """Return ``on_alert`` itself if it is an AlertHandler, None if it is a plain function.

    An object of the old kind (no AlertHandler, but with ``attach_monitor`` or ``should_stop``) is wrapped,
    with a DeprecationWarning.
    """
    if on_alert is None or isinstance(on_alert, AlertHandler):
        return on_alert
    if hasattr(on_alert, "attach_monitor") or hasattr(on_alert, "should_stop"):
        return _OldHandler(on_alert)
    return None


class _OldHandler(AlertHandler):
    """Wrap an object with the methods from before AlertHandler existed."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        warnings.warn(
            f"{type(inner).__name__} should inherit from nfi_monitor.AlertHandler: attach(monitor) replaces "
            "attach_monitor(monitor).",
            DeprecationWarning,
            stacklevel=5,  # from here, over handler_of, a constructor and what wraps or calls it
        )

    def attach(self, monitor: Any) -> None:
        if hasattr(self._inner, "attach_monitor"):
            self._inner.attach_monitor(monitor)

    def __call__(self, alert: Alert) -> None:
        self._inner(alert)

    @property
    def should_stop(self) -> bool:
        return bool(getattr(self._inner, "should_stop", False))

    def state_dict(self) -> dict[str, Any]:
        return dict(self._inner.state_dict()) if hasattr(self._inner, "state_dict") else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._inner.load_state_dict(state)
