"""Recover the factor by which the logits are multiplied between the head and the loss.

The head's output is z, the loss is computed from s·z: s = 1/16 under muP, 1/T with a temperature, 30 and more
for cosine heads.  Under a softmax cross-entropy with one correct class r, the gradient that arrives at z is

    g_k = c·s·exp(s·z_k) / Σ_j exp(s·z_j)   for k ≠ r,

so ln g_k is a straight line in z_k, and its slope is s.  The reduction, class weights and loss scaling change
c alone, focal and other losses that depend on p_r only change c of the row.  Label smoothing subtracts a
constant from g_k and bends the line.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nfi_monitor.measure.shift_invariance import negatives

SURE = 0.8
"""Share of the rows that show a slope which must show the same."""
FEWEST = 0.25
"""Share of the live rows that must show it."""
SAME = 0.1
"""Largest difference of ln s between rows that show the same slope."""
STRAIGHT = 0.01
"""Nats by which ln g may scatter around its line, besides rounding. Label smoothing bends it by .03 and more
at the slopes that are believed."""
NEAR = 1.25
"""Factors closer to 1 than this count as 1: at the start of a run, label smoothing makes slopes up to 1.1."""
SPREAD = 0.3
"""Nats over which a line steeper than 1 must be straight."""
STEEP = 4.0
"""Slope that label smoothing cannot make in most rows at once, also where rounding hides a bend."""


def logit_scale(
    grad: Tensor, logits: Tensor, left_out: Tensor, live: Tensor, eps: Tensor, known: Tensor
) -> Tensor:
    """Return s, the factor between the head's logits and those of the loss, a scalar tensor.

    Args:
        grad, logits: ∂L/∂z and z, [N, K].
        left_out: int64 [N, 2], of each row the correct class, and the class of the largest logit: under
            mixup its gradient is that of another target.
        live: bool [N]; rows that violate the zero-sum are to be left out.
        eps: machine epsilon of the precision in which the loss is computed, a scalar tensor.
        known: s so far; returned where the rows do not show it. With K = 2 they never do, and with K = 3 only
            an s below 1: two points always lie on a line.
    """
    dtype = known.dtype
    z = logits.to(dtype)
    shown = (grad >= torch.finfo(grad.dtype).smallest_normal) & torch.isfinite(z)
    shown = shown.scatter(-1, left_out, torch.zeros_like(shown[..., :2]))
    count = shown.sum(-1, dtype=dtype)
    x = torch.where(shown, z, 0.0)
    largest = x.abs().amax(-1)
    x = _centred(x, shown, count)
    y = _centred(torch.where(shown, grad.to(dtype), 1.0).log(), shown, count)
    spread, both = x.square().sum(-1) / count, (x * y).sum(-1) / count
    slope = both / spread
    scatter = (y.square().sum(-1) / count - slope * both).clamp_min(0.0).sqrt()

    noise = 4.0 * eps.to(dtype) * (1.0 + largest * slope.abs())  # of ln g and of s·z
    visible = spread.sqrt() * slope > 5.0 * noise
    usable = live & (negatives(grad) == 1) & (count >= 2) & visible
    straight = usable & (scatter < STRAIGHT + noise)
    log = torch.where(straight, slope, torch.nan).log()
    middle = log.nanmedian()
    same = straight & ((log - middle).abs() < SAME)
    agreed = same.sum(dtype=dtype)
    enough = (agreed >= SURE * usable.sum()) & (agreed >= FEWEST * live.sum()) & (agreed >= 2)
    found = middle.exp()
    wide = torch.where(same, spread.sqrt() * found, 0.0).sum() >= SPREAD * agreed
    precise = torch.where(same, noise, 0.0).amax() < STRAIGHT
    line = torch.where(same, count, 0.0).sum() > 2.0 * agreed
    believed = (found * NEAR < 1.0) | (line & ((found >= STEEP) | ((found > NEAR) & wide & precise)))
    near = (found * NEAR >= 1.0) & (found <= NEAR)
    seen = torch.where(near, torch.ones_like(found), found)
    return torch.where(enough & (near | believed), seen, known)


def _centred(values: Tensor, shown: Tensor, count: Tensor) -> Tensor:
    """Return values minus their mean over the classes that are shown, and 0 elsewhere, [N, K]."""
    values = torch.where(shown, values, 0.0)
    return torch.where(shown, values - (values.sum(-1) / count.clamp_min(1.0)).unsqueeze(-1), 0.0)


IN_NATS = ("logit_displacement", "logit_displacement_rms", "feature_displacement")
"""Quantities of the optimizer step that the head's weight gives in units of its own logits."""


def in_nats(values: dict[str, float]) -> dict[str, float]:
    """Return ``values`` with displacements multiplied by "logit_scale", where the logits have one."""
    scale = values.get("logit_scale", 1.0)
    return {name: x * scale if name in IN_NATS else x for name, x in values.items()} if scale != 1 else values
