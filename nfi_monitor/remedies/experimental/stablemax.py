"""Apply the two remedies of Prieto et al. 2025 (arXiv 2501.04697): StableMax and ⊥Grad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nfi_monitor.capture.unwrap import unwrap
from nfi_monitor.remedies.handle import Handle
from nfi_monitor.remedies.steps import around_steps


def stablemax_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Return −ln(s(z_r) / Σ_k s(z_k)) with s(x) = x + 1 for x ≥ 0 and 1/(1 − x) below (section 4.1).

    It is for numerical feature inflation: s grows like x and not like e^x, so margins do not become so large
    that rounding removes the other classes.  It is another loss, with other optima and flatter gradients.  So
    use it in new trainings, not in a running one.  Its gradient has no zero-sum over the classes by design.

    Args: ``logits`` [N, K] floating point, ``target`` int64 [N]; ``reduction`` "mean", "sum" or "none".
    Raises ValueError for another reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be one of none, mean, sum, got {reduction!r}.")
    # ln s, computed directly: ln(1 + x) on one side, −ln(1 − x) on the other.
    log_s = torch.where(logits >= 0, 1.0, -1.0) * torch.log1p(logits.abs())
    kept = target != ignore_index
    index = torch.where(kept, target, 0).unsqueeze(-1)
    loss = log_s.logsumexp(-1) - log_s.gather(-1, index).squeeze(-1)
    loss = torch.where(kept, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum()


def orthogonal_gradients(optimizer: Any) -> Handle:
    """Make each gradient orthogonal to its weight before each step, at the same length (⊥Grad, section 4.2).

    It is for numerical feature inflation: the part of a gradient along the weights only scales the logits up,
    and without it margins stop growing by themselves.  It costs two reductions and one pass per parameter.
    Gradients are changed in place, as by clipping.  Use it in new trainings, because it changes them from the
    start.  When not to use it: with weights that must grow.

    Under a gradient scaler with a fused optimizer, which unscales later, ``step()`` raises RuntimeError.
    """
    optimizer = unwrap(optimizer)

    def project(optimizer: Optimizer) -> None:
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "orthogonal_gradients under a gradient scaler needs scaler.unscale_(optimizer) before step()."
            )
        with torch.no_grad():
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None and weight.grad.layout is torch.strided:
                        _orthogonal(weight, weight.grad)

    return Handle("orthogonal gradients", around_steps(optimizer, before=project))


def _orthogonal(weight: Tensor, grad: Tensor) -> None:
    w, g = weight.flatten().float(), grad.flatten().float()
    tiny = torch.finfo(torch.float32).tiny
    along = torch.dot(w, g) / torch.dot(w, w).clamp_min(tiny)
    rest = g - along * w
    rest *= torch.linalg.vector_norm(g) / torch.linalg.vector_norm(rest).clamp_min(tiny)
    grad.copy_(rest.reshape(grad.shape))
