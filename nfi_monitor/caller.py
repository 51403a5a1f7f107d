"""Word messages for the call that the user wrote: ``Monitor(...)``, or a framework's adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_DIRECT = "Monitor(model, optimizer, {})"
_CALLBACK = "NFICallback("
_METHOD = re.compile(r"(?<![\w.])monitor\.(?=[a-z_]+\()")
_CALL: ContextVar[str] = ContextVar("nfi_monitor_call", default=_DIRECT)


@contextmanager
def called_as(call: str) -> Iterator[None]:
    """Word messages inside the block for a caller such as ``NFICallback({})``."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


def call_with(argument: str) -> str:
    """Return the call in which the user writes an argument: ``Monitor(model, optimizer, head='fc')``."""
    return _CALL.get().format(argument)


def by_adapter() -> bool:
    """Return whether a framework's adapter makes the monitor: then no error may end the training."""
    return _CALL.get() != _DIRECT


def by_callback() -> bool:
    """Return whether the user holds a callback of a framework's Trainer, and not the monitor itself."""
    return _CALL.get().startswith(_CALLBACK)


def for_callback(message: str) -> str:
    """Return a message with ``callback.monitor.tap(...)`` for ``monitor.tap(...)``, and what callback is."""
    worded, count = _METHOD.subn("callback.monitor.", message)
    return f"{worded} (callback is your NFICallback.)" if count else message
