"""Measure rows whose logits are cut along the classes: the part of one rank, and all parts joined.

With a vocabulary-parallel head, each rank holds [N, K/ranks] of the logits.  Sums over classes can be added.
Whether a row is absorbed or underflowed, and how large its violation is, depends on the whole row.  Therefore
the ranks exchange a few numbers of each sampled row, and each rank joins the rows itself.  No logits are
gathered.  This module does not communicate.

:func:`join_shards` computes from these numbers what :func:`nfi_monitor.measure.rows.row_statistics` computes
from [N, K].  A test compares the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nfi_monitor.measure import absorption, declared, extremes, margins, shift_invariance, zero_sum
from nfi_monitor.measure.rows import LOOK_SUMS, MASKS, MAXIMA, SUMS, LossKind, row_view, unexplained_rows
from nfi_monitor.measure.views import RowView, TopLogits
from nfi_monitor.quantities import PerRow

FIELDS = (
    "signed", "absolute", "lowest", "lowest_class", "lowest_logit",
    "largest", "winner", "winner_grad", "runner_up", "log_rest",
    "negatives", "logit_sum", "logit_count",
)  # fmt: skip
"""Numbers of one row, over the classes of one rank.

Σ g and Σ |g|; the smallest g with its class and logit; the largest logit with its class and g; the second
largest logit; ln of the rest over the largest.  Only in passes that look at the kind of loss: the number of
g < 0, Σ z, and the number of unmasked z.
"""
HEADER = (
    "rows", "first", "classes", "group", "batch_rows", "batches", "eps",
    "wider_than_float32", "wider_than_float16", "wider_than_bfloat16", "nonzero",
)  # fmt: skip
"""Numbers of all rows of one rank.

Number of rows; first class and number of classes; the group of ranks that completes the rows; rows of the
whole batch over all micro-batches; number of micro-batches; epsilon of the gradient's dtype; whether some
gradient does not fit a narrower dtype (three of them); whether some gradient is not 0.
"""
SHOWN = HEADER.index("wider_than_float32")
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class ShardRows(NamedTuple):
    """One micro-batch's rows, over the classes of this rank.

    ``numbers`` [len(FIELDS), N].  ``shown`` [4]: the end of ``HEADER``.  ``counts`` [N]: 1.0 where the
    classes of this rank show that the row counts; most rows count on several ranks.  ``batch_rows``: rows of
    the whole batch.  ``eps``: epsilon of the gradient's dtype.
    """

    numbers: Tensor
    shown: Tensor
    counts: Tensor
    batch_rows: int
    eps: float


def shard_rows(
    grad: Tensor, logits: Tensor, first: int, rows: int, level: Tensor | float | None, *, look: bool
) -> ShardRows:
    """Measure this rank's classes of the sampled rows.

    Args:
        grad: ∂L/∂z [N, k] of classes ``first`` … ``first + k − 1``, k ≥ 1, in the run's own dtype.
        logits: z [N, k] of the same.
        rows: rows of the whole batch, which a mean reduction divides by.
        level: underflow level of the loss (:class:`LossKind`), if known.
        look: look at the kind of loss again.
    """
    dtype = zero_sum.accumulation_dtype(grad.dtype, logits.dtype)
    top = margins.top_logits(logits.to(dtype))
    signed, absolute = zero_sum.row_sums(grad)
    lowest, argmin = extremes.smallest(grad)
    numbers = {
        "signed": signed,
        "absolute": absolute,
        "lowest": lowest,
        "lowest_class": argmin + first,
        "lowest_logit": extremes.pick(logits, argmin),
        "largest": top.largest,
        "winner": top.winner + first,
        "winner_grad": extremes.pick(grad, top.winner),
        "runner_up": top.runner_up,
        "log_rest": top.log_rest,
    }
    shown = torch.zeros(len(HEADER) - SHOWN, dtype=dtype, device=grad.device)
    if look:
        numbers["negatives"] = shift_invariance.negatives(grad)
        numbers["logit_sum"], numbers["logit_count"] = shift_invariance.unmasked(logits, dtype)
        finite = absorption.finite_entries(grad)
        wider = [absorption.wider(finite, narrow) for narrow in _NARROW]
        shown = torch.stack([*wider, finite.abs().amax() > 0]).to(dtype)
    nothing = torch.zeros_like(absolute)
    # Each rank counts a row if its own classes show that the row counts, and features are averaged over all
    # ranks. This is exact if a row's gradient vanishes on every rank or on none (float32, bfloat16). If it
    # underflows on some ranks (float16), confident rows weigh less. The exact mask is known only after the
    # exchange; using it would take a second exchange.
    finite = torch.isfinite(absolute + top.largest)
    counts = (absolute > 0) & finite
    if logits.shape[-1] > 1:
        silent = (absolute == 0) & finite
        known = absorption.underflow_level(grad.dtype) if level is None else level
        counts = counts | absorption.underflowed_rows(silent, top.runner_up - top.largest, rows, known)
    return ShardRows(
        torch.stack([numbers.get(name, nothing).to(dtype) for name in FIELDS]),
        shown,
        counts.to(dtype),
        rows,
        torch.finfo(grad.dtype).eps,
    )


class PackedRows(NamedTuple):
    """The message of a rank: ``header`` up to ``SHOWN``, ``shown`` [4], ``numbers`` [len(FIELDS), slots]."""

    header: list[float]
    shown: Tensor
    numbers: Tensor


def pack_shards(parts: Sequence[ShardRows], first: int, classes: int, group: int, slots: int) -> PackedRows:
    """Pack the micro-batches of a step into at most ``slots`` rows; of more, take every n-th."""
    numbers = torch.cat([part.numbers for part in parts], dim=1)
    numbers = numbers[:, :: max(1, -(-numbers.shape[1] // slots))]
    shown = torch.stack([part.shown for part in parts]).amax(0)
    batch_rows = sum(part.batch_rows for part in parts)
    eps = max(part.eps for part in parts)
    header = [numbers.shape[1], first, classes, group, batch_rows, len(parts), eps]
    return PackedRows([float(x) for x in header], shown, numbers)


class JoinedRows(NamedTuple):
    """The joined rows of all ranks.

    ``sums`` and ``maxima`` as in :class:`nfi_monitor.measure.rows.RowStatistics`; ``absorbed`` rows by class;
    ``loss_kind``: the facts about the loss so far; ``groups``: number of sets of ranks that were complete.
    """

    sums: Tensor
    maxima: Tensor
    absorbed: Counter[int]
    loss_kind: LossKind
    groups: int


def join_shards(
    blocks: Tensor, outputs: int, known: LossKind | None, *, look: bool, dtype: torch.dtype
) -> JoinedRows | None:
    """Join the rows of all ranks; return None where no set of ranks holds all classes of its rows.

    Args:
        blocks: [ranks, len(HEADER) + len(FIELDS)·slots] float64, header then numbers; zeros for a rank that
            has sent nothing.
        outputs: K.
        known: the facts about the loss from earlier steps.
        look: look at the kind of loss again.
        dtype: float64 if the numbers of a rank were, else float32: the dtype that one process would use.
    """
    headers = [dict(zip(HEADER, row, strict=True)) for row in blocks[:, : len(HEADER)].tolist()]
    groups: dict[int, list[int]] = {}
    for rank, header in enumerate(headers):
        if header["rows"]:
            groups.setdefault(int(header["group"]), []).append(rank)
    complete = []
    for ranks in groups.values():
        ranks.sort(key=lambda rank: headers[rank]["first"])
        start, same = 0.0, {headers[rank]["rows"] for rank in ranks}
        for rank in ranks:
            start = start + headers[rank]["classes"] if headers[rank]["first"] == start else -1.0
        if start == outputs and len(same) == 1:
            complete.append(ranks)
    if not complete:
        return None
    members = [rank for ranks in complete for rank in ranks]
    look = look or known is None
    kind = known
    if look or kind is None:
        kind = _shown_precision([headers[rank] for rank in members], known, outputs, dtype)
    sums = torch.zeros(len(SUMS), dtype=torch.float64)
    maxima = torch.full((len(MAXIMA),), -torch.inf, dtype=torch.float64)
    absorbed: Counter[int] = Counter()
    for ranks in complete:
        header = headers[ranks[0]]
        rows = int(header["rows"])
        numbers = blocks[ranks, len(HEADER) :][:, : len(FIELDS) * rows].reshape(len(ranks), len(FIELDS), rows)
        values, largest, classes, kind = _whole_rows(numbers, header, outputs, kind, dtype, look=look)
        sums += values
        maxima = torch.maximum(maxima, largest)
        absorbed.update(classes)
    return JoinedRows(sums, maxima, absorbed, kind, len(complete))


def _whole_rows(
    numbers: Tensor,
    header: dict[str, float],
    outputs: int,
    kind: LossKind,
    dtype: torch.dtype,
    *,
    look: bool,
) -> tuple[Tensor, Tensor, list[int], LossKind]:
    """Measure joined rows. ``numbers`` [shards, len(FIELDS), N], shards in the order of their classes."""
    part = dict(zip(FIELDS, numbers.unbind(1), strict=True))  # [shards, N] each
    whole, top, target = _joined(part, kind.scale, dtype)
    batch = round(header["batch_rows"] / header["batches"])
    view, kinds = row_view(
        (whole["signed"], whole["absolute"]), top, target, whole["target_logit"], whole["own"], batch, kind
    )
    sums: dict[str, float] = dict.fromkeys(LOOK_SUMS, float("nan"))
    if look:
        of_live = torch.where(view.live, view.absolute, torch.zeros_like(view.absolute))
        kind, judged = unexplained_rows(view, of_live, kind, outputs)
        names = ("unexplained", "contradicted", "unsure")
        sums |= {name: float(mask.sum()) for name, mask in zip(names, judged, strict=True)}
        soft = shift_invariance.soft_rows(part["negatives"].sum(0), of_live, kind.scale)
        sums["soft"] = float((view.live & soft).sum())
        sums["mean_logit"] = _total(part["logit_sum"].sum(0) / part["logit_count"].sum(0), view.counts)
    sums |= {name: float(mask.sum()) for name, mask in zip(MASKS, kinds, strict=True)}
    sums["counted"] = float(view.counts.sum())
    summed = (("violation", view.violation), ("signed", view.signed), ("absolute", view.absolute))
    sums |= {name: _total(values, view.live) for name, values in summed}
    sums |= _declared(view, declared.OVER_LIVE, view.live)
    sums |= _declared(view, declared.OVER_COUNTED, view.counts)
    median = torch.where(view.counts, view.margin, torch.nan).nanmedian().nan_to_num(0.0)
    sums |= {
        "rows": header["batch_rows"],
        "sampled": header["rows"],
        "margin_median_rows": float(median) * sums["counted"],
        "recomputed": 0.0,
    }
    maxima = {
        "violation_max": torch.where(view.live, view.violation, 0.0).amax(),
        "negative_margin_min": torch.where(view.counts, -view.margin, -torch.inf).amax(),
        "epsilon": kind.eps,
        "logit_scale": torch.ones(()),  # no rank has the logits from which it is recovered
        "mismatch": torch.zeros(()),
        "uneven": torch.zeros(()),
    }
    return (
        torch.tensor([sums[name] for name in SUMS], dtype=torch.float64),
        torch.stack([maxima[name].double() for name in MAXIMA]),
        [int(index) for index in top.winner[kinds.absorbed].tolist()],
        kind,
    )


def _total(values: Tensor, of: Tensor) -> float:
    return float(torch.where(of, values.double(), 0.0).sum())


def _declared(view: RowView, of: dict[str, PerRow], rows: Tensor) -> dict[str, float]:
    """Sum declared functions; NaN for those that need the gradient or the logits of whole rows."""
    known = {name: per_row for name, per_row in of.items() if per_row.from_shards}
    values = zip(known, declared.row_values(view, known), strict=True)
    return dict.fromkeys(of, float("nan")) | {name: _total(value, rows) for name, value in values}


def _joined(
    part: dict[str, Tensor], scale: Tensor, dtype: torch.dtype
) -> tuple[dict[str, Tensor], TopLogits, Tensor]:
    """Join rows: [N] sums and the target's gradient and logit, the largest logits, the target's class."""
    owner = part["largest"].argmax(0)
    lowest, where = part["lowest"].min(0)

    def of(name: str, shard: Tensor) -> Tensor:
        return part[name].gather(0, shard.unsqueeze(0)).squeeze(0)

    owns = torch.arange(len(part["largest"])).unsqueeze(-1) == owner
    largest = of("largest", owner)
    rest = torch.where(owns, part["log_rest"], torch.log1p(part["log_rest"].exp())) + part["largest"]
    # A shard whose classes are all masked with −inf has no competitor.
    rest = torch.where(part["largest"] == -torch.inf, -torch.inf, rest)
    top = TopLogits(
        largest.to(dtype),
        of("winner", owner).long(),
        torch.where(owns, part["runner_up"], part["largest"]).amax(0).to(dtype),
        (rest.logsumexp(0) - largest).to(dtype),
    )
    lowest_class, winner_grad = of("lowest_class", where).long(), of("winner_grad", owner)
    target = margins.target_class(lowest, lowest_class, winner_grad, top.winner, scale)
    won = target == top.winner
    whole = {
        "signed": part["signed"].sum(0),
        "absolute": part["absolute"].sum(0),
        "own": torch.where(won, winner_grad, lowest),
        "target_logit": torch.where(won, largest, of("lowest_logit", where)),
    }
    return {name: values.to(dtype) for name, values in whole.items()}, top, target


def _shown_precision(
    headers: Sequence[dict[str, float]], known: LossKind | None, outputs: int, dtype: torch.dtype
) -> LossKind:
    """Do what :func:`nfi_monitor.measure.loss_kind.shown_precision` does, from the headers of all ranks."""
    own = max(header["eps"] for header in headers)
    eps, half = own, torch.finfo(torch.float16).eps
    nonzero = any(header["nonzero"] for header in headers)
    for narrow, name in zip(_NARROW, HEADER[SHOWN:], strict=False):
        fits = nonzero and not any(header[name] for header in headers)
        if fits and own < torch.finfo(narrow).eps and own <= torch.finfo(torch.float32).eps:
            eps = torch.finfo(narrow).eps
    if not nonzero and known is not None:
        eps = float(known.eps)
    of_gradient = {torch.finfo(one).eps: one for one in (torch.float64, *_NARROW)}[own]
    level = absorption.underflow_level(torch.float16 if eps == half else of_gradient)
    scale = torch.zeros((), dtype=dtype) if known is None else known.scale.to("cpu", dtype)
    floor = zero_sum.floor_of(torch.tensor(eps), dtype, outputs)
    return LossKind(torch.tensor(eps), floor, torch.tensor(level), scale)
