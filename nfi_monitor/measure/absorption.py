"""Which rows have lost their correct class, read from the gradient alone: no labels are needed.

With hard labels a healthy row has exactly one negative logit gradient, the correct class's.  Where there
is none, the correct class is the largest logit; if its gradient is exactly 0 and others are not, the row
is *absorbed*: p_r was rounded to 1, so g_r = p_r − 1 vanished (Prieto et al. 2025, "Softmax Collapse";
Liu et al. 2026, section 3).  A row of zeros is either *ignored* (padding, −100) or *underflowed*: the
forward's logits tell the two apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def absorbed_rows(own: Tensor, live: Tensor) -> Tensor:
    """Live rows whose correct-class gradient ``own`` [N] is exactly 0; ``live`` bool [N] → bool [N].

    "No negative entry" would not do: under a z-loss the correct class itself can be pushed down.
    """
    return live & (own == 0)


def underflow_level(dtype: torch.dtype) -> float:
    """ln of the magnitude under which a gradient of ``dtype`` may have been flushed to zero.

    The smallest normal number, because subnormals may be flushed; for float16, whose subnormals are
    always kept and matter, the smallest subnormal.
    """
    if dtype is torch.float16:
        return math.log(2.0**-24)
    return math.log(torch.finfo(dtype).smallest_normal)


def underflowed_rows(silent: Tensor, log_rival: Tensor, rows: int, level: Tensor | float) -> Tensor:
    """Rows whose whole gradient vanished although they count. [N] bool, [N] float → [N] bool.

    ``silent`` marks rows of zeros; ``log_rival`` is ln p of the strongest competitor; ``rows`` the number
    of rows that a mean reduction divides by; ``level`` the underflow level of the loss's precision.  A
    silent row whose rival would have been representable does not count (it is padding); one whose rival
    would not, has underflowed.  Labels would settle it exactly; without them a padded row with a margin
    this large is miscounted.
    """
    return silent & (log_rival - math.log(max(rows, 1)) < level)


def finite_entries(grad: Tensor) -> Tensor:
    """``grad`` [N, K] with 0 in the place of NaN and Inf, which are numbers of every dtype. A copy."""
    return grad.nan_to_num(0.0, 0.0, 0.0)


def wider(finite: Tensor, dtype: torch.dtype) -> Tensor:
    """Scalar bool tensor: is some entry of ``finite`` [N, K] no number of the narrower ``dtype``?

    A float32 head whose loss was computed on ``logits.bfloat16()`` gets a float32 gradient that
    holds only bfloat16 numbers; its rounding is bfloat16's.  Zeros are numbers of every dtype.
    """
    # A maximum, not any(): reductions of bool take ten times as long on a CPU.
    return (finite.to(dtype).to(finite.dtype) - finite).abs_().amax() > 0
