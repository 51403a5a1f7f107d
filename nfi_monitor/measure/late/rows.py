"""Measure the rows of a backward pass: sums over the classes on the device, the kind of each row on the host.

The results are those of :func:`nfi_monitor.measure.rows.row_statistics`.  A pass that looks at the kind of
loss needs gradient and logits several times.  It sends them, or some of many, to the host, which keeps the
facts about the loss.  These are up to the last look that has arrived.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nfi_monitor.capture.rows import Rows
from nfi_monitor.measure import absorption, declared, extremes, margins, zero_sum
from nfi_monitor.measure.late.packing import Failed, Late, Outline
from nfi_monitor.measure.loss_kind import LossKind
from nfi_monitor.measure.native_rows import row_statistics
from nfi_monitor.measure.rows import (
    LOOK_SUMS,
    SUMS,
    RowKinds,
    RowStatistics,
    corrected,
    row_view,
    sum_rows,
)
from nfi_monitor.measure.views import RowView, TopLogits

FIELDS = (
    "signed", "absolute", "lowest", "lowest_class", "lowest_logit",
    "largest", "winner", "winner_grad", "runner_up", "log_share",
)  # fmt: skip
"""Numbers of one row.

Σ g and Σ |g|; the smallest g with its class and logit; the largest logit with its class and g; the second
largest logit, and ln of its share among all classes but the largest, NaN where these are all masked.
"""
LOOKED_AT = 1 << 21
"""Maximum number of logits that a pass sends to the host (8 MiB in float32, and as much for the gradient)."""


class KnownLoss:
    """Holder of the facts about the loss, on the host. ``kind``: None until the first pass has arrived."""

    kind: LossKind | None = None


def late_rows(rows: Rows, facts: KnownLoss, *, look: bool) -> tuple[Late[RowStatistics], Tensor]:
    """Reduce rows with at least two classes. Returns their numbers, and which rows count, bool [N].

    ``facts``: the facts about the loss so far; the rows add theirs when they arrive.  ``look``: look at the
    kind of loss again.
    """
    grad, logits, total, normalized = rows.grad, rows.logits, rows.total, rows.normalized
    parts: dict[str, Tensor] = {}
    if look or facts.kind is None or not _from_sums():
        every = -(-grad.numel() // LOOKED_AT)
        parts |= {"grad": grad[::every], "logits": logits[::every]}
    slope = 1.0 if facts.kind is None else facts.kind.slope.item()
    parts["numbers"], counts = _reduce(grad, logits, slope, silenced_below(facts.kind, grad.dtype, total))
    if rows.recomputed is not None:
        parts["recomputed"] = rows.recomputed
        counts = counts & rows.recomputed

    def finish(arrived: Mapping[str, Tensor]) -> RowStatistics:
        known, numbers = facts.kind, arrived["numbers"]
        found = None
        if "grad" in arrived:
            found = row_statistics(arrived["grad"], arrived["logits"], total, known, look=look)
            facts.kind = known = found.loss_kind
        if found is None or (len(found.counts) < numbers.shape[1] and _from_sums()):
            assert known is not None  # the first pass has looked
            found = _finish(numbers, total, known, found)
        return corrected(found, normalized, numbers.shape[1], arrived.get("recomputed"))

    return Late("rows", parts, finish), counts


def silenced_below(kind: LossKind | None, dtype: torch.dtype, rows: int) -> float:
    """Return the ln p of the strongest competitor below which a gradient of zeros has underflowed.

    See :func:`nfi_monitor.measure.absorption.underflowed_rows`; ``dtype``: of the gradient.
    """
    factor = -math.log(max(rows, 1))
    if kind is None:
        return absorption.underflow_level(dtype) - factor
    scale = kind.scale.item()
    return kind.level.item() - (min(math.log(scale), factor) if scale > 0 else factor)


def _from_sums() -> bool:
    """Return whether no declared function of a row needs its gradient or its logits."""
    return all(of.from_shards for of in (*declared.OVER_LIVE.values(), *declared.OVER_COUNTED.values()))


def _reduce(grad: Tensor, logits: Tensor, slope: float, silenced_at: float) -> tuple[Tensor, Tensor]:
    """Return ``FIELDS`` of each row [len(FIELDS), N], and whether it counts, bool [N]."""
    dtype = zero_sum.accumulation_dtype(grad.dtype, logits.dtype)
    grad, scaled = grad.to(dtype), logits.to(dtype)
    if slope != 1.0:
        scaled = scaled * slope
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
    silenced = runner_up - largest < silenced_at
    counts = torch.add(absolute + silenced, absolute + largest, alpha=0) > 0
    return torch.stack([numbers[name] for name in FIELDS]), counts


def _finish(numbers: Tensor, rows: int, kind: LossKind, shown: RowStatistics | None) -> RowStatistics:
    """Return the statistics of rows that have arrived. ``shown``: of some of them, where the pass looked."""
    of = dict(zip(FIELDS, numbers, strict=True))
    rest = (of["runner_up"] - of["largest"]) - of["log_share"].nan_to_num(0.0, torch.inf, -torch.inf)
    top = TopLogits(of["largest"], of["winner"].long(), of["runner_up"], rest)
    lowest = (of["lowest"], of["lowest_class"].long(), of["lowest_logit"])
    sums = (of["signed"], of["absolute"])
    view, kinds = _target_and_view(sums, top, lowest, of["winner_grad"], rows, kind)
    seldom = None
    if shown is not None:
        first = SUMS.index(LOOK_SUMS[0])
        seldom = shown.sums[first : first + len(LOOK_SUMS)] * (numbers.shape[1] / len(shown.counts))
    return sum_rows(view, kinds, kind, seldom, rows)


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
    largest logit; the rest as for :func:`nfi_monitor.measure.rows.row_view`.
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
    totals: RowTotals | None, late: Sequence[Outline[RowStatistics]], numbers: Tensor, failed: Failed
) -> tuple[RowTotals | None, Counter[int], Tensor]:
    """Add rows that have arrived to ``totals``. ``failed`` gets errors.

    Returns the totals, the absorbed rows by class, and what is left of ``numbers`` after the rows.
    """
    absorbed: Counter[int] = Counter()
    for outline in late:
        found, numbers = outline.read(numbers, failed)
        if found is None:
            continue
        totals = RowTotals(
            found.sums if totals is None else totals.sums + found.sums,
            found.maxima if totals is None else torch.maximum(totals.maxima, found.maxima),
        )
        absorbed.update(absorbed_classes(found))
    return totals, absorbed, numbers


def absorbed_classes(rows: RowStatistics) -> Counter[int]:
    """Count absorbed rows on the host by class."""
    if rows.winner is None or rows.absorbed is None or not rows.absorbed.any():
        return Counter()
    return Counter(rows.winner[rows.absorbed > 0].tolist())
