"""Take rows out of tensors [..., K]: samples of them, those of this rank, features of the same rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.capture.head_layer import is_convolution
from nfi_monitor.capture.sampling import local
from nfi_monitor.capture.sharding import ClassShard, class_shard


def same_rows(features: Tensor, logits: Tensor, axis: int) -> bool:
    """Return whether features have the rows of the logits, in the same order (one may be a matrix)."""
    if axis == -1 and features.dim() == 2 == logits.dim():
        return len(features) == len(logits) and features.shape[1] > 0 < logits.shape[1]
    if features.dim() == logits.dim():
        shape, wanted = list(features.shape), list(logits.shape)
        return bool(shape) and not (shape.pop(axis) == 0 or wanted.pop(axis) == 0) and shape == wanted
    matrix = 2 in (features.dim(), logits.dim()) and min(features.dim(), logits.dim()) > 1
    return axis == -1 and matrix and features.shape[:-1].numel() * logits.shape[-1] == logits.numel()


def features_of(module: nn.Module, given: Tensor | None, axis: int) -> Tensor | None:
    """Return the features of the same rows as the module's output, or None if a row has a patch of them."""
    if given is not None and given.is_complex():
        return None
    if not is_convolution(module):
        return given if axis == -1 else None
    return given if module.groups == 1 and set(module.kernel_size) == {1} else None  # type: ignore[arg-type]


def rows_of(tensor: Tensor, first: int, stride: int) -> Tensor:
    """Return rows ``first``, ``first + stride``, … of a tensor [..., K], in order of index → [n, K].

    The whole tensor is never copied, also if it cannot be viewed as rows: in a gradient of
    ``cross_entropy(logits.transpose(1, 2), target)`` the classes come before the positions in memory.
    """
    classes = tensor.shape[-1]
    try:
        rows = tensor if tensor.dim() == 2 else tensor.view(-1, classes)
        return rows if stride == 1 else rows[first::stride]
    except RuntimeError:
        # Not torch.unravel_index, which would wait for the device.
        at = torch.arange(first, tensor.numel() // classes, stride, device=tensor.device)
        places: list[Tensor] = []
        for size in reversed(tensor.shape[:-1]):
            places.insert(0, at % size)
            at = at // size
        return tensor[tuple(places)]


def whole_rows(tensor: Any) -> Tensor | None:
    """Return this rank's rows of a DTensor, detached; None if the rows are not whole.

    Returns any other tensor itself.
    """
    if type(tensor) is Tensor or not hasattr(tensor, "to_local"):
        return tensor  # type: ignore[no-any-return]
    cut = {getattr(placement, "dim", None) for placement in tensor.placements}
    partial = any(placement.is_partial() for placement in tensor.placements)
    if partial or not cut.isdisjoint({-1, tensor.dim() - 1}):
        return None
    return local(tensor.detach())


def classes_of(tensor: Any, shard: ClassShard) -> Tensor | None:
    """Return this rank's classes of a gradient; None if it is not sharded like ``shard``."""
    whole = whole_rows(tensor)
    if whole is None:
        return local(tensor.detach()) if class_shard(tensor, -1) == shard else None
    if whole.shape[-1] == shard.outputs:
        return whole.narrow(-1, shard.first, shard.classes)
    return whole if whole.shape[-1] == shard.classes else None
