"""Measure Adam's second moment: the size of the gradients that it expects.

All functions take 1-D tensors over the sampled coordinates of all tensors, in the order of
:class:`nfi_monitor.capture.sampling.CoordinateSample`, or slices of them.
"""

from __future__ import annotations

from torch import Tensor

from nfi_monitor.capture.sampling import CoordinateSample


def root(exp_avg_sq: Tensor, correction: Tensor | float) -> Tensor:
    """Return sqrt(v̂) in the unit of the gradient, [C]. ``correction`` = 1 − β2^t, a scalar or [C]."""
    return (exp_avg_sq / correction).sqrt()


def rms_t(grad: Tensor, root_exp_avg_sq: Tensor, eps: Tensor | float, sample: CoordinateSample) -> Tensor:
    """Return RMS_t of each tensor, sqrt(mean(g² / max(v̂, ε_A²))), dimensionless, [T].

    ``grad`` and ``root_exp_avg_sq`` are [C] over the coordinates of ``sample``.  RMS_t is 1 where the second
    moment describes the gradient.  A value above 2.3 preceded 28 of 30 loss spikes by 1–8 steps (Wortsman et
    al. 2023, arXiv 2304.13013).
    """
    ratio = grad / root_exp_avg_sq.clamp_min(eps)
    return (sample.per_tensor(ratio * ratio) / sample.counts).sqrt()


def few(values: Tensor, most: int = 4096) -> Tensor:
    """Return a view of at most ``most`` evenly spaced entries of [C]."""
    return values[:: -(-len(values) // most)] if len(values) > most else values


def median(values: Tensor) -> Tensor:
    """Return the median of a few entries (:func:`few`), [C] → scalar; of all, it would be slow."""
    return few(values).median()


def effective_learning_rate(lr: Tensor | float, median_root: Tensor, eps: Tensor | float) -> Tensor:
    """Return lr / (median sqrt(v̂) + ε_A), 1/gradient, all scalars (Kingma & Ba 2015)."""
    return lr / (median_root + eps)
