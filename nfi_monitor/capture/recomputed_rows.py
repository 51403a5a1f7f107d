"""Hold the rows that are recomputed from hidden states against the gradient that arrives there.

The gradient shows the factor of the loss, or the weight of each row, and whether these are the run's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nfi_monitor.capture.rows import Rows

NEAR_POWER = 0.02
"""Where a row's gradient times the number of rows is this near to a power of two, in log2, it is that power:
the loss is a mean over rows, times a scaler's factor."""
ROUNDED, LEAST = 3.0, 1e-3
"""Share of the gradient's size that recomputed rows may leave unexplained: so many roundings of the head's
output, and at least what matrix products in TF32 make. Beyond it the rows are refused."""
SCALED, SHOWN = 0.02, 0.1
"""Rows are refused, too, if a factor on the logits, outside of 1 ± ``SCALED``, explains so large a share of
what is left. By chance a factor explains 1/(n d) of it."""
ROUNDINGS = 4.0
"""Roundings of the correct class's gradient that are allowed besides: in rows near absorption it is no more
than that, and each fused loss rounds it in its own way."""


@dataclass
class Known:
    """What earlier readings have shown of the loss."""

    factor: Tensor | None = None  # the gradient of a row, times the number of rows
    dtype: torch.dtype | None = None  # of the loss


@dataclass
class RecomputedRows(Rows):
    """Rows whose gradient at the logits is computed from that at the hidden states, [n, d] in ``grad``.

    ``targets`` [n], negative where a row does not count; ``counted``: number of rows of the batch that count,
    0-d.  ``pulls``, [n, d] each: gradient at the hidden states if each row had weight 1, by each of
    :data:`GRADIENTS`.  ``by_scale`` [n, d]: how it changes if the loss multiplies its logits.  ``rounding``
    [n]: size of one rounding of it.  ``eps``: machine epsilon of the head's output.  ``cancels``: gradients
    of this size round to zero at the hidden states.
    """

    targets: Tensor = None  # type: ignore[assignment]
    counted: Tensor = None  # type: ignore[assignment]
    pulls: list[Tensor] = field(default_factory=list)
    by_scale: Tensor = None  # type: ignore[assignment]
    rounding: Tensor = None  # type: ignore[assignment]
    eps: float = 0.0
    cancels: bool = False
    known: Known = field(default_factory=lambda: Known())

    def _sum_up(self, grad: Tensor) -> None:
        self.grad.add_(grad)  # [n, d]: of the hidden states

    def finished(self, loss_dtype: torch.dtype | None = None) -> Rows:
        """Return the rows with the gradient at the logits, in the precision of the loss."""
        with torch.no_grad(), torch.autocast(self.grad.device.type, enabled=False):
            fits = [self._fit(pull) for pull in self.pulls]
            first, second = fits
            # PyTorch's arithmetic, unless the other one leaves far less unexplained.
            other = (second.left < first.left / 2) & (first.left > 1e-4 * first.square)
            self.known.factor, self.known.dtype = torch.where(other, second.factor, first.factor), loss_dtype
            explained = torch.where(other, second.explained, first.explained)
            dtype = precision(self.logits, loss_dtype)
            grad, otherwise = (
                gradient(self.logits, self.targets, fit.weights, dtype)
                for gradient, fit in zip(GRADIENTS, fits, strict=True)
            )
            grad = torch.where(other, otherwise, grad)
            nothing = torch.zeros((), dtype=self.logits.dtype, device=grad.device)
            return Rows(
                torch.where(explained, grad.to(self.logits.dtype), nothing),
                torch.where(explained, self.logits, nothing),
                self.features,
                self.total,
                graph=self.graph,
                recomputed=explained,
            )

    def _fit(self, pull: Tensor) -> _Fit:
        """Find the weights with which ``pull`` gives the gradient that arrived."""
        # Squares of small gradients underflow in float32, and Apple's devices have nothing wider.
        wide = torch.float32 if pull.device.type == "mps" else torch.float64
        pull, counted, arrived = pull.to(wide), self.counted.clamp(min=1), self.grad.to(wide)
        present = (arrived != 0).any(-1)
        size, common = pull.square().sum(-1), (arrived * pull).sum(-1)
        factor = common.sum() / torch.where(present, size, torch.zeros_like(size)).sum() * counted
        before = torch.ones_like(factor) if self.known.factor is None else self.known.factor.to(factor.dtype)
        # Of rows that all underflowed, or do not count, there is no factor.
        factor = torch.where(torch.isfinite(factor) & (factor != 0), factor, before)
        exponent = factor.abs().log2()
        whole = (exponent - exponent.round()).abs() < NEAR_POWER
        factor = torch.where(whole & (factor > 0), exponent.round().exp2(), factor)
        weight = (factor / counted).expand(len(size))
        # A row without any gradient, where underflow is no reason for it, is not a part of the loss.
        tiny = torch.finfo(self.grad.dtype).tiny
        rounded = 100 * tiny + (ROUNDINGS * weight * self.rounding).abs() * self.cancels
        left_out = ~present & ((weight[:, None] * pull).abs().amax(-1) > rounded)
        weight = torch.where(left_out, torch.zeros_like(weight), weight)
        own = torch.where(size > 0, common / size, torch.zeros_like(size))
        square = arrived.square().sum()
        left, left_by_own = ((arrived - w[:, None] * pull).square().sum() for w in (weight, own))
        noise = (ROUNDINGS * weight * self.rounding).square().sum()
        allowed = max(ROUNDED * self.eps, LEAST) ** 2 * square + noise
        same = left <= allowed
        weights = torch.where(same, weight, own)
        explained = (same | (left_by_own <= allowed)) & ~self._is_scaled(arrived, pull, weights, noise)
        explained |= ~torch.isfinite(square)
        return _Fit(weights, factor, explained, torch.where(same, left, left_by_own), square)

    def _is_scaled(self, arrived: Tensor, pull: Tensor, weights: Tensor, noise: Tensor) -> Tensor:
        """Return whether the gradient shows that the loss multiplies the logits, bool, 0-d.

        Rows with small logits hardly differ then, so that the share that is left unexplained is small, too.
        """
        pulled = weights[:, None] * pull
        scaled, left = weights[:, None] * self.by_scale.to(pull.dtype), arrived - pulled
        pp, ps, ss = (pulled * pulled).sum(), (pulled * scaled).sum(), (scaled * scaled).sum()
        lp, ls, ll = (left * pulled).sum(), (left * scaled).sum(), (left * left).sum()
        area = pp * ss - ps * ps
        more = (pp * ls - ps * lp) / area
        factor = more / (1.0 + (ss * lp - ps * ls) / area)
        explains = more.square() * area / pp
        shown = (explains > SHOWN * (ll - lp * lp / pp)) & (explains > noise)
        return shown & (factor.abs() > SCALED) & (area > 1e-9 * pp * ss)


class _Fit(NamedTuple):
    """Weights [n] of the rows, their common factor times the number of rows, and how well they fit."""

    weights: Tensor
    factor: Tensor
    explained: Tensor
    left: Tensor
    square: Tensor


def cross_entropy_gradient(logits: Tensor, targets: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of Σ_i w_i·CE_i at the logits, [n, K] in ``dtype``, as PyTorch's loss computes it.

    ``logits`` [n, K]; ``targets`` [n], negative where a row does not count; ``weights`` [n].
    """
    logs = torch.log_softmax(logits, -1, dtype=dtype)
    of_log = _at_targets(targets, -weights.to(dtype), logs)
    return torch.ops.aten._log_softmax_backward_data(of_log, logs, -1, dtype)  # type: ignore[no-any-return]


def normalized_gradient(logits: Tensor, targets: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient as losses compute it that store log Σ_k e^{z_k}. As :func:`cross_entropy_gradient`.

    The log is rounded beside a large logit, so such losses absorb rows at a smaller margin.
    """
    wide = logits.to(dtype)
    chances = torch.exp(wide - torch.logsumexp(wide, -1, keepdim=True))
    weights = torch.where(targets >= 0, weights.to(dtype), torch.zeros_like(weights, dtype=dtype))
    return weights[:, None] * (chances - _at_targets(targets, torch.ones_like(weights), chances))


def scale_gradient(logits: Tensor, targets: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how the gradient of Σ_i w_i·CE_i changes with a factor on the logits. As cross_entropy_gradient.

    Without the part that is a multiple of the gradient itself: w·p∘(z − Σ_k p_k z_k).
    """
    wide = logits.to(dtype)
    chances = torch.softmax(wide, -1)
    weights = torch.where(targets >= 0, weights.to(dtype), torch.zeros_like(weights, dtype=dtype))
    return weights[:, None] * chances * (wide - (chances * wide).sum(-1, keepdim=True))


Gradient = Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
GRADIENTS: tuple[Gradient, Gradient] = (cross_entropy_gradient, normalized_gradient)
"""The ways in which losses compute their gradient, which differ where rows are absorbed."""


def _at_targets(targets: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """Return zeros [n, K], with ``values`` [n] at the targets of rows that count."""
    values = torch.where(targets >= 0, values, torch.zeros_like(values))
    return torch.zeros_like(like).scatter_(-1, targets.clamp(min=0)[:, None], values[:, None])


def precision(logits: Tensor, loss_dtype: torch.dtype | None) -> torch.dtype:
    """Return the precision of the loss: that of the logits, where the loss itself has no wider one."""
    return logits.dtype if loss_dtype is logits.dtype else accumulator(logits)


def accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32
