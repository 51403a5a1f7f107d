"""Several processes, one monitor: who trains together, what they exchange, how one of them leaves."""

from typing import TYPE_CHECKING, Any

from nfi_monitor import _moved

if not TYPE_CHECKING:  # for a type checker, any name would exist

    def __getattr__(name: str) -> Any:
        return _moved.left(__name__, name)
