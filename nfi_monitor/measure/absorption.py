"""Which rows have lost their correct class, read from the gradient alone: no labels are needed.

With hard labels a healthy row has exactly one negative logit gradient, the correct class's.  A row
with a positive entry and no negative one is *absorbed*: p_r was rounded to 1, so g_r = p_r − 1 is
exactly 0 (Prieto et al. 2025, "Softmax Collapse"; Liu et al. 2026, section 3).  A row of zeros is
either *ignored* (padding, −100) or *underflowed*: the forward's logits tell the two apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def absorbed_rows(lowest: Tensor, live: Tensor) -> Tensor:
    """Live rows without a negative gradient: smallest gradient [N], bool [N] → bool [N]."""
    return live & (lowest >= 0)


def underflow_level(dtype: torch.dtype) -> float:
    """ln of the magnitude under which a gradient of ``dtype`` may have been flushed to zero.

    The smallest normal number, because subnormals may be flushed; for float16, whose subnormals are
    always kept and matter, the smallest subnormal.
    """
    if dtype is torch.float16:
        return math.log(2.0**-24)
    return math.log(torch.finfo(dtype).smallest_normal)


def underflowed_rows(silent: Tensor, log_residual: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Rows whose whole gradient vanished although they count. [N] bool, [N] float → [N] bool.

    ``silent`` marks rows of zeros; ``log_residual`` is ln Σ_{k≠max} p_k; ``rows`` the number of rows
    that a mean reduction divides by.  A silent row whose residual mass would have been representable
    does not count (it is padding); one whose residual would not, has underflowed.  Labels would
    settle it exactly; without them a padded row with a margin this large is miscounted.
    """
    return silent & (log_residual - math.log(max(rows, 1)) < underflow_level(dtype))


def fits(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Scalar bool tensor: is every entry of ``grad`` a number of the narrower ``dtype``?

    A float32 head whose loss was computed on ``logits.bfloat16()`` gets a float32 gradient that
    holds only bfloat16 numbers; its rounding is bfloat16's.
    """
    return (grad.to(dtype).to(grad.dtype) == grad).all()
