"""Define a forward hook that copies and pickles of a model do not keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nfi_monitor.capture.head_probe import INERT


class InertInCopies:
    """Call ``call(module, keywords, output)`` in a forward hook; do nothing while torch.compile traces.

    As a hook before the forward pass, it gives None as output.

    With a bound method as hook, ``deepcopy(model)`` and ``torch.save(model)`` would copy the monitor.
    """

    def __init__(self, call: Callable[[nn.Module, Mapping[str, Any], Any], None]) -> None:
        self._call = call
        self.__name__ = type(self).__name__  # torch.jit asks every hook for its name

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None) -> None:
        if not torch.compiler.is_compiling():
            self._call(module, kwargs, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return INERT[0](*INERT[1])  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return INERT
