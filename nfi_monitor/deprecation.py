"""Accept the old name of something that was renamed, with a DeprecationWarning.

Modules that moved are in :mod:`nfi_monitor._moved`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_keyword(old: str, new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that it takes the keyword ``old`` for ``new``, with a DeprecationWarning.

    The function then raises TypeError where a call gives both.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def accept(*args: P.args, **kwargs: P.kwargs) -> R:
            if old in kwargs:
                what = function.__qualname__.removesuffix(".__init__")
                if new in kwargs:
                    raise TypeError(f"{what} got both {new}= and its old name {old}=.")
                warnings.warn(f"{what}({old}=...) is now {new}=...", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return accept

    return decorate
