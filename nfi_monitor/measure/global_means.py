"""Compute the two global means whose feedback loop is Numerical Feature Inflation.

W_G is the mean over classes of the head's weight rows.  μ_G is the mean over rows of the features.  Under
absorption, each is pushed along the negative of the other (Liu et al. 2026, Theorem 3.7).  Their cosine is
reported, but no rule uses it: it reaches −.8 in healthy language models too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nfi_monitor.capture import devices


def classifier_mean(weight: Tensor) -> Tensor:
    """Return W_G. ``weight`` [K, d], classes first → [d], float32 or float64."""
    return weight.mean(0, dtype=torch.float64 if weight.dtype is torch.float64 else torch.float32)


def feature_sum(features: Tensor, counts: Tensor) -> Tensor:
    """Sum the features of the rows that count. ``features`` [N, d], ``counts`` [N] of 0/1 or bool → [d].

    A sum and not a mean, because sums of micro-batches can be added.  Reads ``counts`` on the host where they
    are there already.
    """
    if devices.on_host(counts) and counts.all():
        return features.sum(0)  # the usual case: no copy is needed
    counted = counts if counts.dtype is torch.bool else counts > 0
    kept = torch.where(counted.unsqueeze(-1), features, 0.0)
    return kept.sum(0)  # not counts @ features: 0 · NaN is NaN


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return cos(a, b) of two vectors [d], a scalar in [−1, 1] up to rounding; NaN if either is zero."""
    # Each vector is divided by its own norm: the product of two small norms may underflow.
    return torch.dot(a / torch.linalg.vector_norm(a), b / torch.linalg.vector_norm(b))
