"""Check the head that was found by names against the first output of the model, which shows the true one.

A model may make its logits with the weight of its input embedding, outside of any module, or register
its layers in another order than it calls them.  Then the last linear layer is an inner one.  The autograd
graph of the output tells which weight made the logits (:mod:`nfi_monitor.capture.origin`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.caller import call_with
from nfi_monitor.capture import devices
from nfi_monitor.capture.head import describe, find_head, most_classes
from nfi_monitor.capture.head_layer import Head
from nfi_monitor.capture.model_hooks import ModelHook
from nfi_monitor.capture.names import inner_names
from nfi_monitor.capture.origin import Origin, origin, tensors_of

_LOGITS = ("logits", "pred", "out", "scores")


class HeadCheck(ModelHook):
    """Hook the model's forward pass; at the first training pass, call ``switch`` if the head is another one.

    Args:
        head: the head found by names, or None.
        switch: called as ``switch(head, code, message)`` with the true head (None: no layer is the head).
        note: makes a note, as ``note(code, message)``.
        failed: reports an error.
    """

    def __init__(
        self,
        head: Head | None,
        switch: Callable[[Head | None, str, str], None],
        note: Callable[[str, str], None],
        failed: Callable[[str, BaseException], None],
    ) -> None:
        self._head, self._switch, self._note, self._failed = head, switch, note, failed
        self._naming = call_with("head=...")
        self._done = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._done or torch.compiler.is_compiling() or devices.is_traced():
            return
        if not (module.training and torch.is_grad_enabled()):
            return
        try:
            self._done = True
            self._look(module, output)
        except Exception as error:
            self._failed("head_check", error)

    def _look(self, model: nn.Module, output: Any) -> None:
        found = _behind(output)
        head = self._head
        seen = [product.weight for one in found for product in one.products]
        if head is not None and (head.weight is None or any(weight is head.weight for weight in seen)):
            return
        known = [product.weight for one in found if one.complete for product in one.products]
        weights = [weight for weight in known if weight is not None]
        if not known:
            self._guessed(head)
            return
        if not weights:
            self._no_layer(head)
            return
        true = most_classes([_head_of(model, weight) for weight in weights])
        if (true.classes or 0) < 2:
            return
        wrong = "" if head is None else f" The last layer by its name, {head.describe()}, is an inner one."
        rest = f" Other outputs come from {', '.join(true.others)}." if true.others else ""
        self._switch(
            true,
            "head_by_output",
            f"The logits are made by {true.describe()}, as the model's first output shows: it is watched as "
            f"the head.{wrong}{rest} To watch another: {self._naming}.",
        )

    def _guessed(self, head: Head | None) -> None:
        if head is not None and not head.bare:
            self._note(
                "head_guessed",
                f"Watched as the head: {head.describe()}, the last layer by its name. The output does not "
                f"show whether it makes the logits. If another does: {self._naming}. If none returns them: "
                "logits = monitor.tap(logits).",
            )

    def _no_layer(self, head: Head | None) -> None:
        watched = "" if head is None else f" {head.describe()} makes features, and is not watched."
        self._switch(
            None,
            "no_head",
            f"The logits are the product of two features, as in contrastive models: no layer is the head."
            f"{watched} The optimizer, the norms and the observed loss are. For rows, tap the logits: "
            f"logits = monitor.tap(logits). To watch a layer all the same: {self._naming}.",
        )


def _behind(output: Any) -> list[Origin]:
    """Return the products behind a model's loss if it returns one, else behind each of its logits."""
    named = list(tensors_of(output))
    losses = [tensor for _, tensor in named if tensor.dim() == 0]
    logits = [tensor for name, tensor in named if any(part in name for part in _LOGITS)]
    chosen: list[Tensor] = losses[:1] or logits or [tensor for _, tensor in named]
    return [origin(tensor) for tensor in chosen]


def _head_of(model: nn.Module, weight: nn.Parameter) -> Head:
    """Return the head whose weight this is: a layer, or the bare parameter."""
    for name, module in inner_names(model).items():
        if module._parameters.get("weight") is weight and not isinstance(module, nn.Embedding):
            return describe(model, name, module)
    return replace(find_head(model, weight), sure=True)
