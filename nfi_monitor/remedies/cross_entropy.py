"""Compute a cross-entropy that cannot absorb: in the input's own precision, cheaper than torch's.

``F.cross_entropy`` computes the correct class's gradient as p_r − 1.  If p_r is within half an ulp of 1, this
is exactly 0, but the other gradients are not.  So the row's gradient no longer sums to zero (Liu et al. 2026,
section 3; Prieto et al. 2025).  The cure is to compute 1 − p_r as the sum S = Σ_{k≠r} p_k, without a
subtraction:

    loss = ln(1 + S / p_r) = softplus(ln Σ_{k≠r} e^z_k − z_r),   g_k = p_k,   g_r = −S.

With weights, label smoothing or probabilities as targets, a_k the (weighted) target and A = Σ_k a_k, it is

    loss = A ℓ_r + Σ_k a_k (z_r − z_k),   g_k = A p_k − a_k,   g_r = −Σ_{k≠r} g_k = Σ_{k≠r} a_k − A S,

where ℓ_r is the loss above and r the class with the largest target.

The forward pass makes one [N, K] tensor, the gradient itself; a plain backward pass makes none.
``F.cross_entropy`` makes three.  A few rows on a CPU are computed in one call of the C library, or in NumPy
(``few_rows.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.remedies.few_rows import mean_of_few_rows
from nfi_monitor.remedies.row_losses import (
    CrossEntropy,
    SmoothCrossEntropy,
    SoftCrossEntropy,
    weighted_targets,
    wide_dtype,
)

REDUCTIONS = ("none", "mean", "sum")


def zero_sum_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return what :func:`torch.nn.functional.cross_entropy` returns, with a gradient that sums to zero.

    It is for numerical feature inflation.  From the start of a training, it prevents absorption.  From 1.25 τ
    before a slingshot or earlier, it averts the slingshot.  It does not avert spikes of other mechanisms.

    Args:
        input: logits [K], [N, K] or [N, K, d1, ...], floating point.  Half precisions are summed in float32.
        target: class indices (int64) of the input's shape without the class axis, or class probabilities of
            the input's shape and a floating dtype.
        weight: [K], a factor for each class.
        ignore_index: rows with this index count neither in the loss nor in its mean.
        reduction: "mean" (over rows, weighted by ``weight`` for indices), "sum" or "none".
        label_smoothing: in [0, 1].

    Returns:
        The loss in nats, a scalar (shape without the class axis for "none").  For half precisions it is
        float32, as ``F.cross_entropy`` under autocast: a gradient scaler's factor would overflow float16.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that ``F.cross_entropy`` refuses as well.
        RuntimeError: on a second derivative (use ``F.cross_entropy`` in float64 there); on a second backward
            pass if the gradient of the first, which is kept, was changed in place.

    In float32 the loss is within (|margin| + 8)·2⁻²⁴ of the exact one, relatively (and K·2⁻¹⁵⁰).  A row's
    gradient sums to zero within 4 ulp of its largest entry (``tests/remedies/test_cross_entropy.py``).  On a
    CPU it costs half of ``F.cross_entropy`` with a large vocabulary or many rows of few classes.  For 32
    rows of ten classes it costs about as much, for 128 rows .7 times (without the C library 1.3 and .9
    times; ``tests/benchmarks/remedies/losscost.py``).  Source: 1 − p_r = Σ_{k≠r} p_k; Liu et al. 2026.
    """
    if weight is None and reduction == "mean" and label_smoothing == 0.0 and ignore_index < 0:
        small = mean_of_few_rows(input, target)
        if small is not None:
            return small
    axis = _check(input, target, weight, reduction, label_smoothing)
    rows, lead = input, input.shape[:-1]
    if input.dim() != 2:
        rows = input.movedim(axis, -1)
        lead = rows.shape[:-1]
        rows = rows.reshape(-1, rows.shape[-1])
    if weight is not None:
        weight = weight.detach().to(device=input.device, dtype=wide_dtype(input.dtype))
    if target.is_floating_point():
        soft = target.movedim(axis, -1).reshape(rows.shape)
        loss = SoftCrossEntropy.apply(rows, weighted_targets(soft, weight, label_smoothing, rows.dtype))
        if reduction != "none":
            loss = loss.sum() if reduction == "sum" else loss.mean()
    elif label_smoothing == 0.0:
        loss = CrossEntropy.apply(rows, target.reshape(-1), weight, ignore_index, reduction)
    else:
        loss = _smoothed(rows, target.reshape(-1), weight, ignore_index, reduction, label_smoothing)
    result: Tensor = loss.reshape(lead) if reduction == "none" else loss
    return result


def _smoothed(
    rows: Tensor, index: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> Tensor:
    """Return the reduced loss of ``rows`` [N, K] with label smoothing, hard targets [N] ([N] for "none")."""
    kept = index != ignore_index
    index = torch.where(kept, index, 0)
    loss = torch.where(kept, SmoothCrossEntropy.apply(rows, index, weight, smoothing), 0.0)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        counted = kept if weight is None else torch.where(kept, weight[index], 0.0)
        loss = loss / counted.sum()
    return loss


def float64_cross_entropy(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Return ``F.cross_entropy`` in float64; the parameters keep their dtype.

    It is for numerical feature inflation up to margins of 36 nats, where float64 absorbs as well (2⁻⁵³).  It
    costs two [N, K] tensors of twice the width.  It is the reference of :func:`zero_sum_cross_entropy`.
    ``options`` and shapes as for ``F.cross_entropy``; returns float64.
    """
    if target.is_floating_point():
        target = target.double()
    weight = options.pop("weight", None)
    weight = None if weight is None else weight.double()
    return nn.functional.cross_entropy(input.double(), target, weight=weight, **options)


class ZeroSumCrossEntropyLoss(nn.Module):
    """:func:`zero_sum_cross_entropy` as a module: a drop-in for :class:`torch.nn.CrossEntropyLoss`."""

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(_unknown_reduction(reduction))
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return zero_sum_cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing:g}"


def _check(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float
) -> int:
    """Return the class axis. Raises what ``F.cross_entropy`` raises, with the shapes that were given."""
    if reduction not in REDUCTIONS:
        raise ValueError(_unknown_reduction(reduction))
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}.")
    if not input.is_floating_point():
        raise TypeError(f"Logits must be floating point, got {input.dtype}.")
    if input.dim() == 0:
        raise ValueError("Logits need a class axis: [K], [N, K] or [N, K, d1, ...]; got a 0-d tensor.")
    axis = 0 if input.dim() == 1 else 1
    classes = input.shape[axis]
    rows = input.shape[:axis] + input.shape[axis + 1 :]
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ValueError(
                f"Class probabilities must have the logits' shape {tuple(input.shape)}, got "
                f"{tuple(target.shape)}."
            )
    elif target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"Class indices must be int64, got {target.dtype}.")
    elif target.shape != rows:
        raise ValueError(
            f"Class indices for logits {tuple(input.shape)} must have shape {tuple(rows)}, got "
            f"{tuple(target.shape)}."
        )
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), got {tuple(weight.shape)}.")
    return axis


def _unknown_reduction(reduction: str) -> str:
    return f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}."
