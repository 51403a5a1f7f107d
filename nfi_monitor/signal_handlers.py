"""Tell an error of the monitor from one that the user's handler of a signal has raised in it."""

from __future__ import annotations

import functools
import signal
from typing import Any


def raised_by_signal_handler(error: BaseException) -> bool:
    """Return whether a handler of a signal raised this error.

    A time limit, a notice that the job ends, or the dead worker of a DataLoader: Python runs such a handler
    inside whatever runs when the signal comes.  The error has nothing to do with that code, and the training
    must get it.
    """
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code not in handlers:
        trace = trace.tb_next
    return trace is not None


def _code(handler: Any) -> Any:
    """Return the code of a function, a method, a partial or a callable object; None of anything else."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    own = getattr(handler, "__code__", None)
    return own or getattr(getattr(type(handler), "__call__", None), "__code__", None)  # noqa: B004
