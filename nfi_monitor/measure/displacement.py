"""How far one update moves the logits, in nats: the quantity a slingshot is made of.

δ counts only what the loss can feel: a common shift of all logits of a row is removed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logit_displacement(
    weight_update: Tensor, bias_update: Tensor | None, features: Tensor
) -> tuple[Tensor, Tensor]:
    """(max, rms) over rows and classes of |(ΔW − mean_k ΔW)·h + Δb − mean Δb|, nats, scalar tensors.

    ``weight_update`` [K, d] or a sample of its class rows, ``bias_update`` [K] or None,
    ``features`` [n, d].  This is the head's part of the displacement; what the layers below move is
    seen by ``margin_displacement`` only.
    """
    delta = (weight_update - weight_update.mean(0)) @ features.mT
    if bias_update is not None:
        delta = delta + (bias_update - bias_update.mean()).unsqueeze(-1)
    return delta.abs().amax(), torch.linalg.vector_norm(delta) / max(delta.numel(), 1) ** 0.5


def probe_margins(logits: Tensor, targets: Tensor) -> Tensor:
    """z_r − max_{k≠r} z_k of a probe batch with labels. [N, K], int64 [N] → [N], nats."""
    target = targets.unsqueeze(-1)
    own = logits.gather(-1, target).squeeze(-1)
    return own - logits.scatter(-1, target, -torch.inf).amax(-1)


def margin_displacement(before: Tensor, after: Tensor, steps: int) -> Tensor:
    """Largest margin change of the probe rows, per optimizer step, nats. [N], [N] → scalar tensor."""
    return (after - before).abs().amax() / max(steps, 1)
