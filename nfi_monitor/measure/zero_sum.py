"""Measure the zero-sum violation: how far the logit gradients of a row are from summing to zero.

If a loss does not change when all logits of a row shift together, then Σ_k g_k = 0 in exact arithmetic (g =
∂L/∂z).  In finite precision, rounding changes the gradient of the correct class, and the sum is the rounding
error (Liu et al. 2026, arXiv 2605.06152, section 3).  Dividing by Σ_k |g_k| makes the quantity independent of
the loss's reduction, of loss scaling and of accumulation.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from nfi_monitor.measure.views import StepView

_Eps = TypeVar("_Eps", float, Tensor)


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return float64 if any input is float64, else float32: no sum over classes is in half precision."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def rounding_floor(dtype: torch.dtype, classes: int) -> float:
    """Return the violation that rounding alone may cause on a row without absorption, dimensionless.

    Log-softmax is stored in ``dtype``.  Half an ulp of |ln p_k| ≈ ln K + 2 is a relative error of p_k; for
    tied competitors of a row it is the same.  Each gradient is rounded once or twice more.  Summing K
    exponentials in the forward pass adds :func:`summation_error`.
    """
    return floor_of(torch.finfo(dtype).eps, accumulation_dtype(dtype), classes)


def floor_of(eps: _Eps, accumulator: torch.dtype, classes: int) -> _Eps:
    """Return :func:`rounding_floor` from a machine epsilon, a number or a scalar tensor."""
    ulps = 2.0 ** math.floor(math.log2(math.log(max(classes, 2)) + 2.0))
    return eps * (1.5 + 0.5 * ulps) + summation_error(accumulator, classes)


def summation_error(dtype: torch.dtype, classes: int) -> float:
    """Return the relative error of a sum over ``classes`` equal terms, added one by one in each lane.

    Each addition counts an eighth of a unit of roundoff.  That is twice what tied logits showed: .063 for
    float32 and float64 with AVX2 and AVX-512 (K = 50,257).  Lanes are those of the narrowest vectors that
    torch is built for, 16 bytes (NEON), so that the result does not depend on the processor.
    """
    accumulator = accumulation_dtype(dtype)
    lanes = 16 // accumulator.itemsize
    return classes / (8 * lanes) * torch.finfo(accumulator).eps / 2


def row_sums(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return signed and absolute sum over classes. ``grad`` [N, K] → two tensors [N], float32 or float64."""
    dtype = accumulation_dtype(grad.dtype)
    # abs().sum() and not vector_norm(ord=1): on a CPU, vector_norm adds in lanes and is off by 3e-4 at
    # K = 50,257. The copy that abs() makes holds sampled rows only.
    return grad.sum(-1, dtype=dtype), grad.abs().sum(-1, dtype=dtype)


def row_violation(signed: Tensor, absolute: Tensor) -> Tensor:
    """Return |Σ_k g_k| / Σ_k |g_k| per row, in [0, 1]; 0 for a row without gradient. [N], [N] → [N]."""
    tiny = torch.finfo(absolute.dtype).smallest_normal * torch.finfo(absolute.dtype).eps
    return (signed.abs() / absolute.clamp_min(tiny)).clamp_max(1.0)


def weight_violation(weight_grad: Tensor) -> Tensor:
    """Return the violation of the whole batch from the head's own gradient, without logits.

    ``weight_grad`` [K, d] (classes first; a block of columns is enough) → scalar tensor
    Σ_j |Σ_k ∂L/∂W_kj| / Σ_kj |∂L/∂W_kj|, in [0, 1] (Liu et al. 2026, Theorem 3.4).  It has no meaning for a
    weight that is tied to an input embedding: its gradient also holds the part of the input side.
    """
    dtype = accumulation_dtype(weight_grad.dtype)
    # The absolute values need a copy anyway. Summing a contiguous copy takes a quarter of the time of summing
    # a few columns of a wide matrix. Of a transposed matrix (classes last), making the copy would be slow.
    apart = weight_grad.stride(-1) == 1 and not weight_grad.is_contiguous()
    block = weight_grad.contiguous() if apart else weight_grad
    signed = block.sum(0, dtype=dtype).abs().sum()
    absolute = (block.abs_() if apart else block.abs()).sum(dtype=dtype)
    return row_violation(signed, absolute)


def bias_violation(bias_grad: Tensor) -> Tensor:
    """Return |Σ_k ∂L/∂b_k| / Σ_k |∂L/∂b_k|. ``bias_grad`` [K] → scalar tensor in [0, 1]."""
    return row_violation(*row_sums(bias_grad))


def violation_of_head_weight(step: StepView) -> Tensor | None:
    """Return :func:`weight_violation` of the head, a scalar; None where its gradient was not read."""
    grad = step.update.head_weight_grad
    return None if grad is None else weight_violation(grad)


def violation_of_head_bias(step: StepView) -> Tensor | None:
    """Return :func:`bias_violation` of the head, a scalar; None where its gradient was not read."""
    grad = step.update.head_bias_grad
    return None if grad is None else bias_violation(grad)
