"""Measure the curvature along the update, in the metric in which the optimizer moves.

Two consecutive gradients and the step between them give sᵀHs without a Hessian product.  Adam with the
preconditioner P = sqrt(v̂)+ε_A is locally unstable if lr · sᵀHs / sᵀPs stays above 2(1+β1)/(1−β1).  This is
38 for β1 = .9 (Bai et al., arXiv 2506.04805).  SGD has P = 1 and the limit 2(1+μ) with momentum μ; for others
see :mod:`nfi_monitor.capture.preconditioner` and ``RunContext.stability_limit``.  The largest eigenvalue
λ_max is not used: it crosses this limit ten times as often as spikes happen.
"""

from __future__ import annotations

import torch
from torch import Tensor


def secant_curvature(
    step: Tensor,
    gradient_change: Tensor,
    preconditioner: Tensor,
    lr: Tensor | float,
    weights: Tensor | None,
) -> Tensor:
    """Return lr · sᵀy / sᵀPs, dimensionless, a scalar tensor; NaN where nothing moved.

    ``step`` s [C], ``gradient_change`` y [C], ``preconditioner`` P [C], ``weights`` inverse sampling rates
    [C] or None.  ``lr`` is a scalar, or [C] where parameter groups have their own.  In that case the result
    is sᵀy / sᵀ(P/lr)s over the coordinates whose rate is not 0.

    With minibatches, y also holds the difference between the two batches.  The result is then noisy.
    """
    step_weighted = step if weights is None else step * weights.to(step.dtype)
    if isinstance(lr, Tensor) and lr.ndim:
        still = lr == 0
        scaled = (preconditioner * step / lr).masked_fill(still, 0.0)
        return torch.dot(step_weighted.masked_fill(still, 0.0), gradient_change) / torch.dot(
            step_weighted, scaled
        )
    return lr * torch.dot(step_weighted, gradient_change) / torch.dot(step_weighted, preconditioner * step)


def gradient_alignment(grad: Tensor, previous: Tensor, weights: Tensor | None) -> Tensor:
    """Return cos of two successive gradients [C], a scalar in [−1, 1]; 0 where one of them vanishes.

    Near −1, the optimizer overshoots the minimum at each step (edge of stability).  Near +1, it moves
    steadily in one direction.  ``weights`` [C]: how many coordinates one sampled coordinate stands for, or
    None.
    """
    pair = torch.stack([grad, previous])
    products = pair @ (pair if weights is None else pair * weights).mT
    norms = products.diagonal().sqrt()
    return products[0, 1] / (norms[0] * norms[1]).clamp_min(1e-37)
