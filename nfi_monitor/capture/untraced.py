"""Keep functions of the monitor out of what ``torch.compile`` traces, at no cost without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Return ``function``, which ``torch.compile`` does not trace: a compiled function has one graph break.

    ``torch.compiler.disable`` does the same, but its wrapper costs some microseconds in every call.  So its
    wrapper is called only while something is traced, or code runs that torch would compile when it is called.
    """
    hidden: Callable[P, R] = torch.compiler.disable(function)
    # The function that compiles each new frame; None outside of compiled code.
    callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)
    skip = getattr(torch._dynamo.eval_frame, "skip_code", None)
    if callback is None or skip is None:  # another version of torch
        return hidden

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or callback() is not None:
            return hidden(*args, **kwargs)
        return function(*args, **kwargs)

    skip(call.__code__)
    return wraps(function)(call)
