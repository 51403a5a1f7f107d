"""Compute margin, residual mass and loss of each row, accurate up to margins of hundreds of nats.

``1 − p_r`` cannot be used: this is the subtraction in which absorption happens.  All functions start from
ln Σ_{k≠m} e^{z_k − z_m} (m the largest logit), which neither cancels nor underflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nfi_monitor.measure import extremes
from nfi_monitor.measure.views import RowView, TopLogits


def top_logits(logits: Tensor) -> TopLogits:
    """Find the top logits of ``logits`` [N, K], K ≥ 2, float32 or float64; masked classes may be −inf."""
    largest, winner = extremes.largest(logits)
    others = logits.scatter(-1, winner.unsqueeze(-1), -torch.inf)
    runner_up = others.amax(-1)
    # As logsumexp, but in place and with a maximum that is known already.
    lowest = torch.finfo(logits.dtype).min  # if all others are masked, −inf − (−inf) would be NaN
    rest = others.sub_(runner_up.clamp_min(lowest).unsqueeze(-1)).exp_().sum(-1).log_()
    return TopLogits(largest, winner, runner_up, rest + (runner_up - largest))


MISCLASSIFIED = 0.005
"""Smallest gradient of the correct class in a misclassified row, as a share of the scale of the gradients:
half of the scale, in a row with a hundredth of the weight."""


def target_class(lowest: Tensor, argmin: Tensor, of_winner: Tensor, winner: Tensor, scale: Tensor) -> Tensor:
    """Find the correct class of each row without labels. All but the last [N] → int64 [N].

    ``lowest`` and ``argmin``: the smallest gradient and its class.  ``winner`` and ``of_winner``: the class
    of the largest logit and its gradient.  ``scale``: of the gradients, as far as known; else 0, a scalar.

    With hard labels, only g_r is negative.  An absorbed row has no negative entry, but only the largest logit
    can be absorbed.  Under label smoothing, a row that is surer than its label has the signs reversed: only
    the winner's gradient is positive, and it outweighs each other entry.  In a misclassified row it cannot.
    The factor ¾ leaves room for rounding.

    In a misclassified row, p_r ≤ ½, so the gradient is large.  A small negative one at another class than the
    winner is that of a penalty on the logits, in a row that the loss has fitted or absorbed.
    """
    size = torch.where(torch.isfinite(lowest), -lowest, torch.zeros_like(lowest))
    least = MISCLASSIFIED * torch.maximum(size.amax(), scale.to(size.dtype))
    large = (argmin == winner) | (size >= least)
    return torch.where((lowest < 0) & (-lowest >= 0.75 * of_winner) & large, argmin, winner)


def margin(top: TopLogits, target: Tensor, target_logit: Tensor) -> Tensor:
    """Return z_r − max_{k≠r} z_k in nats, [N]; negative where the row is misclassified."""
    rival = torch.where(target == top.winner, top.runner_up, top.largest)
    return target_logit - rival


def row_loss(top: TopLogits, target_logit: Tensor) -> Tensor:
    """Return −ln p_r in nats, [N], not rounded to zero as long as the number is representable."""
    return (top.largest - target_logit) + torch.log1p(top.log_rest.exp())


def residual_mass(loss: Tensor) -> Tensor:
    """Return ε = Σ_{k≠r} p_k = 1 − e^{−loss}, [N] → [N] (Liu et al. 2026, Theorem 3.4)."""
    return -torch.expm1(-loss)


def loss_of_rows(rows: RowView) -> Tensor:
    """Return each row's loss, [N], nats: see :func:`row_loss`."""
    return rows.loss


def residual_mass_of_rows(rows: RowView) -> Tensor:
    """Return each row's residual mass ε, [N]: see :func:`residual_mass`."""
    return rows.residual


def max_probability_of_rows(rows: RowView) -> Tensor:
    """Return max_k p_k of each row, [N], accurate also where it rounds to 1."""
    return torch.sigmoid(-rows.top.log_rest)
