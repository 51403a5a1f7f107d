"""All row quantities of one backward pass, packed into two small vectors.

A micro-batch gives sums and maxima; both merge over micro-batches (and over ranks) by addition and by
maximum, and become means on the host.  One stack and one reduction instead of a dozen 0-d tensors: at
the sizes where a monitor is felt, kernel launches cost more than arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nfi_monitor.measure import absorption, extremes, margins, shift_invariance, zero_sum

MASKS = ("live", "absorbed", "above_floor", "underflowed", "silent", "finite")
"""Rows counted by kind."""
LOOK_SUMS = ("unexplained", "soft", "mean_logit")
"""What changes slowly or tells the kind of loss: NaN in passes that did not look."""
LIVE_SUMS = ("violation", "signed", "absolute", "residual")
"""Summed over live rows."""
COUNTED_SUMS = ("loss", "max_probability")
"""Summed over rows that count: live or underflowed."""
BATCH_SUMS = ("rows", "sampled", "margin_median_rows", "counted")
"""Of the micro-batch; ``margin_median_rows`` is the median margin times ``counted``."""
MAXIMA = ("violation_max", "negative_margin_min")
"""Of the micro-batch, merged by maximum."""

SUMS = MASKS + LOOK_SUMS + LIVE_SUMS + COUNTED_SUMS + BATCH_SUMS


class LossKind(NamedTuple):
    """What the rows have shown of the loss so far, scalar tensors.

    ``eps``: machine epsilon of the precision it is computed in; ``floor``: the violation that rounding may
    cause in it; ``level``: ln of the gradients that underflow in it.  ``scale``: the largest s in
    g = s·(p − y) seen, 0 while no unsure row has shown it.
    """

    eps: Tensor
    floor: Tensor
    level: Tensor
    scale: Tensor


class RowStatistics(NamedTuple):
    """``sums`` [len(SUMS)], ``maxima`` [len(MAXIMA)]; per row [N]: ``counts`` (1.0 for a row that counts:
    live or underflowed), ``winner`` (int64, class of the largest logit) and ``absorbed`` (1.0 or 0.0)."""

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
        loss_kind: what earlier passes learned of the loss.
        look: look at the kind of loss again (half of the work).
    """
    dtype = zero_sum.accumulation_dtype(grad.dtype, logits.dtype)
    if len(grad) == 0:
        return _nothing(dtype, grad.device, loss_kind)
    classes = grad.shape[-1]
    top = margins.top_logits(logits.to(dtype))
    look = look or loss_kind is None
    if look or loss_kind is None:
        loss_kind = shown_precision(grad, loss_kind)

    signed, absolute = zero_sum.row_sums(grad)
    violation = zero_sum.row_violation(signed, absolute)
    lowest, argmin = extremes.smallest(grad)
    finite = torch.isfinite(absolute + top.largest)
    live = (absolute > 0) & finite
    silent = (absolute == 0) & finite
    above = live & (violation > loss_kind.floor)
    underflowed = absorption.underflowed_rows(silent, top.runner_up - top.largest, rows, loss_kind.level)
    counts = live | underflowed

    of_winner = extremes.pick(grad, top.winner)
    target = margins.target_class(lowest, argmin, of_winner, top.winner)
    absorbed = absorption.absorbed_rows(extremes.pick(grad, target), live)
    target_logit = extremes.pick(logits, target).to(dtype)
    loss = margins.row_loss(top, target_logit)
    residual = margins.residual_mass(loss)
    margin = margins.margin(top, target, target_logit)

    # One bad row must not turn the means of all others into NaN: ``where`` drops it, and it is counted.
    zero = torch.zeros((), dtype=dtype, device=grad.device)
    masks = torch.stack([live, absorbed, above, underflowed, silent, finite])
    if look:
        absolute_live = torch.where(live, absolute, zero)
        scale = shift_invariance.gradient_scale(absolute_live, residual, live)
        loss_kind = loss_kind._replace(scale=torch.maximum(scale, loss_kind.scale.to(dtype)))
        told = shift_invariance.gradient_residual(residual, absolute_live, loss_kind.scale)
        unexplained = live & shift_invariance.unexplained(
            violation, told, top.largest, loss_kind.eps, classes
        )
        soft = live & (shift_invariance.negatives(grad) > 1)
        logit_sum, unmasked = shift_invariance.unmasked(logits, dtype)
        mean_logit = torch.where(counts, logit_sum / unmasked, zero)
        seldom = torch.stack([unexplained.to(dtype), soft.to(dtype), mean_logit]).sum(-1)
    else:
        seldom = torch.full((len(LOOK_SUMS),), torch.nan, dtype=dtype, device=grad.device)
    of_live = torch.stack([violation, signed, absolute, residual])
    of_counted = torch.stack([loss, torch.sigmoid(-top.log_rest)])
    counted = counts.to(dtype)
    total = counted.sum()
    median = torch.where(counts, margin, torch.nan).nanmedian().nan_to_num(0.0)
    sums = torch.cat(
        [
            masks.sum(-1, dtype=dtype),
            seldom,
            torch.where(live, of_live, zero).sum(-1),
            torch.where(counts, of_counted, zero).sum(-1),
            torch.stack(
                [
                    torch.full_like(total, float(rows)),
                    torch.full_like(total, float(len(grad))),
                    median * total,
                    total,
                ]
            ),
        ]
    )
    maxima = torch.stack(
        [
            torch.where(live, violation, zero).amax(),
            torch.where(counts, -margin, -torch.inf).amax(),
        ]
    )
    return RowStatistics(sums, maxima, counted, top.winner, absorbed.to(dtype), loss_kind)


def single_output_statistics(grad: Tensor, logits: Tensor, rows: int) -> RowStatistics:
    """The little that a head with one output shows: no classes, hence no zero-sum and no margin.

    ``grad`` and ``logits`` [N, 1].  Only live, silent and finite rows and the mean logit are filled;
    every finite row counts.
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
    """Host side: merged sums and maxima → quantities by name. Quantities without a row are left out."""
    s = dict(zip(SUMS, sums, strict=True))
    if s["sampled"] == 0:
        return {}
    values = {
        "live_fraction": s["live"] / s["sampled"],
        "non_finite_rows": s["sampled"] - s["finite"],
    }
    if s["counted"] and not math.isnan(s["mean_logit"]):
        values["mean_logit"] = s["mean_logit"] / s["counted"]
    if single_output:
        return values
    values["ignored_fraction"] = (s["silent"] - s["underflowed"]) / s["sampled"]
    if s["counted"]:
        values["underflowed_fraction"] = s["underflowed"] / s["counted"]
        values["head_loss"] = s["loss"] / s["counted"]
        values["max_probability"] = s["max_probability"] / s["counted"]
        values["margin_median"] = s["margin_median_rows"] / s["counted"]
        values["margin_min"] = -maxima[MAXIMA.index("negative_margin_min")]
    if s["live"]:
        values["zero_sum_violation"] = s["violation"] / s["live"]
        values["zero_sum_violation_max"] = maxima[MAXIMA.index("violation_max")]
        values["zero_sum_violation_share"] = s["above_floor"] / s["live"]
        values["zero_sum_violation_batch"] = (
            min(abs(s["signed"]) / s["absolute"], 1.0) if s["absolute"] > 0 else math.nan
        )
        values["absorbed_fraction"] = s["absorbed"] / s["live"]
        values["partially_absorbed_fraction"] = (s["above_floor"] - s["absorbed"]) / s["live"]
        if not math.isnan(s["unexplained"]):
            values["unexplained_violation_fraction"] = s["unexplained"] / s["live"]
            values["soft_target_fraction"] = s["soft"] / s["live"]
        values["residual_mass"] = s["residual"] / s["live"]
    return values


def shown_precision(grad: Tensor, known: LossKind | None = None) -> LossKind:
    """The precision the gradient was computed in, which may be below its dtype's. ``grad`` [N, K].

    A float32 gradient all of whose entries are bfloat16 (float16) numbers comes from a loss in that
    precision.  A gradient of zeros shows nothing: what was ``known`` stands.
    """
    dtype = zero_sum.accumulation_dtype(grad.dtype)
    finite = absorption.finite_entries(grad)
    nonzero = finite.abs().amax() > 0
    eps = torch.full((), torch.finfo(grad.dtype).eps, device=grad.device)
    for narrow in _NARROWER.get(grad.dtype, ()):
        fits = nonzero & ~absorption.wider(finite, narrow)
        eps = torch.where(fits, torch.finfo(narrow).eps, eps)
    if known is not None:
        eps = torch.where(nonzero, eps, known.eps)
    half = torch.finfo(torch.float16).eps
    level = torch.where(
        eps == half, absorption.underflow_level(torch.float16), absorption.underflow_level(grad.dtype)
    )
    scale = torch.zeros((), dtype=dtype, device=grad.device) if known is None else known.scale
    return LossKind(eps, zero_sum.floor_of(eps, dtype, grad.shape[-1]), level, scale)


_NARROWER = {
    torch.float64: (torch.float32, torch.float16, torch.bfloat16),
    torch.float32: (torch.float16, torch.bfloat16),
}


def _nothing(dtype: torch.dtype, device: torch.device, loss_kind: LossKind | None) -> RowStatistics:
    sums = torch.zeros(len(SUMS), dtype=dtype, device=device)
    maxima = torch.full((len(MAXIMA),), -torch.inf, dtype=dtype, device=device)
    return RowStatistics(sums, maxima, sums[:0], None, None, loss_kind)
