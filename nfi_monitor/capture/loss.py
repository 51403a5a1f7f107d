"""Read the loss that a model returns with its output, as HuggingFace models do.

A framework gives its callbacks only the average loss of a logging interval, which hides a spike.  A forward
hook on the whole model sees the loss of every step, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.capture import devices
from nfi_monitor.capture.model_hooks import ModelHook

COUNT = "num_items_in_batch"
"""Keyword with which a HuggingFace trainer passes the number of items in all micro-batches of a step.  The
model's loss is then a share of the step's loss, not a mean: the shares must be added."""


class LossProbe(ModelHook):
    """Hook the model's forward pass: call ``deliver(loss, share)`` with each training loss, a 0-d tensor."""

    def __init__(
        self, deliver: Callable[[Tensor, bool], None], failed: Callable[[str, BaseException], None]
    ) -> None:
        self._deliver = deliver
        self._failed = failed
        self._compiled: tuple[Tensor, bool] | None = None
        self.on_meta = False  # whether the watched model is on the meta device

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if torch.compiler.is_compiling():
            # An output of the graph, stored when the graph has run: no graph break, no change to the graph.
            # (Appending to a list would work too, but its length is guarded: one compilation a step.)
            loss = loss_of(output)
            if loss is not None:
                self._compiled = (loss, kwargs.get(COUNT) is not None)
            return
        try:
            loss = loss_of(output)
            if loss is not None and devices.is_readable(loss, meta=self.on_meta):
                self._deliver(loss, kwargs.get(COUNT) is not None)
        except Exception as error:
            self._failed("loss", error)

    def collect(self) -> None:
        """Deliver the loss that a compiled forward pass has stored. Call it after each micro-batch."""
        left, self._compiled = self._compiled, None
        if left is not None and devices.is_readable(
            left[0], meta=self.on_meta
        ):  # torch.export leaves a fake tensor
            self._deliver(*left)


def loss_of(output: Any) -> Tensor | None:
    """Return the 0-d loss in a model's output (``output["loss"]``, ``output[0]`` or the output), or None."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif isinstance(output, (tuple, list)):
        output = output[0] if len(output) else None
    if isinstance(output, Tensor) and output.dim() == 0 and output.requires_grad:
        return output
    return None
