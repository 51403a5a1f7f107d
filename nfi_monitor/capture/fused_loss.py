"""Tap the hidden states and the targets that torch's fused loss with a head of its own gets.

``nn.LinearCrossEntropyLoss`` holds the head's weight as a layer ``linear``, and never calls that layer.  In
chunks, it cancels the gradient of a row near absorption (``cancels`` of :meth:`RowRecomputer.tap`), as
``F.linear_cross_entropy`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.capture.head import Head
from nfi_monitor.capture.model_hooks import ModelHook
from nfi_monitor.capture.recomputed import RowRecomputer, unusable


class FusedLossHook(ModelHook):
    """A forward hook on the loss. ``failed("rows", error)`` reports an error."""

    def __init__(self, recomputer: RowRecomputer, failed: Callable[[str, BaseException], None]) -> None:
        self._recomputer, self._failed = recomputer, failed

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        try:
            given = dict(zip(("input", "target"), args, strict=False)) | kwargs
            hidden, targets, ignored = given.get("input"), given.get("target"), module.ignore_index
            if not module.training or not self._recomputer.wants or unusable(hidden, targets) is not None:
                return
            assert isinstance(hidden, Tensor) and isinstance(targets, Tensor)
            if isinstance(ignored, int) and ignored >= 0:
                targets = torch.where(targets == ignored, -1, targets)
            self._recomputer.tap(hidden, targets, cancels=module.options is not None)
        except Exception as error:
            self._failed("rows", error)


def is_chunked(loss: Any, nodes: int = 8) -> bool:
    """Return whether the node of a loss depends on torch's cross-entropy in chunks, by few operations."""
    ahead = [loss]
    while ahead and nodes:
        node, nodes = ahead.pop(0), nodes - 1
        if "linear_cross_entropy_batch_chunked" in node.name():
            return True
        ahead += [before for before, _ in node.next_functions if before is not None]
    return False


def fused_loss_of(model: nn.Module, head: Head) -> nn.Module | None:
    """Return the fused loss in the model that holds the head; None if there is none."""
    kind = getattr(nn, "LinearCrossEntropyLoss", None)  # from torch 2.13 on
    if kind is None or head.bare:
        return None
    holds = (one for one in model.modules() if isinstance(one, kind) and one.linear is head.module)
    return next(holds, None)
