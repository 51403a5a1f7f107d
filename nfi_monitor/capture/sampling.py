"""Choose the rows, coordinates and steps that are read: deterministic, never random.

The monitor must not change the random state, so every sample is a stride with a rotating offset.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from nfi_monitor.capture import devices

ROW_ELEMENTS = 1 << 18
"""Logits read per backward pass at least (256 Ki elements, 1 MiB in float32)."""
ROW_SHARE = 64
"""... or one row in this many, whichever is more: at large N·K the cost stays near 1/64 of one read."""
COORDINATES = 1 << 14
"""Optimizer coordinates read per step in large models."""
COORDINATES_FULL = 1 << 15
"""Models up to this many parameters are read whole."""
COORDINATES_PER_TENSOR = 64
"""Fewest coordinates read of a tensor that has that many."""
REDUCTION = 4
"""To save time the monitor divides its budget of rows and coordinates by this number: that saves a fifth to a
third. An eighth would save hardly more: the rest of the time starts kernels."""
FEWEST_ROWS = 64
"""... but reads so many rows, if the budget has them."""

_PLAIN = frozenset((Tensor, nn.Parameter))
"""Tensors whose strides are cut from their memory directly; a subclass may not offer that."""


def row_stride(rows: int, classes: int, *, reduced: bool = False) -> int:
    """Return the stride at which rows are read; 1: all rows."""
    budget = max(ROW_ELEMENTS // max(classes, 1), rows // ROW_SHARE, 1)
    if reduced:
        budget = max(budget // REDUCTION, min(budget, FEWEST_ROWS))
    return -(-rows // budget)


def offset(step: int, stride: int) -> int:
    """Return where the stride starts at this step: all offsets in turn, those of neighbouring steps far
    apart."""
    # The golden ratio keeps successive offsets spread; a plain counter would scan rows in order and
    # alias with a data order that does the same.
    return int(step * 0.6180339887498949 * stride) % stride if stride > 1 else 0


def auto_interval(tau: float, *, at_risk: bool = False) -> int:
    """Return the steps between readings of a quiet run: τ/5, from 1 to 16; at risk τ/50, from 1 to 8.

    A numeric slingshot builds up over some 20 τ and its last stages over 2–5 τ, so τ/5 sees it coming
    in time, and τ/50 sees ‖μ_G‖ begin to grow; the caps are for β2 = .999, where second-moment
    slingshots take a few steps only.
    """
    return max(1, min(8, round(tau / 50)) if at_risk else min(16, round(tau / 5)))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor (FSDP2); any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def _coprime(stride: int, shape: torch.Size) -> int:
    """Return the nearest stride, by ratio, that shares no factor with the sizes.

    Another stride would visit a few columns only.  The next smaller one is often too small: for every fourth
    coordinate of 300 columns it is 1.
    """
    inner, size = math.prod(shape[1:]), math.prod(shape)
    smaller = next(step for step in range(stride, 0, -1) if math.gcd(step, inner) == 1)
    larger = next(step for step in itertools.count(stride) if math.gcd(step, inner) == 1)
    nearer = stride * stride > smaller * larger and larger <= size // COORDINATES_PER_TENSOR
    return larger if nearer else smaller


def _strides(tensors: Sequence[Tensor], *, reduced: bool) -> list[int]:
    """Return the stride at which each tensor's coordinates are read."""
    sizes = [local(tensor).numel() for tensor in tensors]
    total, part = sum(sizes), REDUCTION if reduced else 1
    stride = 1 if total <= COORDINATES_FULL // part else -(-total // (COORDINATES // part))
    return [
        _coprime(max(1, min(stride, size // COORDINATES_PER_TENSOR)), local(tensor).shape)
        for size, tensor in zip(sizes, tensors, strict=True)
    ]


class CoordinateSample:
    """A fixed stratified sample of coordinates over a list of tensors, packed into one vector.

    Every tensor contributes a strided view of at least ``COORDINATES_PER_TENSOR`` entries (all of it,
    if it is smaller), larger tensors proportionally more.

    Attributes:
        segments: int64 [C], which tensor a coordinate belongs to.
        counts: float32 [T], sampled coordinates of each tensor.
        weights: float32 [C], coordinates one sampled coordinate stands for; None if all are read.
        matrices: bool [T], which tensors have two dimensions or more.
        total: coordinates of all tensors together.
        can_reduce: whether a reduced sample would be another one.
        spans: (start, end) of each tensor's coordinates in [C].
        layout: (place, stride) of each tensor: what tells one sample's coordinates from another's.
    """

    def __init__(
        self, tensors: Sequence[Tensor], *, places: Sequence[int] | None = None, reduced: bool = False
    ) -> None:
        """``places``: which of a longer list each of ``tensors`` is; default: they are all of it."""
        sizes = [local(tensor).numel() for tensor in tensors]
        self.strides = _strides(tensors, reduced=reduced)
        self.layout = (*zip(range(len(sizes)) if places is None else places, self.strides, strict=True),)
        self.can_reduce = not reduced and _strides(tensors, reduced=True) != self.strides
        counts = [-(-size // step) for size, step in zip(sizes, self.strides, strict=True)]
        self._sizes, self._shapes = sizes, [(count,) for count in counts]
        self._steps = [(step,) for step in self.strides]
        device = tensors[0].device
        self.counts = devices.send(counts, device, torch.float32)
        self.segments = torch.repeat_interleave(
            torch.arange(len(counts), device=device),
            devices.send(counts, device),
            output_size=sum(counts),  # else the device is asked for it
        )
        self.weights: Tensor | None = None
        if any(step > 1 for step in self.strides):
            rates = [size / count for size, count in zip(sizes, counts, strict=True)]
            self.weights = devices.send(rates, device)[self.segments]
        self.matrices = devices.send([local(tensor).ndim > 1 for tensor in tensors], device)
        self.total = float(sum(sizes))
        self._starts = np.cumsum([0, *counts[:-1]])
        self.spans = []
        start = 0
        for count in counts:
            self.spans.append((start, start + count))
            start += count

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """Sampled coordinates of ``tensors`` (shapes as at construction) → float32/64 [C], a copy.

        No view outlives the call: it would keep alive what is moved elsewhere to make room.
        """
        with torch.no_grad():
            return self.pack(self._views([local(tensor) for tensor in tensors]))

    def _views(self, tensors: list[Tensor]) -> list[Tensor]:
        if (
            _PLAIN.issuperset(map(type, tensors))
            and [*map(Tensor.numel, tensors)] == self._sizes
            and all(map(Tensor.is_contiguous, tensors))
        ):
            # One call a tensor, from C, instead of three: large models have hundreds of them.
            return [*map(Tensor.as_strided, tensors, self._shapes, self._steps)]
        return [
            tensor.detach().reshape(-1)[::step] for tensor, step in zip(tensors, self.strides, strict=True)
        ]

    def per_tensor(self, values: Tensor) -> Tensor:
        """Sums over the sampled coordinates of each tensor. ``values`` [..., C] → [..., T]."""
        if devices.on_host(values):
            # Segments lie one behind the other: a single pass, pairwise, in a quarter of index_add_'s time.
            return torch.from_numpy(np.add.reduceat(values.numpy(), self._starts, axis=-1))
        sums = values.new_zeros(*values.shape[:-1], len(self.counts))
        return sums.index_add_(-1, self.segments, values)

    @staticmethod
    def pack(views: Sequence[Tensor]) -> Tensor:
        """One contiguous copy of the views, float32 or float64 [C]."""
        packed = torch.cat(list(views))
        return packed if packed.dtype in (torch.float32, torch.float64) else packed.float()
