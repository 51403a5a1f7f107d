"""Read several processes as one: find who trains together, exchange readings, let a process leave."""

from typing import TYPE_CHECKING, Any

from nfi_monitor import _moved

if not TYPE_CHECKING:  # for a type checker, any name would exist

    def __getattr__(name: str) -> Any:
        return _moved.left(__name__, name)
