"""Decide whether rounding explains a violation, or whether the loss itself depends on a common shift.

A z-loss gives Σ_k g_k = 2λZ.  Logit penalties and regression losses have no zero-sum at all.  If the head's
output is soft-capped before the loss, the gradient at the head is not that at the loss.

Rounding explains a violation only on rows with a small residual mass ε.  There, g_r = p_r − 1 carries an
absolute error of a few ulp of 1, while the other gradients sum to ε.  (Where log-sum-exp was written by hand,
the error is a few ulp of |z|.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from nfi_monitor.measure.zero_sum import summation_error

SAFETY = 4.0
"""Ulps that rounding may cause. Torch's kernels need about 1; hand-written losses up to 3 (measured)."""
UNSURE = 0.1
"""Smallest residual mass of a row that shows the scale of the gradients."""
CLEARLY = 100.0
"""Smallest residual mass of a gradient that can contradict the logits, in ulps of 1, at most RESOLVED."""
RESOLVED = 0.01
"""Residual mass that any precision resolves: rounding to bfloat16 makes .002."""
VISIBLE = 1e-5
"""Smallest residual mass of a gradient that shows soft targets, or another loss than a cross-entropy."""
MISMATCH = 100.0
"""Ratio of ε from gradients to ε from logits that loss scaling and class weights cannot cause."""


def gradient_scale(absolute: Tensor, residual: Tensor, live: Tensor) -> Tensor:
    """Return the factor s in g = s·(p − y), max Σ|g| / 2ε over unsure rows; 0 if there are none.

    ``absolute`` Σ_k |g_k|, ``residual`` ε, ``live`` bool, all [N] → scalar tensor.
    """
    shown = absolute / (2.0 * residual.clamp_min(UNSURE))
    return torch.where(live & (residual > UNSURE), shown, torch.zeros_like(shown)).amax()


def gradient_residual(residual: Tensor, absolute: Tensor, scale: Tensor) -> Tensor:
    """Return ε, taken from the gradients where they contradict the logits. [N], [N], scalar → [N].

    Under cross-entropy, Σ|g| / 2s = ε.  Soft targets make Σ|g| / 2s smaller: at p = y the gradient vanishes
    and only rounding is left, although ε is large.  Losses other than softmax cross-entropy (one-vs-rest BCE)
    make it far larger on rows that look confident.  While no scale is known, ε of the logits is returned.
    """
    of_gradient = absolute / (2.0 * scale)
    smaller = torch.minimum(of_gradient, residual)
    chosen = torch.where(of_gradient > MISMATCH * residual, of_gradient, smaller)
    return torch.where(scale > 0, chosen, residual)


def contradicted(residual: Tensor, absolute: Tensor, scale: Tensor, eps: Tensor | float) -> Tensor:
    """Mark rows whose gradient is far too large for their logits, bool [N]. [N], [N], scalar, eps → [N].

    Their loss is computed from other logits than those that are watched: from scaled ones (``head(x) / 50``,
    a temperature), or it is no softmax cross-entropy.  Then margins and the loss at the head mean nothing.
    """
    of_gradient = absolute / (2.0 * scale)
    if not isinstance(eps, Tensor):
        eps = torch.tensor(eps, device="cpu")
    rounded = (CLEARLY * eps).clamp_max(RESOLVED)
    return (scale > 0) & (of_gradient > rounded) & (of_gradient > MISMATCH * residual)


def unexplained(
    violation: Tensor, residual: Tensor, largest_logit: Tensor, eps: Tensor | float, classes: int
) -> Tensor:
    """Mark rows whose violation rounding cannot explain, bool [N]. All [N]; ``eps`` the machine epsilon."""
    scale = SAFETY * eps * (1.0 + largest_logit.abs()) + summation_error(residual.dtype, classes)
    tiny = torch.finfo(residual.dtype).smallest_normal
    return violation > scale / residual.clamp_min(tiny) + scale


def negatives(grad: Tensor) -> Tensor:
    """Count the negative entries of each row; 1 with hard labels. ``grad`` [N, K] → [N], of its dtype."""
    # Not (grad < 0).sum(): a sum of bool takes six times as long on a CPU.
    return -grad.sign().clamp_max_(0).sum(-1)


def soft_rows(negative: Tensor, absolute: Tensor, scale: Tensor) -> Tensor:
    """Mark rows whose gradient shows soft targets, bool [N]: several negative entries, of a visible size.

    ``negative``: number of negative entries [N]; ``absolute`` Σ_k |g_k| [N]; ``scale`` of the gradients, a
    scalar.  A penalty on the logits has negative entries, too: they show in rows without another gradient.
    """
    return (negative > 1) & (absolute > 2.0 * VISIBLE * scale)


def unmasked(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return sum and number of the logits not masked with −inf: [N, K] → two tensors [N] of ``dtype``.

    NaN and +inf count as masked; their rows are left out anyway.
    """
    total = logits.nan_to_num(0.0, 0.0, 0.0).sum(-1, dtype=dtype)
    masked = (logits - logits).nan_to_num_(1.0).sum(-1, dtype=dtype)
    return total, logits.shape[-1] - masked
