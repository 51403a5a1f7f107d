"""Choose the rows, coordinates and steps that are read, without random numbers.

The monitor must not change the random state.  So every sample is a stride with a rotating offset.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nfi_monitor._moved import left
from nfi_monitor.capture import devices
from nfi_monitor.native.gather import Gather

ROW_ELEMENTS = 1 << 18
"""Smallest budget of logits read per backward pass (256 Ki elements, 1 MiB in float32)."""
ROW_SHARE = 64
"""One row in this many is read if that is more than ``ROW_ELEMENTS``: at large N·K, 1/64 of all rows."""
COORDINATES = 1 << 14
"""Optimizer coordinates read per step in large models."""
COORDINATES_FULL = 1 << 15
"""Models up to this many parameters are read whole."""
COORDINATES_PER_TENSOR = 64
"""Minimum number of coordinates read of a tensor that has that many."""
REDUCTION = 4
"""Factor by which a reduced sample divides the budget of rows and coordinates.  This saves a fifth to a third
of a reading's time.  A factor of 8 saves hardly more, because the remaining time starts kernels."""
BIN = 64
"""Number of coordinates that a device adds up; the host adds up these sums. With more of them, a sum would be
less precise, and its additions would wait for each other."""
FEWEST_ROWS = 64
"""Minimum number of rows in a reduced sample, if the full budget has that many."""

_PLAIN = frozenset((Tensor, nn.Parameter))
"""Tensor types that support ``as_strided``; a subclass may not."""


def row_stride(rows: int, classes: int, *, reduced: bool = False) -> int:
    """Return the stride at which rows are read; 1: all rows."""
    budget = max(ROW_ELEMENTS // max(classes, 1), rows // ROW_SHARE, 1)
    if reduced:
        budget = max(budget // REDUCTION, min(budget, FEWEST_ROWS))
    return -(-rows // budget)


def strides(rows: int, classes: int, *, reduced: bool) -> tuple[int, bool]:
    """Return the stride of the plan, and whether the reduced sample is a smaller one."""
    whole, fewer = row_stride(rows, classes), row_stride(rows, classes, reduced=True)
    return (fewer if reduced else whole), fewer > whole


def offset(step: int, stride: int) -> int:
    """Return the first index of the stride at this step, in [0, stride).

    Over the steps it takes all values, and neighbouring steps have distant values.
    """
    # The golden ratio spreads successive offsets.  A plain counter would scan rows in order, and could follow
    # the order of the data.
    return int(step * 0.6180339887498949 * stride) % stride if stride > 1 else 0


def auto_interval(tau: float, *, at_risk: bool = False) -> int:
    """Return the steps between readings of a healthy run: τ/5, from 8 to 16; at risk τ/50, from 1 to 8.

    A numeric slingshot builds up over some 20 τ, and its last stages over 2–5 τ.  So readings every τ/5 show
    it in time, and readings every τ/50 show ‖μ_G‖ begin to grow.  With a short τ, a healthy run is read every
    8 steps, but at least every τ/2.  The caps are for β2 = .999, where second-moment slingshots take only a
    few steps.
    """
    if at_risk:
        return max(1, min(8, round(tau / 50)))
    return max(1, min(16, round(max(tau / 5, min(8.0, tau / 2)))))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor (FSDP2); any other tensor itself."""
    if type(tensor) is Tensor:  # the usual case, at every step
        return tensor
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def _coprime(stride: int, shape: torch.Size) -> int:
    """Return the nearest stride, by ratio, that shares no factor with the sizes.

    A stride with a common factor would read only a few columns.  The next smaller stride is often too small:
    for a stride of 4 over 300 columns it is 1.
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


class Bins(NamedTuple):
    """Which of the sums that a device made are of which tensor: ``number`` of them, first index of each."""

    number: int
    starts: Any

    def per_tensor(self, sums: Tensor) -> Any:
        """Return the sums of each tensor, float64 [r, T] of NumPy. ``sums`` [r, B] on the host."""
        return np.add.reduceat(sums.double().numpy(), self.starts, axis=-1)


class CoordinateSample:
    """A fixed stratified sample of coordinates over a list of tensors, packed into one vector.

    Of every tensor at least ``COORDINATES_PER_TENSOR`` entries are read, at a stride (all, if it has fewer).
    Of larger tensors proportionally more are read.

    Attributes:
        segments: int64 [C], index of the tensor of each coordinate. Made where it is asked for.
        counts: float32 [T], number of sampled coordinates of each tensor.
        weights: float32 [C], number of coordinates that each sampled one represents; None if all are read.
        matrices: bool [T], whether each tensor has two dimensions or more.
        total: number of coordinates of all tensors.
        can_reduce: whether a reduced sample would be smaller.
        spans: (start, end) of each tensor's coordinates in [C].
        layout: (place, stride) of each tensor. Samples with equal layouts have the same coordinates.
        are_matrices: the same, on the host.
        rates: number of coordinates that each sampled one represents, for each tensor, as a number.
    """

    def __init__(
        self, tensors: Sequence[Tensor], *, places: Sequence[int] | None = None, reduced: bool = False
    ) -> None:
        """``places``: index of each tensor in a longer list; default: 0, 1, 2, …"""
        sizes = [local(tensor).numel() for tensor in tensors]
        self.strides = _strides(tensors, reduced=reduced)
        self.layout = (*zip(range(len(sizes)) if places is None else places, self.strides, strict=True),)
        self.can_reduce = not reduced and _strides(tensors, reduced=True) != self.strides
        counts = [-(-size // step) for size, step in zip(sizes, self.strides, strict=True)]
        self._sizes, self._shapes = sizes, [(count,) for count in counts]
        self._steps = [(step,) for step in self.strides]
        self.rates = [size / count for size, count in zip(sizes, counts, strict=True)]
        self._bins: tuple[Tensor, Bins] | None = None
        device = tensors[0].device
        self.counts = devices.send(counts, device, torch.float32)
        self.are_matrices = [local(tensor).ndim > 1 for tensor in tensors]
        self.matrices = devices.send(self.are_matrices, device)
        self.total = float(sum(sizes))
        self._starts = np.cumsum([0, *counts[:-1]])
        self._gather = Gather(self.strides, counts)
        self.spans = []
        start = 0
        for count in counts:
            self.spans.append((start, start + count))
            start += count
        self._leading: CoordinateSample | None = None

    @cached_property
    def segments(self) -> Tensor:
        counts, device = [count for (count,) in self._shapes], self.counts.device
        return torch.repeat_interleave(
            torch.arange(len(counts), device=device),
            devices.send(counts, device),
            output_size=sum(counts),  # without it, torch would wait for the device
        )

    @cached_property
    def weights(self) -> Tensor | None:
        if all(step == 1 for step in self.strides):
            return None
        return devices.send(self.rates, self.counts.device)[self.segments]

    def in_bins(self, values: Tensor) -> tuple[Tensor, Bins]:
        """Return sums over a few sampled coordinates each, [r, C] → [r, B], and of which tensor they are."""
        if self._bins is None:
            counts = [count for (count,) in self._shapes]
            sizes = [min(BIN, count - start) for count in counts for start in range(0, count, BIN)]
            at = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
            starts = np.cumsum([0, *(-(-count // BIN) for count in counts[:-1])])
            self._bins = devices.send(at, values.device), Bins(len(sizes), starts)
        places, bins = self._bins
        return values.new_zeros(len(values), bins.number).index_add_(-1, places, values), bins

    def gather_both(self, one: Sequence[Tensor], two: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return what :meth:`gather` does of two lists, on an accelerator in one call for both."""
        tensors = (*one, *two)
        if devices.on_host(tensors[0]) or len({tensor.dtype for tensor in tensors}) > 1:
            return self.gather(one), self.gather(two)
        with torch.no_grad():
            packed = self.pack([*self._views(one), *self._views(two)])
        end = self.spans[-1][1]
        return packed[:end], packed[end:]

    def leading(self, tensors: int) -> CoordinateSample:
        """Return the sample of the first ``tensors`` tensors alone: the first coordinates of this one."""
        if tensors == len(self.spans):
            return self
        if self._leading is None or len(self._leading.spans) != tensors:
            part = copy(self)
            end = self.spans[tensors - 1][1]
            for name in (
                "strides",
                "layout",
                "_sizes",
                "_shapes",
                "_steps",
                "_starts",
                "spans",
                "counts",
                "matrices",
                "are_matrices",
                "rates",
            ):
                setattr(part, name, getattr(self, name)[:tensors])
            for name in ("segments", "weights"):  # those that are made already
                if vars(self).get(name) is not None:
                    vars(part)[name] = getattr(self, name)[:end]
            part.total, part._leading, part._bins = float(sum(part._sizes)), None, None
            part._gather = Gather(part.strides, [count for (count,) in part._shapes])
            self._leading = part
        return self._leading

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the sampled coordinates of ``tensors`` (shapes as at construction), float32/64 [C], a copy.

        No view is kept: it would keep a tensor's memory that the training moves elsewhere to save memory.
        """
        copied = self._gather.copy(tensors) if self._can_stride(tensors) else None
        if copied is not None:
            return copied
        with torch.no_grad():
            return self.pack(self._views(tensors))

    def _views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sampled coordinates of each tensor."""
        if self._can_stride(tensors):
            # One call for each tensor instead of three: large models have hundreds of tensors.
            return [*map(Tensor.as_strided, tensors, self._shapes, self._steps)]
        whole = [local(tensor).detach().reshape(-1) for tensor in tensors]
        if [*map(Tensor.numel, whole)] != self._sizes:  # grad.data may be of any size
            raise ValueError("a gradient or a moment has another size than its parameter")
        return [tensor[::step] for tensor, step in zip(whole, self.strides, strict=True)]

    def _can_stride(self, tensors: Sequence[Tensor]) -> bool:
        return (
            _PLAIN.issuperset(map(type, tensors))
            and [*map(Tensor.numel, tensors)] == self._sizes
            and all(map(Tensor.is_contiguous, tensors))
        )

    def per_tensor(self, values: Tensor) -> Tensor:
        """Return sums over the sampled coordinates of each tensor. ``values`` [..., C] → [..., T]."""
        if devices.on_host(values):
            # The coordinates of a tensor are contiguous, so this takes a quarter of index_add_'s time.
            return torch.from_numpy(np.add.reduceat(values.numpy(), self._starts, axis=-1))
        sums = values.new_zeros(*values.shape[:-1], len(self.counts))
        return sums.index_add_(-1, self.segments, values)

    @staticmethod
    def pack(views: Sequence[Tensor]) -> Tensor:
        """Return one contiguous copy of the views, float32 or float64 [C]."""
        packed = torch.cat(list(views))
        return packed if packed.dtype in (torch.float32, torch.float64) else packed.float()


def copies(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return copies, on an accelerator in one launch."""
    present = [tensor for tensor in tensors if tensor is not None]
    if _in_one_launch(present):
        made = iter(torch._foreach_mul(present, 1.0))
        return [None if tensor is None else next(made) for tensor in tensors]
    return [None if tensor is None else tensor.clone() for tensor in tensors]


def differences(after: Sequence[Tensor | None], before: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return ``after − before``, on an accelerator in one launch; None where either is None."""
    pairs = [None if a is None or b is None else (a, b) for a, b in zip(after, before, strict=True)]
    present = [pair for pair in pairs if pair is not None]
    if _in_one_launch([new for new, _ in present]):
        made = iter(torch._foreach_sub([new for new, _ in present], [old for _, old in present]))
        return [None if pair is None else next(made) for pair in pairs]
    return [None if pair is None else pair[0] - pair[1] for pair in pairs]


def _in_one_launch(tensors: Sequence[Tensor]) -> bool:
    return len(tensors) > 1 and not devices.on_host(tensors[0]) and _PLAIN.issuperset(map(type, tensors))


if not TYPE_CHECKING:  # for a type checker, any name would exist

    def __getattr__(name: str) -> Any:
        return left(__name__, name)
