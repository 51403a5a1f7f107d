"""Subtract global means: from the classifier after each step, from the features before the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.capture.head import Head, find_head
from nfi_monitor.capture.names import inner_names, no_head_text
from nfi_monitor.capture.unwrap import unwrap
from nfi_monitor.errors import HeadNotFoundError
from nfi_monitor.remedies.handle import Handle
from nfi_monitor.remedies.projection import classes_last
from nfi_monitor.remedies.steps import around_steps, step_now
from nfi_monitor.replay.replayed_step import acts

_FEATURES = "_nfi_centered_features"


def center_classifier(model: nn.Module, optimizer: Any, head: nn.Module | str | None = None) -> Handle:
    """Subtract the class means after each optimizer step: W ← W − W_G, b ← b − mean b.

    It is for logits that drift as a whole.  Their differences, and so the model's predictions, stay the same
    up to rounding; their common part W_G·h is removed.  The class mean of ``exp_avg`` is subtracted as well,
    because it would bring W_G back.  Source: Stollenwerk, arXiv 2601.02031; in language models this stops a
    drift that float64 does not stop.  Alone it delays a numeric slingshot by some τ, because the features go
    on drifting.  It costs one pass over the head's weight.

    Args:
        model: the module that holds the head; ``head`` as for :class:`nfi_monitor.Monitor`.
        optimizer: the optimizer whose ``step()`` updates the head.

    Raises:
        ValueError: for a head that is no weight matrix, has one class, is tied to an input embedding (whose
            rows would move, too) or is sharded over ranks (no rank knows the mean).
        HeadNotFoundError: as ``Monitor``.
    """
    found = find_head(model, head)
    if found.spatial:
        raise HeadNotFoundError(no_head_text("found no linear layer to centre", inner_names(model)))
    weight = _centrable(found)
    optimizer = unwrap(optimizer)
    axis = found.class_axis

    def center(optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            _take_mean_off(weight, axis, optimizer)
            if found.bias is not None:
                _take_mean_off(found.bias, 0, optimizer)

    center(optimizer)
    return Handle("centred classifier", around_steps(optimizer, after=center))


def _centrable(head: Head) -> nn.Parameter:
    weight = head.weight
    if weight is None:
        raise ValueError(f"The head {head.describe()} has no weight matrix of its own to centre.")
    if head.tied:
        raise ValueError(
            f"The head {head.name!r} shares its weight with an input embedding: centring would move the "
            "embeddings as well. Untie them, or use z_loss."
        )
    if head.outputs == 1:
        raise ValueError(f"The head {head.describe()} has one output: centring would make it zero.")
    if hasattr(weight, "to_local"):
        raise ValueError(
            f"The head {head.name!r} is sharded over ranks: no rank knows the mean of its classes."
        )
    return weight


def _take_mean_off(parameter: nn.Parameter, axis: int, optimizer: torch.optim.Optimizer) -> None:
    momentum = optimizer.state.get(parameter, {}).get("exp_avg")
    for tensor in (parameter, momentum):
        if isinstance(tensor, Tensor):
            wide = tensor.dtype if tensor.dtype in (torch.float32, torch.float64) else torch.float32
            tensor.sub_(tensor.mean(axis, keepdim=True, dtype=wide))


def center_features(head: nn.Module, momentum: float = 0.1) -> Handle:
    """Subtract the mean over the rows from the features before the head: h ← h − mean h.

    It is for numerical feature inflation.  BatchNorm directly before the classifier does the same and divides
    by the variance (Liu et al. 2026, section 5).  In training the batch's mean is subtracted, with its
    gradient; in evaluation a running mean.  The head keeps that mean as a buffer, so that a saved model has
    it.  This changes the model.  When not to use it: in causal language models, where a row's logits would
    depend on later tokens, or for batches of a few rows.

    ``undo()`` subtracts W·(running mean) from the head's bias, if it has one, so that evaluation stays the
    same.

    Args:
        head: the module that is given the features [..., d], uncompiled.
        momentum: share of the new mean in the running one.

    Raises ValueError if the features of this head are centred already, or for a convolution.
    """
    if not isinstance(head, nn.Module):
        raise TypeError(f"center_features needs the head, a torch.nn.Module, got {type(head).__name__}.")
    classes_last("center_features", head)
    if _FEATURES in head._buffers:
        raise ValueError("The features of this head are centred already.")
    head.register_buffer(_FEATURES, None)
    hook = head.register_forward_pre_hook(_Center(momentum, step_now(None, head)))

    def undo() -> None:
        hook.remove()
        mean = head._buffers.pop(_FEATURES)
        head._non_persistent_buffers_set.discard(_FEATURES)
        weight, bias = head._parameters.get("weight"), head._parameters.get("bias")
        if mean is not None and weight is not None and bias is not None:
            with torch.no_grad():
                rows = weight if weight.shape[-1] == len(mean) else weight.T
                bias.sub_((rows @ mean.to(weight.dtype)).to(bias.dtype))

    return Handle("centred features", undo)


class _Center:
    """Hook the head. A class, because a model with a closure as hook cannot be saved or copied."""

    def __init__(self, momentum: float, since: int | None) -> None:
        self.momentum, self._since = momentum, since
        self.__name__ = type(self).__name__

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or not acts(self._since):
            return None
        features = args[0]
        running = module._buffers.get(_FEATURES)
        if not module.training:
            return None if running is None else (features - running.to(features.dtype), *args[1:])
        mean = features.flatten(0, -2).mean(0) if features.dim() > 1 else features
        with torch.no_grad():
            seen = mean.detach().float()
            if running is None:
                module._buffers[_FEATURES] = seen.clone()
            else:
                running.lerp_(seen, self.momentum)
        return (features - mean, *args[1:])
