"""Estimate the local learning coefficient by Langevin sampling, and calibrate on models where it is known.

λ̂ = nβ (E[L(w)] − L(w*)), the mean over a chain that samples exp(−nβ L(w) − γ/2 ‖w − w*‖²) around w*, with β
= 1/ln n (Watanabe 2013; Lau et al. 2023, arXiv 2308.12108). devinterp 2.0 has such a sampler, and installs
beside this torch. But it accepts only language models: a HuggingFace data set of token ids and a loss per
token. Hence these forty lines of our own, with a calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """Hold the settings of a sampler, and estimate with them.

    ``step``: Langevin step size ε times nβ, so that it means the same for every n; ``pull``: γ.
    """

    step: float = 1e-3
    pull: float = 1.0
    draws: int = 2_000
    burn_in: int = 1_000
    chains: int = 4

    def estimate(self, loss: Callable[[Tensor], Tensor], at: Tensor, rows: int, seed: int = 0) -> float:
        """Return λ̂ at ``at`` [P]; ``loss`` maps weights [C, P] of C chains to their mean losses [C]."""
        n_beta = rows / math.log(rows)
        generator = torch.Generator().manual_seed(seed)
        start = at.detach().repeat(self.chains, 1)
        weights = start.clone()
        epsilon = self.step / n_beta
        total = torch.zeros(self.chains, dtype=torch.float64)
        for draw in range(self.burn_in + self.draws):
            weights.requires_grad_(True)
            value = loss(weights)
            (gradient,) = torch.autograd.grad(value.sum(), weights)
            if draw >= self.burn_in:
                total += value.detach().double().cpu()
            noise = torch.randn(weights.shape, generator=generator, dtype=torch.float64).to(weights)
            with torch.no_grad():
                drift = n_beta * gradient + self.pull * (weights - start)
                weights = weights - 0.5 * epsilon * drift + math.sqrt(epsilon) * noise
        floor = float(loss(start[:1]).detach().double())
        return n_beta * (float(total.mean()) / self.draws - floor)


# --- models whose coefficient is known ----------------------------------------------------------------


def regular(d: int, rows: int, seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor, float]:
    """Return linear regression with d weights: (loss, minimum, λ = d/2)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    y = torch.randn(rows, generator=generator, dtype=torch.float64)
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    return lambda w: 0.5 * (x @ w.T - y[:, None]).square().mean(0), best, d / 2


def reduced_rank(
    outer: int, inner: int, rank: int, rows: int, seed: int
) -> tuple[Callable[[Tensor], Tensor], Tensor, float]:
    """Return a two-layer linear network ``outer → inner → outer`` that fits a matrix of the given rank.

    The result is (loss, a minimum, λ of Aoyagi and Watanabe 2005, case 1). Raises ValueError outside that
    case.
    """
    if not inner + rank <= 2 * outer:
        raise ValueError(f"λ is that of 'case 1' only: inner + rank = {inner + rank} > {2 * outer}.")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, outer, generator=generator, dtype=torch.float64)
    left = torch.zeros(outer, inner, dtype=torch.float64)
    right = torch.zeros(inner, outer, dtype=torch.float64)
    for index in range(rank):
        left[index, index] = right[index, index] = 1.0
    target = x @ (left @ right)
    # The noise cancels out of L(w) − L(w*) in expectation, so it is left out: the coefficient is the same.

    def loss(w: Tensor) -> Tensor:
        a, b = (
            w[:, : outer * inner].reshape(-1, outer, inner),
            w[:, outer * inner :].reshape(-1, inner, outer),
        )
        return 0.5 * (x @ (a @ b) - target).square().sum(-1).mean(-1)

    h, m = inner + rank, outer
    twice = -(h**2) - 2 * m**2 + 4 * h * m + 2 * m * m
    coefficient = (twice + (2 * m + h) % 2) / 8
    return loss, torch.cat([left.flatten(), right.flatten()]), coefficient


def calibration(sampler: Sampler, rows: int, seed: int) -> list[dict[str, Any]]:
    """Return λ̂ and λ for models from regular to singular."""
    models = {
        "regular, 5 weights": regular(5, rows, seed),
        "regular, 20 weights": regular(20, rows, seed),
        "reduced rank 4-2-4, rank 0": reduced_rank(4, 2, 0, rows, seed),
        "reduced rank 4-2-4, rank 1": reduced_rank(4, 2, 1, rows, seed),
        "reduced rank 4-2-4, rank 2": reduced_rank(4, 2, 2, rows, seed),
    }
    return [
        {"model": name, "known": known, "estimate": sampler.estimate(loss, best, rows, seed)}
        for name, (loss, best, known) in models.items()
    ]
