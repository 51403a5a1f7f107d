"""z-loss: keep the log of the partition function near zero."""

from __future__ import annotations

from torch import Tensor


def z_loss(logits: Tensor, coefficient: float = 1e-4, axis: int = -1) -> Tensor:
    """λ · mean(Z²), Z = ln Σ_k e^z_k, a scalar to add to the loss (Wortsman et al. 2024, arXiv 2309.14322).

    For logits that drift as a whole, in language models: they come back to Z = 0.  It bounds numerical
    feature inflation as well, which is such a drift.  The logits' gradient then has no zero-sum, and should
    have none: Σ_k g_k = 2λZ.  ``logits`` [..., K] with the classes along ``axis``.  Costs a log-sum-exp.
    When not to use it: where the level of the logits means something.
    """
    return coefficient * logits.logsumexp(axis).square().mean()
