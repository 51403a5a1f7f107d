"""Adam's second moment: how small a gradient it still expects.

All functions take the packed coordinate sample of :class:`nfi_monitor.capture.sampling.CoordinateSample`
(1-D tensors over the sampled coordinates of all tensors) or slices of it.
"""

from __future__ import annotations

from torch import Tensor

from nfi_monitor.capture.sampling import CoordinateSample


def root(exp_avg_sq: Tensor, correction: Tensor | float) -> Tensor:
    """sqrt(v̂), unit of the gradient, like ``exp_avg_sq``. ``correction`` = 1 − β2^t, scalar or like it."""
    return (exp_avg_sq / correction).sqrt()


def rms_t(grad: Tensor, root_exp_avg_sq: Tensor, eps: Tensor | float, sample: CoordinateSample) -> Tensor:
    """RMS_t of each tensor: sqrt(mean(g² / max(v̂, ε_A²))), dimensionless → [T].

    Wortsman et al. 2023 (arXiv 2304.13013): 1 where the second moment describes the gradient; a value
    above 2.3 preceded 28 of 30 loss spikes by 1–8 steps.  ``grad`` and ``root_exp_avg_sq`` [C] over
    the coordinates of ``sample``.
    """
    ratio = grad / root_exp_avg_sq.clamp_min(eps)
    return (sample.per_tensor(ratio * ratio) / sample.counts).sqrt()


def median(values: Tensor, most: int = 4096) -> Tensor:
    """Median of at most ``most`` evenly spaced entries, [C] → scalar: selection is a dear reduction."""
    return values[:: -(-len(values) // most)].median() if len(values) > most else values.median()


def effective_learning_rate(lr: Tensor | float, median_root: Tensor, eps: Tensor | float) -> Tensor:
    """lr / (median sqrt(v̂) + ε_A), 1/gradient, scalars (Kingma & Ba 2015)."""
    return lr / (median_root + eps)
