"""How far one update moves the logits, in nats: the quantity a slingshot is made of.

δ counts only what the loss can feel: a common shift of all logits of a row is removed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nfi_monitor.capture.sampling import CoordinateSample


def logit_displacement(
    weight_update: Tensor, bias_update: Tensor | None, features: Tensor
) -> tuple[Tensor, Tensor]:
    """(max, rms) over rows and classes of |(ΔW − mean_k ΔW)·h + Δb − mean Δb|, nats, scalar tensors.

    ``weight_update`` [K, d] or a sample of its class rows, ``bias_update`` [K] or None,
    ``features`` [n, d].  With one output (K = 1) there is no common shift to remove: the unit is then the
    output's.  This is the head's part of the displacement; what the layers below move is
    seen by ``margin_displacement`` only.
    """
    several = weight_update.shape[0] > 1
    delta = (weight_update - weight_update.mean(0) if several else weight_update) @ features.mT
    if bias_update is not None:
        delta += (bias_update - bias_update.mean() if several else bias_update).unsqueeze(-1)
    lowest, highest = delta.aminmax()
    return torch.maximum(highest, -lowest), torch.linalg.vector_norm(delta) / max(delta.numel(), 1) ** 0.5


def probe_margins(logits: Tensor, targets: Tensor) -> Tensor:
    """z_r − max_{k≠r} z_k of a probe batch with labels. [N, K], int64 [N] → [N], nats."""
    target = targets.unsqueeze(-1)
    own = logits.gather(-1, target).squeeze(-1)
    return own - logits.scatter(-1, target, -torch.inf).amax(-1)


def margin_displacement(before: Tensor, after: Tensor, steps: int) -> Tensor:
    """Largest margin change of the probe rows, per optimizer step, nats. [N], [N] → scalar tensor."""
    return (after - before).abs().amax() / max(steps, 1)


def relative_update(moved: Tensor, after: Tensor, sample: CoordinateSample) -> Tensor:
    """Largest ‖ΔW‖ / ‖W‖ over the weight matrices: how far one update moves the layers, of any kind.

    ``moved`` and ``after`` are [C] over sampled coordinates.  A bound, not an estimate, of how much of their
    size the logits move; it sees the layers below a LayerNorm, which the head's own update does not.
    """
    moved_squares, squares = sample.per_tensor(torch.stack([moved, after]).square_())
    ratios = (moved_squares / squares.clamp_min(1e-30)).sqrt_()
    return torch.where(sample.matrices, ratios, torch.zeros_like(ratios)).amax()


def feature_displacement(head_weight: Tensor, classifier_mean: Tensor | None, moved: Tensor) -> Tensor:
    """max_k |(W_k − W_G)·Δμ_G|, nats: what the layers below the head did to the logits of the mean row.

    ``head_weight`` [K, d], ``classifier_mean`` W_G [d] or None for a head with one output, ``moved`` [d] the
    change of μ_G over one step.  Exact for a full batch; between minibatches μ_G also moves with the rows,
    so only its growth means something there.
    """
    moved = moved.to(head_weight.dtype)
    logits = head_weight @ moved
    if classifier_mean is not None:
        logits = logits - classifier_mean.to(head_weight.dtype) @ moved
    return logits.abs().amax()
