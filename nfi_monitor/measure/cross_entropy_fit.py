"""Hold the gradient at the logits against the one that a cross-entropy of these logits gives.

Where no loss is reported, the cross-entropy at the head stands for it.  That is right only if the gradient is
that of a cross-entropy, g_i = c_i·(p_i − y_i), with one weight c_i > 0 for all rows of a class.  A reduction,
loss scaling, accumulation and class weights change c alone.  A policy gradient, a preference, soft targets, a
focal loss, or a softmax over another axis do not fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nfi_monitor.measure.shift_invariance import UNSURE

TURNED = 0.03
"""Sine of the angle between the two gradients of a row, from which on they differ. Rounding to bfloat16 makes
.004, a z-loss of 1e-4 makes .002, label smoothing of .1 makes .1."""
LIGHTER = 0.9
"""Share of the largest weight (of all rows, of those of a class), below which a row has another weight."""
RESOLVED = 100.0
"""Smallest gradient of a row that tells, in units of the smallest number that is not flushed to 0."""


def mismatch(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    residual: Tensor,
    live: Tensor,
    level: Tensor | float,
    known: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return two shares of the rows that tell: of those that are none of a cross-entropy's, and weigh less.

    Scalar tensors.  The second counts rows that fit, with less than :data:`LIGHTER` of the largest weight, as
    class weights make.

    Args:
        grad, logits: ∂L/∂z and z, as the loss gets them, [N, K].
        target: the class that is the correct one if the loss is a cross-entropy, int64 [N].
        residual: ε [N] by the logits. Rows with ε > :data:`UNSURE` tell.
        live: bool [N].
        level: ln of the size below which a gradient is flushed to 0.
        known: the shares so far, returned where no row tells.
    """
    dtype = known[0].dtype
    chances = torch.softmax(logits.to(dtype), -1)
    expected = chances.scatter_add(-1, target.unsqueeze(-1), chances.new_full((len(target), 1), -1.0))
    size = grad.to(dtype).abs().amax(-1)
    unit = grad.to(dtype) / size.clamp_min(torch.finfo(dtype).smallest_normal).unsqueeze(-1)
    common, square = (unit * expected).sum(-1), expected.square().sum(-1)
    tells = live & (residual > UNSURE) & torch.isfinite(common)
    tells &= size > RESOLVED * torch.as_tensor(level, dtype=dtype, device=size.device).exp()
    fits = (common > 0) & (common.square() > (1.0 - TURNED**2) * square * unit.square().sum(-1))
    weight = torch.where(tells & fits, size * common / square, 0.0)
    heaviest = torch.zeros_like(logits[0], dtype=dtype).scatter_reduce(0, target, weight, "amax")
    fits &= weight >= LIGHTER * heaviest[target]
    lighter = fits & (weight < LIGHTER * weight.amax())
    count = tells.sum(dtype=dtype)
    shares = ((tells & ~fits).sum() / count, (tells & lighter).sum() / count)
    other, uneven = (torch.where(count > 0, now, so_far) for now, so_far in zip(shares, known, strict=True))
    return other, uneven
