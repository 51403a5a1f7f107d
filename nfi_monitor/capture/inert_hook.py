"""Define a forward hook that copies and pickles of a model do not keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nfi_monitor.capture.model_hooks import ModelHook


class InertInCopies(ModelHook):
    """Call ``call(module, keywords, output)`` in a forward hook; do nothing while torch.compile traces.

    As a hook before the forward pass, it gives None as output.

    An error in it goes to ``failed("rows", error)``.

    With a bound method as hook, ``deepcopy(model)`` and ``torch.save(model)`` would copy the monitor.
    """

    def __init__(
        self,
        call: Callable[[nn.Module, Mapping[str, Any], Any], None],
        failed: Callable[[str, BaseException], None],
    ) -> None:
        self._call, self._failed = call, failed

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None) -> None:
        if not torch.compiler.is_compiling():
            try:
                self._call(module, kwargs, output)
            except Exception as error:
                self._failed("rows", error)
