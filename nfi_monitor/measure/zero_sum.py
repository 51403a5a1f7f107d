"""Zero-sum violation: how far a row's logit gradients are from cancelling.

For every loss that does not change when all logits of a row shift together, Σ_k g_k = 0 in exact
arithmetic (g = ∂L/∂z).  Finite precision breaks it: once the correct class's gradient is rounded, the
sum is left with what was lost (Liu et al. 2026, arXiv 2605.06152, section 3).  Dividing by Σ_k |g_k|
makes the quantity independent of the loss's reduction, of loss scaling and of accumulation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any input is float64, else float32: sums over classes are never taken in half precision."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def rounding_floor(dtype: torch.dtype, classes: int) -> float:
    """Violation that rounding each gradient to ``dtype`` and summing ``classes`` of them may cause.

    Unit roundoff u times (2 + ½ log2 K); the K-dependent part is the summation's own error and is
    dropped for half precision, whose sums are taken in float32.  Dimensionless.
    Measured on unabsorbed rows: 7e-8 in float32, 3e-4 … 1.6e-3 in bfloat16.
    """
    unit = torch.finfo(dtype).eps / 2
    summation = 0.5 * math.log2(max(classes, 2)) if dtype in (torch.float32, torch.float64) else 0.0
    return unit * (2.0 + summation)


def row_sums(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Signed and absolute sum over classes. ``grad`` [N, K] → two tensors [N], float32 or float64."""
    dtype = accumulation_dtype(grad.dtype)
    return grad.sum(-1, dtype=dtype), torch.linalg.vector_norm(grad, 1, -1, dtype=dtype)


def row_violation(signed: Tensor, absolute: Tensor) -> Tensor:
    """|Σ_k g_k| / Σ_k |g_k| per row, in [0, 1]; 0 for a row without gradient. [N], [N] → [N]."""
    tiny = torch.finfo(absolute.dtype).smallest_normal * torch.finfo(absolute.dtype).eps
    return (signed.abs() / absolute.clamp_min(tiny)).clamp_max(1.0)


def weight_violation(weight_grad: Tensor) -> Tensor:
    """Batch-level violation from the head's own gradient, no logits needed.

    ``weight_grad`` [K, d] (classes first; a block of columns is enough) → scalar tensor:
    Σ_j |Σ_k ∂L/∂W_kj| / Σ_kj |∂L/∂W_kj|, in [0, 1].  Liu et al. 2026, Theorem 3.4.
    Meaningless for a weight tied to an input embedding, whose gradient mixes the input side in.
    """
    dtype = accumulation_dtype(weight_grad.dtype)
    signed = weight_grad.sum(0, dtype=dtype).abs().sum()
    absolute = torch.linalg.vector_norm(weight_grad, 1, dtype=dtype)
    return row_violation(signed, absolute)


def bias_violation(bias_grad: Tensor) -> Tensor:
    """|Σ_k ∂L/∂b_k| / Σ_k |∂L/∂b_k|. ``bias_grad`` [K] → scalar tensor in [0, 1]."""
    return row_violation(*row_sums(bias_grad))
