"""Measure how far one update moves the logits, in nats.

A slingshot is a large displacement.  A common shift of all logits of a row is removed first, because the loss
does not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nfi_monitor.capture.sampling import CoordinateSample


def logit_displacement(
    weight_update: Tensor, bias_update: Tensor | None, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (max, rms) over rows and classes of |(ΔW − mean_k ΔW)·h + Δb − mean Δb|, nats, scalar tensors.

    ``weight_update`` [K, d] or a sample of its class rows, ``bias_update`` [K] or None, ``features`` [n, d].
    With one output (K = 1) there is no common shift to remove, and the unit is the output's.  This is the
    part of the displacement that the head makes.  Only ``margin_displacement`` sees the part of the layers
    below.
    """
    several = weight_update.shape[0] > 1
    delta = (weight_update - weight_update.mean(0) if several else weight_update) @ features.mT
    if bias_update is not None:
        delta += (bias_update - bias_update.mean() if several else bias_update).unsqueeze(-1)
    lowest, highest = delta.aminmax()
    return torch.maximum(highest, -lowest), torch.linalg.vector_norm(delta) / max(delta.numel(), 1) ** 0.5


def logit_moments(weight_update: Tensor, bias_update: Tensor | None, features: Tensor) -> dict[str, Tensor]:
    """Return moments over the classes of each row, [n] each, for :func:`of_logit_moments`.

    Three kernels. The arguments are those of :func:`logit_displacement`.
    """
    if bias_update is None:
        delta = weight_update @ features.mT
    else:
        delta = torch.addmm(bias_update.unsqueeze(-1), weight_update, features.mT)
    delta = delta if delta.dtype is torch.float64 else delta.float()
    variances, means = torch.var_mean(delta, 0, correction=0)
    lowest, highest = delta.aminmax(dim=0)
    return {
        "logit_variances": variances,
        "logit_means": means,
        "lowest_logits": lowest,
        "highest_logits": highest,
    }


def of_logit_moments(moments: Mapping[str, Tensor], *, several: bool) -> dict[str, Tensor]:
    """Return logit_displacement and logit_displacement_rms from :func:`logit_moments`.

    ``several``: whether the head has several outputs, and so a common shift.
    """
    means, squares = moments["logit_means"], moments["logit_variances"]
    if not several:
        means, squares = torch.zeros_like(means), squares + means.square()
    largest = torch.maximum(moments["highest_logits"] - means, means - moments["lowest_logits"]).amax()
    return {"logit_displacement": largest, "logit_displacement_rms": squares.mean().sqrt()}


def probe_margins(logits: Tensor, targets: Tensor) -> Tensor:
    """Return z_r − max_{k≠r} z_k of a probe batch with labels. [N, K], int64 [N] → [N], nats."""
    target = targets.unsqueeze(-1)
    own = logits.gather(-1, target).squeeze(-1)
    return own - logits.scatter(-1, target, -torch.inf).amax(-1)


def margin_displacement(before: Tensor, after: Tensor, steps: int) -> Tensor:
    """Return the largest margin change of the probe rows per step, nats. [N], [N] → scalar tensor."""
    return (after - before).abs().amax() / max(steps, 1)


def relative_update(moved: Tensor, after: Tensor, sample: CoordinateSample) -> Tensor:
    """Return the largest ‖ΔW‖ / ‖W‖ over the weight matrices, a scalar tensor.

    ``moved`` and ``after`` are [C] over sampled coordinates.  The result bounds the relative change of the
    logits; it does not estimate it.  It includes the layers below a LayerNorm, of which the head's own update
    shows nothing.
    """
    moved_squares, squares = sample.per_tensor(torch.stack([moved, after]).square_())
    ratios = (moved_squares / squares.clamp_min(1e-30)).sqrt_()
    return torch.where(sample.matrices, ratios, torch.zeros_like(ratios)).amax()


def feature_displacement(head_weight: Tensor, classifier_mean: Tensor | None, moved: Tensor) -> Tensor:
    """Return max_k |(W_k − W_G)·Δμ_G|, nats: how far the layers below the head moved the mean row's logits.

    ``head_weight`` [K, d], ``classifier_mean`` W_G [d] or None for a head with one output, ``moved`` [d] the
    change of μ_G over one step.  Exact for a full batch.  With minibatches, μ_G also changes with the rows,
    so only a growing value has a meaning.
    """
    moved = moved.to(head_weight.dtype)
    logits = head_weight @ moved
    if classifier_mean is not None:
        logits = logits - classifier_mean.to(head_weight.dtype) @ moved
    return logits.abs().amax()
