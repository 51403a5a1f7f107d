"""Find the rows that have lost their correct class, from the gradient alone, without labels.

With hard labels, a healthy row has exactly one negative logit gradient: that of the correct class.  In a row
without one, the correct class is the one with the largest logit.  If its gradient is exactly 0 and others are
not, the row is *absorbed*: p_r was rounded to 1, so g_r = p_r − 1 vanished (Prieto et al. 2025, "Softmax
Collapse"; Liu et al. 2026, section 3).  A row of zeros is either *ignored* (padding, −100) or *underflowed*.
The logits of the forward pass show which.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def absorbed_rows(own: Tensor, live: Tensor) -> Tensor:
    """Mark the live rows whose correct-class gradient ``own`` [N] is exactly 0; ``live`` bool [N] → bool [N].

    A row without a negative entry need not be absorbed: a z-loss can push the correct class itself down.
    """
    return live & (own == 0)


def underflow_level(dtype: torch.dtype) -> float:
    """Return ln of the magnitude below which a gradient of ``dtype`` may have been flushed to zero.

    This is the smallest normal number, because subnormals may be flushed.  For float16 it is the smallest
    subnormal: those are always kept, and they matter.
    """
    if dtype is torch.float16:
        return math.log(2.0**-24)
    return math.log(torch.finfo(dtype).smallest_normal)


def underflowed_rows(
    silent: Tensor, log_rival: Tensor, rows: int, level: Tensor | float, scale: Tensor | None = None
) -> Tensor:
    """Mark the rows that count although their whole gradient vanished. [N] bool, [N] float → [N] bool.

    ``silent`` marks rows of zeros.  ``log_rival`` is ln p of the strongest competitor.  ``rows`` is the
    number of rows that a mean reduction divides by.  ``level`` is the underflow level of the loss's
    precision.  ``scale`` is that of the gradients so far, 0 if unknown: the loss may be divided further, by
    the number of micro-batches.  A larger one is not believed, because a gradient scaler lowers it later.

    A silent row has underflowed if the gradient of its strongest competitor is too small for that precision.
    Otherwise it is padding and does not count.  Without labels, a padded row with so large a margin is
    counted as underflowed.
    """
    factor = -math.log(max(rows, 1))
    if scale is None:
        return silent & (log_rival + factor < level)
    known = torch.where(scale > 0, scale.to(log_rival.dtype).log(), factor)
    return silent & (log_rival + known.clamp_max(factor) < level)


def finite_entries(grad: Tensor) -> Tensor:
    """Return a copy of ``grad`` [N, K] with 0 in place of NaN and Inf, which every dtype can hold."""
    return grad.nan_to_num(0.0, 0.0, 0.0)


def wider(finite: Tensor, dtype: torch.dtype) -> Tensor:
    """Return whether some entry of ``finite`` [N, K] does not fit the narrower ``dtype``, as a scalar tensor.

    A float32 head whose loss was computed on ``logits.bfloat16()`` gets a float32 gradient that holds only
    bfloat16 numbers.  Its rounding is that of bfloat16.  Zeros fit every dtype.
    """
    # amax() and not any(): a reduction of bool takes ten times as long on a CPU.
    return (finite.to(dtype).to(finite.dtype) - finite).abs_().amax() > 0
