"""Estimate norms of weights, gradients and updates, and their product, from a stratified sample.

Thilak et al. (arXiv 2206.04817) define the slingshot by the growth of the last layer's norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nfi_monitor.capture.sampling import local
from nfi_monitor.measure.zero_sum import accumulation_dtype


def stratified_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    """Estimate a sum over all coordinates from a sample. [C], inverse sampling rates [C] → scalar.

    ``weights`` None means that the sample holds all coordinates; the result is then exact.
    """
    return values.sum() if weights is None else torch.dot(values, weights.to(values.dtype))


def norm(values: Tensor, weights: Tensor | None) -> Tensor:
    """Estimate the Euclidean norm over all coordinates. [C], [C] or None → scalar tensor."""
    if weights is None:
        whole: Tensor = torch.linalg.vector_norm(values)
        return whole
    return stratified_sum(values * values, weights).sqrt()


def predicted_reduction(grad: Tensor, moved: Tensor, weights: Tensor | None) -> Tensor:
    """Return −gᵀs, the first-order estimate of how much the update lowers the loss. Scalar, in its unit.

    ``grad`` g [C], ``moved`` s = θ_after − θ_before [C], ``weights`` inverse sampling rates [C] or None.
    Source: Nocedal and Wright, Numerical Optimization (2006), section 4.1.
    """
    return -stratified_sum(grad * moved, weights)


def parameter_norms(model: nn.Module) -> dict[str, float]:
    """Return the Euclidean norm of every parameter by its name. Waits for the device."""
    named = [(name, local(parameter.detach())) for name, parameter in model.named_parameters()]
    norms = [
        torch.linalg.vector_norm(value, dtype=None if value.is_complex() else accumulation_dtype(value.dtype))
        for _, value in named
    ]
    return {name: float(found) for (name, _), found in zip(named, norms, strict=True)}
