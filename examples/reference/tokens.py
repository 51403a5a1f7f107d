"""Count which tokens reach a loss of exactly 0, by target and in proportion to their occurrences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from examples.reference.packages import require

TOP = 10
SELDOM = 20
"""Below this number of occurrences a share per occurrence means nothing."""


class Tally:
    """Count per token of the vocabulary: occurrences as a target, and those with a loss of exactly 0.

    The counts are integers on the device. They are read only when the run ends, and their order does not
    matter.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self.seen = torch.zeros(vocabulary, dtype=torch.int64, device=device)
        self.zero = torch.zeros_like(self.seen)

    def add(self, targets: Tensor, losses: Tensor) -> None:
        """Count ``targets`` of any shape, with one loss each in ``losses``."""
        flat = targets.flatten()
        self.seen.scatter_add_(0, flat, torch.ones_like(flat))
        self.zero.scatter_add_(0, flat, (losses.detach().flatten() == 0).to(torch.int64))

    def summary(self, decode: Callable[[int], str]) -> dict[str, Any]:
        """Return totals, the rank correlation of frequency and zeros, and the ten tokens with most zeros.

        ``rank_correlation`` is Spearman's over the tokens that reached 0 at least once; None for fewer than
        three. Tokens come as ``[decoded, zeros, occurrences]``.
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
    """Return the ten largest of ``order`` above 0, largest first; ties give the smaller token first."""
    best = torch.argsort(order, descending=True, stable=True)[:TOP]
    return [[decode(int(k)), int(zero[k]), int(seen[k])] for k in best if order[k] > 0]


def _spearman(a: Tensor, b: Tensor) -> float | None:
    if len(a) < 3:
        return None
    found = float(require("scipy.stats", "rank correlations").spearmanr(a.numpy(), b.numpy()).statistic)
    return found if math.isfinite(found) else None  # NaN if all values are equal
