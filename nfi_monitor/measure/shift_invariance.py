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

from nfi_monitor.measure.zero_sum import summation_error

SAFETY = 4.0
"""Ulps granted to rounding. Torch's kernels need about 1; hand-written losses up to 3 (measured)."""


UNSURE = 0.1
"""Residual mass from which a row shows the scale of the gradients."""
MISMATCH = 100.0
"""Factor between what logits and gradients say of ε that loss scaling and class weights cannot make."""


def gradient_scale(absolute: Tensor, residual: Tensor, live: Tensor) -> Tensor:
    """The factor s in g = s·(p − y), from rows that are not confident: max Σ|g| / 2ε; 0 if there are none.

    ``absolute`` Σ_k |g_k|, ``residual`` ε, ``live`` bool, all [N] → scalar tensor.
    """
    shown = absolute / (2.0 * residual.clamp_min(UNSURE))
    return torch.where(live & (residual > UNSURE), shown, torch.zeros_like(shown)).amax()


def gradient_residual(residual: Tensor, absolute: Tensor, scale: Tensor) -> Tensor:
    """ε as the gradients tell it, where they contradict the logits. [N], [N], scalar → [N].

    Under cross-entropy Σ|g| / 2s = ε.  Soft targets make it smaller (the gradient vanishes at p = y, where
    ε is large and rounding is all that is left); losses that are no softmax cross-entropy make it far
    larger on rows that look confident (one-vs-rest BCE).  While no scale is known, ε stands.
    """
    told = absolute / (2.0 * scale)
    believed = torch.where(told > MISMATCH * residual, told, torch.minimum(told, residual))
    return torch.where(scale > 0, believed, residual)


def unexplained(
    violation: Tensor, residual: Tensor, largest_logit: Tensor, eps: Tensor | float, classes: int
) -> Tensor:
    """Rows whose violation rounding cannot explain, bool [N]. All [N]; ``eps`` the machine epsilon."""
    scale = SAFETY * eps * (1.0 + largest_logit.abs()) + summation_error(residual.dtype, classes)
    tiny = torch.finfo(residual.dtype).smallest_normal
    return violation > scale / residual.clamp_min(tiny) + scale


def negatives(grad: Tensor) -> Tensor:
    """How many entries of each row are negative: 1 with hard labels. ``grad`` [N, K] → [N], of its dtype."""
    # Not (grad < 0).sum(): sums of bool take six times as long on a CPU.
    return -grad.sign().clamp_max_(0).sum(-1)


def unmasked(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sum and number of the logits that are not masked with −inf: [N, K] → two tensors [N] of ``dtype``.

    NaN and +inf, whose rows are left out anyway, are taken for masked.
    """
    total = logits.nan_to_num(0.0, 0.0, 0.0).sum(-1, dtype=dtype)
    masked = (logits - logits).nan_to_num_(1.0).sum(-1, dtype=dtype)
    return total, logits.shape[-1] - masked
