"""Compute the head and its loss together, in blocks of rows: no [N, K] tensor exists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nfi_monitor.remedies.cross_entropy import zero_sum_cross_entropy

BLOCK = 1 << 24
"""Default number of logits in a block: 64 MiB in float32."""


def linear_zero_sum_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    rows_at_a_time: int | None = None,
) -> Tensor:
    """Return :func:`zero_sum_cross_entropy` of ``hidden @ head_weight.T + bias``, for large vocabularies.

    Logits and their gradient exist for one block of rows at a time.  The gradients of ``hidden``,
    ``head_weight`` and ``bias`` are computed in the forward pass, block by block, and scaled in the backward
    pass.  The monitor then sees no rows, only the head's weight gradient.

    Args:
        hidden: features [N, d] (or [..., d]); ``head_weight`` [K, d]; ``bias`` [K] or None.
        target: class indices [N] (or [...]).
        rows_at_a_time: rows of a block; default: so many that a block holds 2^24 logits.
        weight, ignore_index, label_smoothing: as for ``zero_sum_cross_entropy``.
        reduction: "mean" or "sum".

    Raises ValueError for other shapes or reductions.
    """
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction must be one of mean, sum, got {reduction!r}: a loss for each row would need each "
            "row's gradient apart."
        )
    if head_weight.dim() != 2 or head_weight.shape[1] != hidden.shape[1] or len(target) != len(hidden):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, head_weight {tuple(head_weight.shape)} and target "
            f"{tuple(target.shape)} do not fit: [N, d], [K, d] and [N] are needed."
        )
    rows = rows_at_a_time or max(1, BLOCK // len(head_weight))
    options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    total: Tensor = _Linear.apply(hidden, head_weight, bias, target, rows, options)
    if reduction == "sum":
        return total
    kept = target != ignore_index
    if weight is None:
        return total / kept.sum()
    return total / torch.where(kept, weight[torch.where(kept, target, 0)], 0.0).sum()


class _Linear(torch.autograd.Function):
    """Compute the sum of the losses, with the gradients of the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rows: int,
        options: dict[str, Any],
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden.device)
        wanted = ctx.needs_input_grad[:3]
        # Keep the weight's gradient in float32, because thousands of blocks are added up.
        grads = [
            torch.zeros_like(tensor, dtype=wide) if want and tensor is not None else None
            for want, tensor in zip(wanted, (hidden, head_weight, bias), strict=True)
        ]
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                logits = torch.nn.functional.linear(hidden[part], head_weight, bias).detach()
                logits.requires_grad_(any(wanted))
                loss = zero_sum_cross_entropy(logits, target[part], reduction="sum", **options)
            total += loss.detach()
            if not any(wanted):
                continue
            (grad,) = torch.autograd.grad(loss, logits)
            if grads[0] is not None:
                grads[0][part] = grad @ head_weight
            if grads[1] is not None:
                grads[1] += grad.T @ hidden[part]
            if grads[2] is not None:
                grads[2] += grad.sum(0, dtype=wide)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, head_weight, bias)]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*found, None, None, None)
