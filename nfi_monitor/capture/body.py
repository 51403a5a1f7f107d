"""Find the hidden states and the labels of a model that computes its loss without calling its head.

HuggingFace models take ``labels`` and, with a fused loss, give the body's output and the head's weight to it.
The body is the last module beside the head that runs and returns features of the head's width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nfi_monitor.capture.after_head import of_config
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.inert_hook import InertInCopies
from nfi_monitor.capture.recomputed import Autocast, RowRecomputer, autocast_of

_SHIFTED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Endings of class names of models that hold each position against the next position's label."""


class BodyWatch:
    """Tap the body's output and the labels in each training forward pass. ``remove`` ends it.

    Args:
        model: the model that gets ``labels``; the head may be anywhere in it.
        head: the head.
        recomputer: gets hidden states and targets.
        failed: ``failed(part, error)`` reports an error.
        temperature: what the trainer divides the logits by.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        recomputer: RowRecomputer,
        failed: Callable[[str, BaseException], None],
        *,
        temperature: float = 1.0,
    ) -> None:
        owner = next((one for one in model.modules() if head.module in one._modules.values()), model)
        self._recomputer = recomputer
        self._shifted = not getattr(getattr(owner, "config", None), "is_encoder_decoder", False) and (
            type(owner).__name__.endswith(_SHIFTED) or not hasattr(owner, "config")
        )
        after_head = of_config(getattr(owner, "config", None))
        recomputer.after_head = after_head.divided(temperature)
        self._features = head.weight.shape[1 - head.class_axis] if head.weight is not None else None
        self._hidden: Tensor | None = None
        self._head_calls = 0  # before the hidden states
        self._autocast: Autocast | None = None
        self._running: set[nn.Module] = set()  # of the model and the owner of the head
        before, after = InertInCopies(self._begin, failed), InertInCopies(self._end, failed)
        self._handles: list[RemovableHandle] = []
        for module in dict.fromkeys((model, owner)):  # a training step may call the owner alone
            self._handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after, with_kwargs=True),
            ]
        beside = InertInCopies(self._after_module, failed)
        for child in owner.children():
            if child is not head.module:
                self._handles.append(child.register_forward_hook(beside, with_kwargs=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._hidden = None
        self._running.clear()

    def _after_module(self, module: nn.Module, kwargs: Mapping[str, Any], output: Any) -> None:
        """Keep the module's output until the model's forward pass ends, if it can be hidden states."""
        if not (self._running and module.training and torch.is_grad_enabled() and self._recomputer.wants):
            return
        hidden = _hidden_of(output)
        if hidden is not None and hidden.shape[-1] == self._features:
            self._hidden, self._head_calls = hidden, self._recomputer.head_calls
            # Now, because a framework may wrap only the model's forward in autocast, without its hooks.
            self._autocast = autocast_of(hidden.device.type)

    def _begin(self, module: nn.Module, kwargs: Mapping[str, Any], output: Any) -> None:
        self._running.add(module)

    def _end(self, module: nn.Module, kwargs: Mapping[str, Any], output: Any) -> None:
        self._running.discard(module)
        done = True
        try:
            done = self._tap(kwargs)
        finally:
            if done or not self._running:
                self._hidden = None  # it would keep the whole graph alive

    def _tap(self, kwargs: Mapping[str, Any]) -> bool:
        """Tap the hidden states if the labels are among ``kwargs``; return whether they are."""
        hidden = self._hidden
        if hidden is None or self._recomputer.head_calls != self._head_calls:
            return False
        labels, shifted = kwargs.get("shift_labels"), False
        if labels is None:
            labels, shifted = kwargs.get("labels"), self._shifted
        if not (isinstance(labels, Tensor) and labels.dim() == hidden.dim() - 1):
            return False
        shifted = shifted and labels.dim() > 1
        self._recomputer.tap(hidden, _next_labels(labels) if shifted else labels, self._autocast)
        return True


def _hidden_of(output: Any) -> Tensor | None:
    """Return the hidden states in a module's output: ``last_hidden_state``, the first item, or itself."""
    found = getattr(output, "last_hidden_state", None)
    if found is None:
        found = output[0] if isinstance(output, (tuple, list)) and output else output
    ready = isinstance(found, Tensor) and found.requires_grad and found.dim() > 1
    return found if ready and found.is_floating_point() else None


def _next_labels(labels: Tensor) -> Tensor:
    """Return the label of the next position [B, T]; −100 at the last."""
    following = torch.full_like(labels, -100)
    following[..., :-1] = labels[..., 1:]
    return following
