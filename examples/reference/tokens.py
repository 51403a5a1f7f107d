"""Which tokens reach a loss of exactly 0: counted by target, as often as they come in training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from examples.reference.packages import require

TOP = 10
SELDOM = 20
"""Occurrences below which a share per occurrence says nothing."""


class Tally:
    """Per token of the vocabulary: how often it was a target, and how often with a loss of exactly 0.

    Integer counts on the device: nothing is read until the run ends, and their sum has no order.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self.seen = torch.zeros(vocabulary, dtype=torch.int64, device=device)
        self.zero = torch.zeros_like(self.seen)

    def add(self, targets: Tensor, losses: Tensor) -> None:
        """``targets`` of any shape, ``losses`` as many, one each."""
        flat = targets.flatten()
        self.seen.scatter_add_(0, flat, torch.ones_like(flat))
        self.zero.scatter_add_(0, flat, (losses.detach().flatten() == 0).to(torch.int64))

    def summary(self, decode: Callable[[int], str]) -> dict[str, Any]:
        """Totals, the rank correlation of frequency and zeros, and the ten tokens with most zeros.

        ``rank_correlation`` is Spearman's over the tokens that reached 0 at least once; None below three.
        Tokens come as ``[decoded, zeros, occurrences]``.
        """
        seen, zero = self.seen.cpu(), self.zero.cpu()
        often = torch.where(seen >= SELDOM, zero / seen.clamp(min=1), torch.zeros(()))
        once = zero > 0
        return {
            "tokens_seen": int(seen.sum()),
            "zero_loss_seen": int(zero.sum()),
            "kinds_seen": int((seen > 0).sum()),
            "kinds_at_zero": int(once.sum()),
            "rank_correlation": _spearman(seen[once], zero[once]),
            "most_in_total": _top(zero.double(), seen, zero, decode),
            "most_per_occurrence": _top(often.double(), seen, zero, decode),
            "most_frequent": _top(seen.double(), seen, zero, decode),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.seen, "zero": self.zero}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seen.copy_(state["seen"])
        self.zero.copy_(state["zero"])


def _top(order: Tensor, seen: Tensor, zero: Tensor, decode: Callable[[int], str]) -> list[list[Any]]:
    """The ten largest of ``order`` above 0, largest first; the smaller token first where they tie."""
    best = torch.argsort(order, descending=True, stable=True)[:TOP]
    return [[decode(int(k)), int(zero[k]), int(seen[k])] for k in best if order[k] > 0]


def _spearman(a: Tensor, b: Tensor) -> float | None:
    if len(a) < 3:
        return None
    found = float(require("scipy.stats", "rank correlations").spearmanr(a.numpy(), b.numpy()).statistic)
    return found if math.isfinite(found) else None  # not a number where all are equal
