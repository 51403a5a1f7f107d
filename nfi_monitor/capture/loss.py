"""Read the loss that a model returns with its output, as HuggingFace models do.

A framework gives its callbacks only the average loss of a logging interval, which hides a spike.  A forward
hook on the whole model sees the loss of every step, at little cost.  The loss counts if a gradient arrives at
it: a model returns its loss also where another loss trains (preference optimization, a user's own loss).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.capture import devices
from nfi_monitor.capture.backward_pass import Pass, nearest_parameter, pass_of
from nfi_monitor.capture.model_hooks import ModelHook

COUNT = "num_items_in_batch"
"""Keyword with which a HuggingFace trainer passes the number of items in all micro-batches of a step.  The
model's loss is then a share of the step's loss, not a mean: the shares must be added."""


class LossProbe(ModelHook):
    """Hook the model's forward pass: call ``deliver(loss, share)`` with each training loss, a 0-d tensor.

    ``share``: whether the loss is a share of the step's.  The loss is delivered in its backward pass.
    """

    def __init__(
        self, deliver: Callable[[Tensor, bool], None], failed: Callable[[str, BaseException], None]
    ) -> None:
        self._deliver = deliver
        self._failed = failed
        self._compiled: tuple[Tensor, bool] | None = None
        self._returned = 0  # losses since the last optimizer step
        self._trained = 0  # of these, losses at which a gradient has arrived
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
                self._watch(loss, kwargs.get(COUNT) is not None)
        except Exception as error:
            self._failed("loss", error)

    def _watch(self, loss: Tensor, share: bool) -> None:
        """Deliver ``loss`` once a backward pass that trains arrives at it."""
        self._returned += 1
        parameter = nearest_parameter(loss)
        kept = [loss.detach().clone()]  # a copy: a trainer may scale its loss in place

        def on_gradient(grad: Tensor | None) -> None:
            try:
                # A loss may be multiplied by 0. The host does not wait for a device that knows.
                weightless = grad is not None and devices.on_host(grad) and not grad.any()
                if kept and not weightless and pass_of(parameter) is not Pass.OTHER:
                    self._trained += 1
                    self._deliver(kept.pop(), share)
            except Exception as error:
                self._failed("loss", error)

        loss.register_hook(on_gradient)

    def collect(self) -> None:
        """Deliver the loss that a compiled forward pass has stored. Call it after each micro-batch."""
        left, self._compiled = self._compiled, None
        # torch.export leaves a fake tensor.
        if left is not None and devices.is_readable(left[0], meta=self.on_meta):
            self._returned += 1
            self._trained += 1  # not known: a compiled pass has no hook at its loss
            self._deliver(*left)

    def take_counts(self) -> tuple[int, int]:
        """Return and clear the number of losses since the last step, and of those that train."""
        counts = self._returned, self._trained
        self._returned = self._trained = 0
        return counts


def loss_of(output: Any) -> Tensor | None:
    """Return the 0-d loss in a model's output (``output["loss"]``, ``output[0]`` or the output), or None."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif isinstance(output, (tuple, list)):
        output = output[0] if len(output) else None
    if isinstance(output, Tensor) and output.dim() == 0 and output.requires_grad:
        return output
    return None
