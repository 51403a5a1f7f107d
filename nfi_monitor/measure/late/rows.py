"""Measure the rows of a backward pass: sums over the classes on the device, the kind of each row on the host.

The results are those of :func:`nfi_monitor.measure.rows.row_statistics` in passes that do not look at the
kind of loss.  Those that do, one in 64, need gradient and logits several times, and stay on the device.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nfi_monitor.measure import declared, extremes, margins, zero_sum
from nfi_monitor.measure.late.packing import Late, Outline
from nfi_monitor.measure.loss_kind import LossKind
from nfi_monitor.measure.rows import RowKinds, RowStatistics, row_view, sum_rows
from nfi_monitor.measure.views import RowView, TopLogits

FIELDS = (
    "signed", "absolute", "lowest", "lowest_class", "lowest_logit",
    "largest", "winner", "winner_grad", "runner_up", "log_share",
)  # fmt: skip
"""Numbers of one row.

Σ g and Σ |g|; the smallest g with its class and logit; the largest logit with its class and g; the second
largest logit, and ln of its share among all classes but the largest, NaN where these are all masked.
"""


class LateKind:
    """The facts about the loss, ready for passes that do not look at it again."""

    def __init__(self, kind: LossKind) -> None:
        self.kind = kind
        self.packed = torch.stack(list(kind))
        self._silenced: dict[int, Tensor] = {}

    def silenced_below(self, rows: int) -> Tensor:
        """Return the ln p of the strongest competitor below which a gradient of zeros has underflowed.

        See :func:`nfi_monitor.measure.absorption.underflowed_rows`.
        """
        found = self._silenced.get(rows)
        if found is None:
            factor, scale = -math.log(max(rows, 1)), self.kind.scale
            known = torch.where(scale > 0, scale.log(), factor)
            found = self.kind.level - known.clamp_max(factor)
            if len(self._silenced) >= 8:  # micro-batches of many sizes
                self._silenced.clear()
            self._silenced[rows] = found
        return found


def from_sums() -> bool:
    """Return whether no declared function of a row needs its gradient or its logits."""
    return all(of.from_shards for of in (*declared.OVER_LIVE.values(), *declared.OVER_COUNTED.values()))


def late_rows(grad: Tensor, logits: Tensor, rows: int, known: LateKind) -> tuple[Late[RowStatistics], Tensor]:
    """Reduce rows with at least two classes. Returns their numbers, and which rows count, bool [N].

    ``grad`` and ``logits`` [N, K], ``rows``: of the whole batch, as for
    :func:`nfi_monitor.measure.rows.row_statistics`.
    """
    dtype = zero_sum.accumulation_dtype(grad.dtype, logits.dtype)
    grad, scaled = grad.to(dtype), logits.to(dtype) * known.kind.slope.to(dtype)
    largest, winner = extremes.largest(scaled)
    others = scaled.scatter(-1, winner.unsqueeze(-1), -torch.inf)
    runner_up = others.amax(-1)
    lowest, argmin = extremes.smallest(grad)
    absolute = torch.linalg.vector_norm(grad, 1, -1)
    numbers = {
        "signed": grad.sum(-1),
        "absolute": absolute,
        "lowest": lowest,
        "lowest_class": argmin.to(dtype),
        "lowest_logit": extremes.pick(scaled, argmin),
        "largest": largest,
        "winner": winner.to(dtype),
        "winner_grad": extremes.pick(grad, winner),
        "runner_up": runner_up,
        # Of the runner-up itself: one kernel makes what exp, sum and log would.
        "log_share": torch.log_softmax(others, -1).amax(-1),
    }
    # Rows that count have a gradient, or one that underflowed, and only finite numbers: 0 · Inf is NaN, and a
    # comparison with NaN is false.
    silenced = runner_up - largest < known.silenced_below(rows)
    counts = torch.add(absolute + silenced, absolute + largest, alpha=0) > 0
    parts = {"numbers": torch.stack([numbers[name] for name in FIELDS]), "kind": known.packed}
    return Late(parts, partial(_finish, rows)), counts


def _finish(rows: int, arrived: Mapping[str, Tensor]) -> RowStatistics:
    of = dict(zip(FIELDS, arrived["numbers"], strict=True))
    facts = LossKind(*arrived["kind"])
    rest = (of["runner_up"] - of["largest"]) - of["log_share"].nan_to_num(0.0, torch.inf, -torch.inf)
    top = TopLogits(of["largest"], of["winner"].long(), of["runner_up"], rest)
    lowest = (of["lowest"], of["lowest_class"].long(), of["lowest_logit"])
    sums = (of["signed"], of["absolute"])
    view, kinds = _target_and_view(sums, top, lowest, of["winner_grad"], rows, facts)
    return sum_rows(view, kinds, facts, None, rows)


def _target_and_view(
    sums: tuple[Tensor, Tensor],
    top: TopLogits,
    lowest: tuple[Tensor, Tensor, Tensor],
    of_winner: Tensor,
    rows: int,
    kind: LossKind,
) -> tuple[RowView, RowKinds]:
    """Find the correct class and the kind of each row from numbers per row, [N] each.

    ``lowest``: the smallest gradient, its class, int64, and its logit; ``of_winner``: the gradient of the
    largest logit; the rest as for :func:`row_view`.
    """
    smallest, argmin, logit = lowest
    target = margins.target_class(smallest, argmin, of_winner, top.winner, kind.scale)
    won = target == top.winner
    own, own_logit = torch.where(won, of_winner, smallest), torch.where(won, top.largest, logit)
    return row_view(sums, top, target, own_logit, own, rows, kind)


class RowTotals(NamedTuple):
    """``sums`` and ``maxima`` of a step's rows, as in :class:`nfi_monitor.measure.rows.RowStatistics`."""

    sums: Tensor
    maxima: Tensor


def add_late(
    totals: RowTotals | None, late: Sequence[Outline[RowStatistics]], numbers: Tensor
) -> tuple[RowTotals | None, Counter[int], Tensor]:
    """Add rows that have arrived to ``totals``.

    Returns the totals, the absorbed rows by class, and what is left of ``numbers`` after the rows.
    """
    absorbed: Counter[int] = Counter()
    for outline in late:
        found, numbers = outline.read(numbers)
        totals = RowTotals(
            found.sums if totals is None else totals.sums + found.sums,
            found.maxima if totals is None else torch.maximum(totals.maxima, found.maxima),
        )
        absorbed.update(absorbed_classes(found))
    return totals, absorbed, numbers


def absorbed_classes(rows: RowStatistics) -> Counter[int]:
    """Count absorbed rows on the host by class."""
    if rows.winner is None or rows.absorbed is None:
        return Counter()
    return Counter(rows.winner[rows.absorbed > 0].tolist())
