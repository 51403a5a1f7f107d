"""Measure the rows of one backward pass, packed into two small vectors.

A micro-batch gives sums and maxima.  Micro-batches and ranks add the sums and take the largest of the maxima.
The host turns them into means.  One stack and one reduction replace a dozen 0-d tensors: for small models,
launching a kernel costs more than its arithmetic.

Functions of a row that a declaration names (:class:`nfi_monitor.quantities.PerRow`) are summed with the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nfi_monitor.measure import (
    absorption,
    cross_entropy_fit,
    declared,
    extremes,
    margins,
    shift_invariance,
    zero_sum,
)
from nfi_monitor.measure.logit_scale import logit_scale
from nfi_monitor.measure.loss_kind import LossKind as LossKind
from nfi_monitor.measure.loss_kind import shown_precision as shown_precision
from nfi_monitor.measure.views import RowView, TopLogits
from nfi_monitor.quantities import PerRow


class RowKinds(NamedTuple):
    """The ``MASKS``, bool [N] each."""

    live: Tensor
    absorbed: Tensor
    above_floor: Tensor
    underflowed: Tensor
    silent: Tensor
    finite: Tensor


MASKS = RowKinds._fields
"""Rows counted by kind."""
LOOK_SUMS = ("unexplained", "contradicted", "unsure", "soft", "mean_logit")
"""Sums that change slowly or show the kind of loss: NaN in passes that did not look."""
LIVE_SUMS = ("violation", "signed", "absolute", *declared.OVER_LIVE)
"""Sums over live rows. The violation is no declared function: its rows also give a share and a maximum."""
COUNTED_SUMS = tuple(declared.OVER_COUNTED)
"""Sums over rows that count: live or underflowed."""
BATCH_SUMS = ("rows", "sampled", "margin_median_rows", "counted", "recomputed")
"""Numbers of the micro-batch; ``margin_median_rows`` is the median margin times ``counted``."""
MAXIMA = ("violation_max", "negative_margin_min", "epsilon", "logit_scale", "mismatch", "uneven")
"""Numbers of the micro-batch of which the largest counts."""

MISMATCH = 0.1
"""Share of rows from which on the gradient is none of a cross-entropy, or the rows weigh differently."""
OTHER_LOSS = 0.5
"""Share of such rows from which on the rows have no correct class that could be absorbed (preferences)."""
ZERO_SUM = 0.05
"""Largest violation of a row that can show a factor between the head's logits and those of the loss."""

SUMS = MASKS + LOOK_SUMS + LIVE_SUMS + COUNTED_SUMS + BATCH_SUMS


class RowStatistics(NamedTuple):
    """The statistics of one backward pass: ``sums`` [len(SUMS)] and ``maxima`` [len(MAXIMA)].

    Per row [N]: ``counts`` (1.0 for a row that counts: live or underflowed), ``winner`` (int64, class of the
    largest logit) and ``absorbed`` (1.0 or 0.0).
    """

    sums: Tensor
    maxima: Tensor
    counts: Tensor
    winner: Tensor | None
    absorbed: Tensor | None
    loss_kind: LossKind | None


def row_statistics(
    grad: Tensor, logits: Tensor, rows: int, loss_kind: LossKind | None = None, *, look: bool = True
) -> RowStatistics:
    """Measure rows of a head with at least two outputs.

    Args:
        grad: ∂L/∂z [N, K] of the (sampled) rows, in the run's own dtype.
        logits: z [N, K] of the same rows.
        rows: rows of the whole batch, which a mean reduction divides by.
        loss_kind: the facts about the loss from earlier passes.
        look: look at the kind of loss again. This is half of the work.
    """
    dtype = zero_sum.accumulation_dtype(grad.dtype, logits.dtype)
    if len(grad) == 0:
        return _nothing(dtype, grad.device, loss_kind)
    look = look or loss_kind is None
    if look or loss_kind is None:
        loss_kind = shown_precision(grad, loss_kind)
    if look:
        loss_kind = _with_slope(grad, logits, loss_kind)
    view, kinds = _view(grad, logits, rows, loss_kind)
    seldom = None
    if look:
        loss_kind, seldom = _look(view, loss_kind, torch.zeros((), dtype=dtype, device=grad.device))
    return sum_rows(view, kinds, loss_kind, seldom, rows)


def sum_rows(
    view: RowView, kinds: RowKinds, loss_kind: LossKind, seldom: Tensor | None, rows: int
) -> RowStatistics:
    """Return the statistics of rows whose kinds are known. ``seldom``: the ``LOOK_SUMS``; None: did not look.

    ``rows``: of the whole batch.
    """
    dtype, device = view.absolute.dtype, view.absolute.device
    # A row with NaN must not turn the means of all others into NaN: ``where`` drops it. It is counted apart.
    zero = torch.zeros((), dtype=dtype, device=device)
    masks = torch.stack(kinds)
    if seldom is None:
        seldom = torch.full((len(LOOK_SUMS),), torch.nan, dtype=dtype, device=device)
    of_live = [view.violation, view.signed, view.absolute, *declared.row_values(view, declared.OVER_LIVE)]
    of_counted = declared.row_values(view, declared.OVER_COUNTED)
    counted = view.counts.to(dtype)
    total = counted.sum()
    median = torch.where(view.counts, view.margin, torch.nan).nanmedian().nan_to_num(0.0)
    of_batch = [torch.full_like(total, float(n)) for n in (rows, len(view.absolute))]
    sums = torch.cat(
        [
            masks.sum(-1, dtype=dtype),
            seldom,
            torch.where(view.live, torch.stack(of_live), zero).sum(-1),
            torch.where(view.counts, torch.stack(of_counted), zero).sum(-1),
            torch.stack([*of_batch, median * total, total, torch.zeros_like(total)]),
        ]
    )
    maxima = torch.stack(
        [
            torch.where(view.live, view.violation, zero).amax(),
            torch.where(view.counts, -view.margin, -torch.inf).amax(),
            loss_kind.eps.to(dtype),
            loss_kind.slope.to(dtype),
            loss_kind.mismatch.to(dtype),
            loss_kind.uneven.to(dtype),
        ]
    )
    return RowStatistics(sums, maxima, counted, view.top.winner, kinds.absorbed.to(dtype), loss_kind)


def _view(grad: Tensor, logits: Tensor, rows: int, kind: LossKind) -> tuple[RowView, RowKinds]:
    dtype = zero_sum.accumulation_dtype(grad.dtype, logits.dtype)
    slope = kind.slope.to(dtype)
    top = margins.top_logits(logits.to(dtype) * slope)
    target = _targets(grad, top.winner, kind)
    return row_view(
        zero_sum.row_sums(grad),
        top,
        target,
        extremes.pick(logits, target).to(dtype) * slope,
        extremes.pick(grad, target),
        rows,
        kind,
        classes=(grad, logits),
    )


def _targets(grad: Tensor, winner: Tensor, kind: LossKind) -> Tensor:
    """Return the correct class of each row, from the gradient [N, K] and the largest logit's class [N]."""
    lowest, argmin = extremes.smallest(grad)
    return margins.target_class(lowest, argmin, extremes.pick(grad, winner), winner, kind.scale)


def _with_slope(grad: Tensor, logits: Tensor, kind: LossKind) -> LossKind:
    """Return the facts about the loss with the factor between the head's logits and those of the loss."""
    signed, absolute = zero_sum.row_sums(grad)
    largest, winner = extremes.largest(logits)
    live = (absolute > 0) & torch.isfinite(absolute + largest)
    live &= zero_sum.row_violation(signed, absolute) < ZERO_SUM
    known = kind.slope.to(absolute.dtype)
    left_out = torch.stack([_targets(grad, winner, kind), winner], -1)
    return kind._replace(slope=logit_scale(grad, logits, left_out, live, kind.eps, known))


def row_view(
    sums: tuple[Tensor, Tensor],
    top: TopLogits,
    target: Tensor,
    target_logit: Tensor,
    own: Tensor,
    rows: int,
    kind: LossKind,
    *,
    classes: tuple[Tensor, Tensor] | None = None,
) -> tuple[RowView, RowKinds]:
    """Find the kind of each row, and what declared functions may read of it.

    Args, all per row [N]:
        sums: Σ_k g_k and Σ_k |g_k|.
        top: the largest logits.
        target: the correct class, with its logit ``target_logit`` and its gradient ``own``.
        rows: rows of the whole batch.
        kind: the facts about the loss so far.
        classes: gradient and logits [N, K], where one process holds all of them.
    """
    signed, absolute = sums
    violation = zero_sum.row_violation(signed, absolute)
    finite = torch.isfinite(absolute + top.largest)
    live = (absolute > 0) & finite
    silent = (absolute == 0) & finite
    above = live & (violation > kind.floor)
    underflowed = absorption.underflowed_rows(
        silent, top.runner_up - top.largest, rows, kind.level, kind.scale
    )
    absorbed = absorption.absorbed_rows(own, live)
    loss = margins.row_loss(top, target_logit)
    view = RowView(
        top,
        target,
        target_logit,
        signed,
        absolute,
        violation,
        loss,
        residual=margins.residual_mass(loss),
        margin=margins.margin(top, target, target_logit),
        live=live,
        counts=live | underflowed,
        classes=classes,
    )
    return view, RowKinds(live, absorbed, above, underflowed, silent, finite)


def _look(view: RowView, kind: LossKind, zero: Tensor) -> tuple[LossKind, Tensor]:
    """Check the kind of loss. Returns the facts about it so far, and the ``LOOK_SUMS``."""
    dtype = zero.dtype
    absolute_live = torch.where(view.live, view.absolute, zero)
    top = margins.top_logits(view.logits.to(dtype))  # without the factor that follows the head
    own = extremes.pick(view.logits, view.target).to(dtype)
    of_head = margins.residual_mass(margins.row_loss(top, own))
    kind, judged = unexplained_rows(view, absolute_live, kind, view.grad.shape[-1], of_head)
    other, uneven = cross_entropy_fit.mismatch(
        view.grad,
        view.logits.to(dtype) * kind.slope.to(dtype),
        view.target,
        view.residual,
        view.live & (absolute_live > 2.0 * shift_invariance.VISIBLE * kind.scale),
        kind.level,
        (kind.mismatch.to(dtype), kind.uneven.to(dtype)),
    )
    kind = kind._replace(mismatch=other, uneven=uneven)
    negative = shift_invariance.negatives(view.grad)
    soft = view.live & shift_invariance.soft_rows(negative, absolute_live, kind.scale)
    logit_sum, unmasked = shift_invariance.unmasked(view.logits, dtype)
    mean_logit = torch.where(view.counts, logit_sum / unmasked * kind.slope.to(dtype), zero)
    return kind, torch.stack([*(mask.to(dtype) for mask in (*judged, soft)), mean_logit]).sum(-1)


def unexplained_rows(
    view: RowView, absolute_live: Tensor, kind: LossKind, classes: int, of_head: Tensor | None = None
) -> tuple[LossKind, tuple[Tensor, Tensor, Tensor]]:
    """Find the rows that show the kind of loss.

    ``absolute_live``: Σ_k |g_k| of live rows, 0 of the others, [N].  ``of_head``: ε [N] by the head's own
    logits, where those of the loss are multiples of them.  Returns ``kind`` with the scale of the
    gradients as these rows show it, and three masks of live rows, bool [N]: those whose violation rounding
    cannot explain, those whose gradient contradicts their logits, and those unsure enough to tell.
    """
    scale = shift_invariance.gradient_scale(absolute_live, view.residual, view.live)
    kind = kind._replace(scale=torch.maximum(scale, kind.scale.to(absolute_live.dtype)))
    residual = shift_invariance.gradient_residual(view.residual, absolute_live, kind.scale)
    strange = shift_invariance.unexplained(view.violation, residual, view.top.largest, kind.eps, classes)
    of_head = view.residual if of_head is None else of_head
    contradicted = shift_invariance.contradicted(of_head, absolute_live, kind.scale, kind.eps)
    unsure = residual > shift_invariance.UNSURE
    return kind, (view.live & strange, view.live & contradicted, view.live & unsure)


def corrected(
    statistics: RowStatistics, normalized: bool, rows: int, recomputed: Tensor | None
) -> RowStatistics:
    """Return the statistics without what the rows do not show.

    Args:
        statistics: of the rows as they were given.
        normalized: whether the logits are log-probabilities, which do not show the mean logit.
        rows: number of these rows.
        recomputed: for recomputed rows, whether they are the run's, bool, 0-d. If not, none of them counts.
    """
    if not normalized and recomputed is None:
        return statistics
    sums, zero = statistics.sums.clone(), torch.zeros_like(statistics.sums[0])
    if normalized:
        sums[SUMS.index("mean_logit")] = torch.nan
    if recomputed is None:
        return statistics._replace(sums=sums)
    sums[SUMS.index("recomputed")] = rows
    return statistics._replace(
        sums=torch.where(recomputed, sums, zero),
        maxima=torch.where(recomputed, statistics.maxima, -torch.inf),
        counts=torch.where(recomputed, statistics.counts, zero),
    )


def single_output_statistics(grad: Tensor, logits: Tensor, rows: int) -> RowStatistics:
    """Measure rows of a head with one output. Without classes there is no zero-sum and no margin.

    ``grad`` and ``logits`` [N, 1].  Only live, silent and finite rows and the mean logit are filled.  Every
    finite row counts.
    """
    dtype = zero_sum.accumulation_dtype(grad.dtype, logits.dtype)
    g, z = grad.reshape(-1).to(dtype), logits.reshape(-1).to(dtype)
    finite = torch.isfinite(g) & torch.isfinite(z)
    counted = finite.to(dtype)
    live = (finite & (g != 0)).sum()
    total = counted.sum()
    filled = {
        "live": live,
        "silent": total - live,
        "finite": total,
        "counted": total,
        "mean_logit": torch.where(finite, z, torch.zeros_like(z)).sum(),
        "rows": torch.full_like(total, float(rows)),
        "sampled": torch.full_like(total, float(len(g))),
    }
    nothing = torch.zeros_like(total)
    sums = torch.stack([filled.get(name, nothing).to(dtype) for name in SUMS])
    maxima = torch.full((len(MAXIMA),), -torch.inf, dtype=dtype, device=g.device)
    return RowStatistics(sums, maxima, counted, None, None, None)


def finish(sums: Sequence[float], maxima: Sequence[float], *, single_output: bool) -> dict[str, float]:
    """Turn merged sums and maxima into quantities by name, on the host, without those that no row shows."""
    s, most = dict(zip(SUMS, sums, strict=True)), dict(zip(MAXIMA, maxima, strict=True))
    if s["sampled"] == 0:
        return {}
    values = {
        "live_fraction": s["live"] / s["sampled"],
        "non_finite_rows": s["sampled"] - s["finite"],
    }
    if s["recomputed"]:
        values["recomputed_fraction"] = s["recomputed"] / s["sampled"]
    if s["counted"] and not math.isnan(s["mean_logit"]):
        values["mean_logit"] = s["mean_logit"] / s["counted"]
    if single_output:
        return values
    values["ignored_fraction"] = (s["silent"] - s["underflowed"]) / s["sampled"]
    if s["counted"]:
        values["underflowed_fraction"] = s["underflowed"] / s["counted"]
        values |= _means(s, declared.OVER_COUNTED, s["counted"])
        values["margin_median"] = s["margin_median_rows"] / s["counted"]
        values["loss_epsilon"] = most["epsilon"]
        if most["logit_scale"] != 1.0:
            values["logit_scale"] = most["logit_scale"]
        for name in ("mismatch", "uneven"):
            if most[name] > MISMATCH:
                values[f"{name}_fraction"] = most[name]
        values["margin_min"] = -most["negative_margin_min"]
    if s["live"]:
        values["zero_sum_violation"] = s["violation"] / s["live"]
        values["zero_sum_violation_max"] = most["violation_max"]
        values["zero_sum_violation_share"] = s["above_floor"] / s["live"]
        values["zero_sum_violation_batch"] = (
            min(abs(s["signed"]) / s["absolute"], 1.0) if s["absolute"] > 0 else math.nan
        )
        if most["mismatch"] <= OTHER_LOSS:  # a row of a preference has no correct class
            values["absorbed_fraction"] = s["absorbed"] / s["live"]
            values["partially_absorbed_fraction"] = max(s["above_floor"] - s["absorbed"], 0.0) / s["live"]
        if not math.isnan(s["unexplained"]):
            values["unexplained_violation_fraction"] = s["unexplained"] / s["live"]
            values["unsure_fraction"] = s["unsure"] / s["live"]
            values["contradicted_fraction"] = s["contradicted"] / s["live"]
            values["soft_target_fraction"] = s["soft"] / s["live"]
        values |= _means(s, declared.OVER_LIVE, s["live"])
    return values


def _means(sums: dict[str, float], of: dict[str, PerRow], rows: float) -> dict[str, float]:
    """Return means of declared functions, without those whose sums are NaN: no rank had whole rows."""
    means = {name: sums[name] / rows for name in of}
    return {name: mean for name, mean in means.items() if of[name].from_shards or not math.isnan(mean)}


def _nothing(dtype: torch.dtype, device: torch.device, loss_kind: LossKind | None) -> RowStatistics:
    sums = torch.zeros(len(SUMS), dtype=dtype, device=device)
    maxima = torch.full((len(MAXIMA),), -torch.inf, dtype=dtype, device=device)
    return RowStatistics(sums, maxima, sums[:0], None, None, loss_kind)
