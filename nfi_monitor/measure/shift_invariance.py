"""Is a violation rounding, or is it what the loss means?

z-loss gives Σ_k g_k = 2λZ, logit penalties and regression losses have no zero-sum at all, and at a
head whose output is soft-capped before the loss the gradient that arrives is no longer the loss's.
Rounding explains a violation only on rows with a small residual mass ε: g_r = p_r − 1 carries an
absolute error of a few ulp of 1 (of |z| where log-sum-exp was written by hand), against gradients
that sum to ε.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAFETY = 4.0
"""Ulps granted to rounding. Torch's kernels need about 1; hand-written losses up to 3 (measured)."""


def unexplained(violation: Tensor, residual: Tensor, largest_logit: Tensor, eps: Tensor | float) -> Tensor:
    """Rows whose violation rounding cannot explain, bool [N]. All [N]; ``eps`` the machine epsilon."""
    scale = SAFETY * eps * (1.0 + largest_logit.abs())
    tiny = torch.finfo(residual.dtype).smallest_normal
    return violation > scale / residual.clamp_min(tiny) + scale
