"""Compute losses whose gradient sums to zero in each row, as autograd functions.

Formulas: ``cross_entropy.py``.

All take logits [N, K] and work in float32 (float64 for float64 logits).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class CrossEntropy(torch.autograd.Function):
    """Compute the reduced loss for hard targets, int64 [N] (one loss per row [N] for "none").

    The loss is reduced here, because at ten classes each autograd operation costs as much as the softmax.
    Then the gradient is known except for its incoming factor.  In a plain training step this is 1, so no
    second [N, K] is needed.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
    ) -> Tensor:
        target = target.unsqueeze(-1)  # keep columns: each view costs as much as a small operation
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
        found = saved_gradient(ctx)
        if ctx.reduced and _is_one(grad):
            return found.to(ctx.dtype), None, None, None, None
        return _times(found, grad if ctx.reduced else grad.unsqueeze(-1), ctx.dtype), None, None, None, None


class SmoothCrossEntropy(torch.autograd.Function):
    """Compute the loss [N] for hard targets with label smoothing. No [N, K] of targets is made."""

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
        return _times(saved_gradient(ctx), grad.unsqueeze(-1), ctx.dtype), None, None, None


class SoftCrossEntropy(torch.autograd.Function):
    """Compute the loss [N] for targets [N, K] that contain weights and smoothing, without their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        column = targets.argmax(-1, keepdim=True)
        rest, total, mass, loss = _rest(logits, column)
        amount = targets.sum(-1, keepdim=True)
        others = targets.scatter(-1, column, 0.0)
        wide = logits.to(rest.dtype)
        # A target of 0 adds nothing, also at a logit of −inf.
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
        return _times(saved_gradient(ctx), grad.unsqueeze(-1), ctx.dtype), None


def _rest(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return e [N, K] with 0 for the target, and Σ_k e_k, Σ_{k≠r} e_k, ℓ_r = −ln p_r, each [N, 1].

    e_k = e^(z_k − max z), ``column`` int64 [N, 1] the target.  Rejected: ``torch.softmax``, whose
    kernel takes twenty times as long at ten classes, and is not faster at fifty thousand.
    """
    rest = logits - logits.amax(-1, keepdim=True).to(wide_dtype(logits.dtype))
    own = rest.gather(-1, column)
    mass = rest.exp_().scatter_(-1, column, 0.0).sum(-1, keepdim=True)
    # ln(1 + Σ_{k≠r} e_k / e_r) never forms a difference from 1, and does not underflow where p_r does.
    loss = nn.functional.softplus(mass.log() - own, threshold=_LINEAR)
    return rest, own.exp_().add_(mass), mass, loss


_LINEAR = 40.0
"""ln(1 + e^x) is x to the last bit of a float64 from here on."""


def saved_gradient(ctx: Any) -> Tensor:
    """Return the saved gradient. Raises RuntimeError for a second derivative, which would silently be 0."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "zero_sum_cross_entropy has no second derivative (create_graph=True). Use "
            "F.cross_entropy(logits.double(), target) where one is needed."
        )
    found: Tensor = ctx.saved_tensors[0]
    return found


def _is_one(grad: Tensor) -> bool:
    """Return whether ``grad`` is 1; False if the answer would need a synchronisation or a graph break."""
    return not torch.compiler.is_compiling() and grad.device.type == "cpu" and grad.item() == 1.0


def _times(found: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a new tensor: a second backward pass needs ``found`` unchanged."""
    if found.dtype is dtype:
        return found * grad
    return torch.mul(found, grad, out=torch.empty_like(found, dtype=dtype))


def weighted_targets(soft: Tensor, weight: Tensor | None, smoothing: float, dtype: torch.dtype) -> Tensor:
    """Return the targets a [N, K]: probabilities, smoothed and weighted."""
    soft = soft.detach().to(wide_dtype(dtype))
    if smoothing:
        soft = soft * (1.0 - smoothing) + smoothing / soft.shape[-1]
    return soft if weight is None else soft * weight


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
