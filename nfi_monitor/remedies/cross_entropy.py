"""Cross-entropy that cannot absorb: in the input's own precision, without float64, cheaper than torch's.

``F.cross_entropy`` gets the correct class's gradient as p_r − 1.  Once p_r is within half an ulp of 1 that is
exactly 0, the other gradients are not, and a row's gradient no longer sums to zero (Liu et al. 2026, section
3; Prieto et al. 2025).  Nothing is lost if 1 − p_r is never formed: with S = Σ_{k≠r} p_k, summed,

    loss = ln(1 + S / p_r) = softplus(ln Σ_{k≠r} e^z_k − z_r),   g_k = p_k,   g_r = −S.

With weights, label smoothing or probabilities as targets, a_k the (weighted) target and A = Σ_k a_k, it is

    loss = A ℓ_r + Σ_k a_k (z_r − z_k),   g_k = A p_k − a_k,   g_r = −Σ_{k≠r} g_k = Σ_{k≠r} a_k − A S,

where ℓ_r is the loss above and r the class with the largest target.

One [N, K] tensor is made in the forward pass and none in a plain backward pass: the gradient itself is kept,
not what it is made of.  ``F.cross_entropy`` makes three.  A few rows on a CPU go a shorter way: there each
call counts, not each number.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

REDUCTIONS = ("none", "mean", "sum")


def zero_sum_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """A drop-in for :func:`torch.nn.functional.cross_entropy` whose gradient obeys the zero-sum.

    For numerical feature inflation: used from the start no row absorbs; switched on at least 1.25 τ before a
    slingshot it averts it.  It changes no other loss and does nothing about spikes of other mechanisms.

    Args:
        input: logits [K], [N, K] or [N, K, d1, ...], floating point.  Half precisions are summed in float32.
        target: class indices (int64) of the input's shape without the class axis, or class probabilities of
            the input's shape and a floating dtype.
        weight: [K], a factor for each class.
        ignore_index: rows with this index count neither in the loss nor in its mean.
        reduction: "mean" (over rows, weighted by ``weight`` for indices), "sum" or "none".
        label_smoothing: in [0, 1].

    Returns:
        The loss in nats, a scalar (shape without the class axis for "none"); float32 for half precisions, as
        ``F.cross_entropy`` has it under autocast: a gradient scaler's factor would overflow float16.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that ``F.cross_entropy`` refuses as well.
        RuntimeError: on a second derivative (use ``F.cross_entropy`` in float64 there); on a second backward
            pass after the gradient of the first was changed in place: what is handed out is what is kept.

    In float32 the loss is within (|margin| + 8)·2⁻²⁴ of the exact one, relatively (and K·2⁻¹⁵⁰), and a row's
    gradient sums to zero within 4 ulp of its largest entry (``tests/remedies/test_cross_entropy.py``).  On a
    CPU it costs half of ``F.cross_entropy`` with a large vocabulary or many rows of few classes, and up to
    50 µs more for some hundred rows of ten and fewer: there a loss written in Python costs nearly as much
    before it computes anything (``tests/benchmarks/remedies/RESULTS.md``).  When not to use it: for
    other losses, and where second derivatives are needed.  Source: 1 − p_r = Σ_{k≠r} p_k; the mechanism is
    Liu et al. 2026.
    """
    if weight is None and reduction == "mean" and label_smoothing == 0.0 and ignore_index < 0:
        small = _of_few(input, target)
        if small is not None:
            return small
    axis = _check(input, target, weight, reduction, label_smoothing)
    rows, lead = input, input.shape[:-1]
    if input.dim() != 2:
        rows = input.movedim(axis, -1)
        lead = rows.shape[:-1]
        rows = rows.reshape(-1, rows.shape[-1])
    if weight is not None:
        weight = weight.detach().to(device=input.device, dtype=_wide(input.dtype))
    if target.is_floating_point():
        soft = target.movedim(axis, -1).reshape(rows.shape)
        loss = _SoftCrossEntropy.apply(rows, _targets(soft, weight, label_smoothing, rows.dtype))
        if reduction != "none":
            loss = loss.sum() if reduction == "sum" else loss.mean()
    elif label_smoothing == 0.0:
        loss = _CrossEntropy.apply(rows, target.reshape(-1), weight, ignore_index, reduction)
    else:
        index = target.reshape(-1)
        kept = index != ignore_index
        index = torch.where(kept, index, 0)
        loss = torch.where(kept, _SmoothCrossEntropy.apply(rows, index, weight, label_smoothing), 0.0)
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            counted = kept if weight is None else torch.where(kept, weight[index], 0.0)
            loss = loss / counted.sum()
    result: Tensor = loss.reshape(lead) if reduction == "none" else loss
    return result


def float64_cross_entropy(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """``F.cross_entropy`` in float64, parameters as they are: the reference of the other.

    For numerical feature inflation up to margins of 36 nats, where float64 absorbs as well (2⁻⁵³).  Costs two
    [N, K] tensors of twice the width.  ``options`` and shapes as for ``F.cross_entropy``; returns float64.
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


# --- rows ------------------------------------------------------------------------------------------
#
# All take logits [N, K] and work in float32 (float64 for float64 logits).


class _CrossEntropy(torch.autograd.Function):
    """Hard targets, int64 [N] → the reduced loss (one a row [N] for "none").

    Reduced in here: at ten classes each autograd operation of a row's loss costs as much as the softmax.  And
    so the gradient is known up to its incoming factor, which is 1 in a plain training step: no second [N, K].
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
    ) -> Tensor:
        target = target.unsqueeze(-1)  # columns throughout: each view costs as much as a small operation
        kept = target != ignore_index
        index = torch.where(kept, target, 0)
        rest, total, mass, loss = _rest(logits, index)
        counted = kept if weight is None else torch.where(kept, weight[index], 0.0)
        if weight is not None:
            loss = loss * counted
        # ``where`` and not a product: an ignored row may hold NaN or Inf.
        loss = torch.where(kept, loss, 0.0)
        loss = loss.squeeze(-1) if reduction == "none" else loss.sum()
        if reduction == "mean":
            count = counted.sum()
            loss = loss / count
            total = total * count
        if ctx.needs_input_grad[0]:
            scale = counted / total
            rest.mul_(scale).scatter_(-1, index, (mass * scale).neg_())
            ctx.save_for_backward(rest)
            ctx.dtype, ctx.reduced = logits.dtype, reduction != "none"
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = _gradient(ctx)
        if ctx.reduced and _is_one(grad):
            return found.to(ctx.dtype), None, None, None, None
        return _times(found, grad if ctx.reduced else grad.unsqueeze(-1), ctx.dtype), None, None, None, None


# The mean loss of a few rows on a CPU.  An operation of torch costs more there than what it does, and several
# times as much as one of NumPy, which sees the same memory.  The way above is what this is tested against.

SMALL = 1 << 14
"""Logits up to which the fewest and cheapest calls win."""

_Array = np.ndarray[Any, Any]
_UNSIGNED = np.dtype(np.uint64)


def _of_few(logits: Tensor, target: Tensor) -> Tensor | None:
    """None where the long way has to be taken: other inputs, an ignored row, an overflow, a wrong index."""
    if not (
        not torch.compiler.is_compiling()  # first: the sizes are not to be guarded
        and type(logits) is Tensor  # a subclass may hold something else than its values
        and logits.is_cpu
        and target.is_cpu
        and 0 < logits.numel() <= SMALL
        and (logits.dtype is torch.float32 or logits.dtype is torch.float64)
        and target.dtype is torch.int64
        and not torch._C._len_torch_dispatch_stack()  # make_fx would see constants
        and not torch._C._is_tracing()  # likewise
    ):
        return None
    try:
        z, index = logits.detach().numpy(), target.numpy()
    except (RuntimeError, TypeError):  # without memory of their own: inside vmap, sparse
        return None
    if z.ndim != 2 or index.shape != z.shape[:1] or not z.flags.c_contiguous:
        return None
    known = _mean_and_gradient(z, index, logits.requires_grad and torch.is_grad_enabled())
    if known is None:
        return None
    result: Tensor = _attach(logits, *known)
    return result


@np.errstate(all="ignore")
def _mean_and_gradient(z: _Array, index: _Array, wanted: bool) -> tuple[_Array, _Array | None] | None:
    """(mean loss [], its gradient [N, K] if ``wanted``), with everything relative to the target's own logit.

    loss = ln(1 + Σ_{k≠r} e_k), e_k = e^(z_k − z_r): no maximum is looked for, so that a margin below some −80
    (float32) overflows, and the answer is None.
    """
    rows, classes = z.shape
    starts, ones, counts, shares = _constants(rows, classes, z.dtype)
    unsigned = index.view(_UNSIGNED)  # what is negative is large
    if unsigned.item(unsigned.argmax()) >= classes:
        return None
    own = starts + index
    # Repeated and flat: a broadcast operation starts a loop for each row.
    flat = z.ravel() - z.take(own).repeat(classes)
    e = np.exp(flat, out=flat).reshape(rows, classes)
    total = e.dot(counts)  # N (1 + Σ_{k≠r} e_k)
    if not total.dot(shares) < math.inf:
        return None
    flat[own] = 0.0
    mass = e.dot(ones)
    loss = np.asarray(np.log1p(mass).dot(shares))
    if not wanted:
        return loss, None
    flat[own] = -mass
    flat /= total.repeat(classes)
    return loss, e


@lru_cache(maxsize=8)
def _constants(rows: int, classes: int, dtype: np.dtype[Any]) -> tuple[_Array, _Array, _Array, _Array]:
    """(where each row starts, ones [K], N [K], 1/N [N])."""
    return (
        np.arange(0, rows * classes, classes),
        np.ones(classes, dtype),
        np.full(classes, rows, dtype),
        np.full(rows, 1.0 / rows, dtype),
    )


class _Known(torch.autograd.Function):
    """A loss [] whose gradient [N, K], where one is wanted, has been computed with it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: _Array, gradient: _Array | None) -> Tensor:
        if gradient is not None:
            ctx.save_for_backward(torch.from_numpy(gradient))
        return torch.from_numpy(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = _gradient(ctx)
        return found if grad.item() == 1.0 else found * grad, None, None


# Function.apply looks for functorch's wrappers first, which have no NumPy view and never get here: 5% of all
# that F.cross_entropy takes for 128 rows of ten classes.
_attach = super(torch.autograd.Function, _Known).apply


class _SmoothCrossEntropy(torch.autograd.Function):
    """Hard targets with label smoothing, and class weights or None; no [N, K] of targets is made. → [N]"""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
        column = index.unsqueeze(-1)
        rest, total, mass, loss = _rest(logits, column)
        wide = logits.to(rest.dtype)
        classes = logits.shape[-1]
        share = smoothing / classes
        if weight is None:
            weight = torch.ones(classes, dtype=rest.dtype, device=rest.device)
        own, of_all = weight[column], weight.sum()
        amount = (1.0 - smoothing) * own + share * of_all  # A
        spread = of_all * wide.gather(-1, column) - (wide @ weight).unsqueeze(-1)
        if ctx.needs_input_grad[0]:
            found = rest.mul_(amount / total).sub_(share * weight)
            lacking = share * (of_all - own) - amount * mass / total
            ctx.save_for_backward(found.scatter_(-1, column, lacking))
            ctx.dtype = logits.dtype
        return (amount * loss + share * spread).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _times(_gradient(ctx), grad.unsqueeze(-1), ctx.dtype), None, None, None


class _SoftCrossEntropy(torch.autograd.Function):
    """``targets`` a [N, K] with weights and smoothing in them; like a teacher's, they get no gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        column = targets.argmax(-1, keepdim=True)
        rest, total, mass, loss = _rest(logits, column)
        amount = targets.sum(-1, keepdim=True)
        others = targets.scatter(-1, column, 0.0)
        wide = logits.to(rest.dtype)
        # A target of 0 counts nothing, also at a logit of −inf.
        differences = wide.gather(-1, column) - wide
        spread = torch.where(others == 0, 0.0, others * differences).sum(-1, keepdim=True)
        if ctx.needs_input_grad[0]:
            found = rest.mul_(amount / total).sub_(others)
            lacking = others.sum(-1, keepdim=True) - amount * mass / total
            ctx.save_for_backward(found.scatter_(-1, column, lacking))
            ctx.dtype = logits.dtype
        return (amount * loss + spread).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _times(_gradient(ctx), grad.unsqueeze(-1), ctx.dtype), None


def _rest(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(e with the target's entry 0 [N, K], Σ_k e_k, Σ_{k≠r} e_k, ℓ_r = −ln p_r, each [N, 1]).

    e_k = e^(z_k − max z), ``column`` int64 [N, 1] the target.  Elementwise and not ``torch.softmax``, whose
    kernel takes twenty times as long at ten classes and no less at fifty thousand.
    """
    rest = logits - logits.amax(-1, keepdim=True).to(_wide(logits.dtype))
    own = rest.gather(-1, column)
    mass = rest.exp_().scatter_(-1, column, 0.0).sum(-1, keepdim=True)
    # ln(1 + Σ_{k≠r} e_k / e_r) never forms a difference from 1, and does not underflow where p_r does.
    loss = nn.functional.softplus(mass.log() - own, threshold=_LINEAR)
    return rest, own.exp_().add_(mass), mass, loss


_LINEAR = 40.0
"""ln(1 + e^x) is x to the last bit of a float64 from here on."""


def _gradient(ctx: Any) -> Tensor:
    """What was saved. A second derivative would silently be taken for 0: it is an error instead."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "zero_sum_cross_entropy has no second derivative (create_graph=True). Use "
            "F.cross_entropy(logits.double(), target) where one is needed."
        )
    found: Tensor = ctx.saved_tensors[0]
    return found


def _is_one(grad: Tensor) -> bool:
    """Only where looking is free: never a synchronisation, never a graph break."""
    return not torch.compiler.is_compiling() and grad.device.type == "cpu" and grad.item() == 1.0


def _times(found: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor: a second backward pass finds ``found`` as it was."""
    if found.dtype is dtype:
        return found * grad
    return torch.mul(found, grad, out=torch.empty_like(found, dtype=dtype))


def _targets(soft: Tensor, weight: Tensor | None, smoothing: float, dtype: torch.dtype) -> Tensor:
    """a [N, K]: probabilities, smoothed and weighted."""
    soft = soft.detach().to(_wide(dtype))
    if smoothing:
        soft = soft * (1.0 - smoothing) + smoothing / soft.shape[-1]
    return soft if weight is None else soft * weight


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


# --- arguments -------------------------------------------------------------------------------------


def _check(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float
) -> int:
    """The class axis; raises what ``F.cross_entropy`` raises, saying which shapes were given."""
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
