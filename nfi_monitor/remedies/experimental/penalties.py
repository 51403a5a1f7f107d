"""Keep the log of the partition function near zero."""

from __future__ import annotations

from torch import Tensor


def z_loss(logits: Tensor, coefficient: float = 1e-4, axis: int = -1) -> Tensor:
    """Return λ · mean(Z²), Z = ln Σ_k e^z_k, to add to the loss (Wortsman et al. 2024, arXiv 2309.14322).

    ``logits`` [..., K] with the classes along ``axis``; ``coefficient`` λ.  It pulls Z to 0, for language
    models whose logits drift as a whole.  Numerical feature inflation is such a drift, so it is bounded as
    well.  The logits' gradient then has no zero-sum by design: Σ_k g_k = 2λZ.  It costs a log-sum-exp.  When
    not to use it: if the level of the logits has a meaning.
    """
    return coefficient * logits.logsumexp(axis).square().mean()
