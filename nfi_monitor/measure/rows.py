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

from nfi_monitor.measure import absorption, margins, shift_invariance, zero_sum

ROW_SUMS = (
    "live", "absorbed", "partial", "above_floor", "underflowed", "ignored", "non_finite",
    "unexplained", "soft", "violation", "signed", "absolute", "residual", "loss", "max_probability",
    "mean_logit",
)  # fmt: skip
"""Per-row columns, summed over rows."""
BATCH_SUMS = ("rows", "margin_median_rows", "counted")
"""Per-micro-batch scalars, summed; ``margin_median_rows`` is the median margin times ``counted``."""
MAXIMA = ("violation_max", "negative_margin_min", "eps")
"""Per-micro-batch scalars, merged by maximum; ``eps`` is the machine epsilon the gradient shows."""

SUMS = ROW_SUMS + BATCH_SUMS


class RowStatistics(NamedTuple):
    """``sums`` [len(SUMS)], ``maxima`` [len(MAXIMA)]; per row [N]: ``counts`` (1.0 for a row that counts:
    live or underflowed), ``winner`` (int64, class of the largest logit) and ``absorbed`` (1.0 or 0.0)."""

    sums: Tensor
    maxima: Tensor
    counts: Tensor
    winner: Tensor | None
    absorbed: Tensor | None


def row_statistics(grad: Tensor, logits: Tensor, rows: int) -> RowStatistics:
    """Measure rows of a head with at least two outputs.

    Args:
        grad: ∂L/∂z [N, K] of the (sampled) rows, in the run's own dtype.
        logits: z [N, K] of the same rows.
        rows: rows of the whole batch, which a mean reduction divides by.
    """
    dtype = zero_sum.accumulation_dtype(grad.dtype, logits.dtype)
    classes = grad.shape[-1]
    top = margins.top_logits(logits.to(dtype))

    signed, absolute = (part.to(dtype) for part in zero_sum.row_sums(grad))
    violation = zero_sum.row_violation(signed, absolute)
    lowest, argmin = grad.min(-1)
    highest = grad.amax(-1)

    finite = torch.isfinite(absolute) & torch.isfinite(top.largest)
    live = (absolute > 0) & finite
    silent = (absolute == 0) & finite
    absorbed = absorption.absorbed_rows(lowest, highest) & live
    floor = zero_sum.rounding_floor(grad.dtype, classes)
    above = live & (violation > floor)
    underflowed = absorption.underflowed_rows(silent, top.log_rest, rows, grad.dtype)
    counts = live | underflowed

    target = margins.target_class(lowest, argmin, top.winner)
    target_logit = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1).to(dtype)
    loss = margins.row_loss(top, target_logit)
    residual = margins.residual_mass(loss)
    eps = _effective_eps(grad)
    unexplained = live & shift_invariance.unexplained(violation, residual, top.largest, eps)
    soft = live & ((grad < 0).sum(-1) > 1)

    margin = margins.margin(top, target, target_logit)
    counted = counts.to(dtype)
    live_f = live.to(dtype)
    columns = torch.stack(
        [
            live_f,
            absorbed.to(dtype),
            (above & ~absorbed).to(dtype),
            above.to(dtype),
            underflowed.to(dtype),
            (silent & ~underflowed).to(dtype),
            (~finite).to(dtype),
            unexplained.to(dtype),
            soft.to(dtype),
            violation * live_f,
            signed,
            absolute,
            residual * live_f,
            loss * counted,
            torch.sigmoid(-top.log_rest) * counted,
            logits.mean(-1, dtype=dtype) * counted,
        ]
    )
    # One bad row must not turn the means of all others into NaN; it is counted instead.  The count
    # itself is the seventh column and must survive the mask.
    columns = torch.where(finite, columns, _non_finite_column(columns))
    missing = torch.full_like(margin, torch.nan)
    median = torch.where(counts, margin, missing).nanmedian().nan_to_num(0.0)
    total = counted.sum()
    batch = torch.stack([torch.full_like(total, float(rows)), median * total, total])
    maxima = torch.stack(
        [
            (violation * live_f).amax(),
            torch.where(counts, -margin, torch.full_like(margin, -torch.inf)).amax(),
            eps.to(dtype),
        ]
    )
    return RowStatistics(torch.cat([columns.sum(-1), batch]), maxima, counted, top.winner, absorbed.to(dtype))


def single_output_statistics(grad: Tensor, logits: Tensor, rows: int) -> RowStatistics:
    """The little that a head with one output shows: no classes, hence no zero-sum and no margin.

    ``grad`` and ``logits`` [N, 1].  Only live, silent and non-finite rows and the mean logit are
    filled; every finite row counts.
    """
    dtype = zero_sum.accumulation_dtype(grad.dtype, logits.dtype)
    g, z = grad.reshape(-1).to(dtype), logits.reshape(-1).to(dtype)
    finite = torch.isfinite(g) & torch.isfinite(z)
    live = finite & (g != 0)
    sums = torch.zeros(len(SUMS), dtype=dtype, device=g.device)
    index = {name: position for position, name in enumerate(SUMS)}
    sums[index["live"]] = live.sum()
    sums[index["ignored"]] = (finite & ~live).sum()
    sums[index["non_finite"]] = (~finite).sum()
    sums[index["mean_logit"]] = torch.where(finite, z, torch.zeros_like(z)).sum()
    sums[index["counted"]] = finite.sum()
    sums[index["rows"]] = float(rows)
    maxima = torch.full((len(MAXIMA),), -torch.inf, dtype=dtype, device=g.device)
    return RowStatistics(sums, maxima, finite.to(dtype), None, None)


def finish(sums: Sequence[float], maxima: Sequence[float], *, single_output: bool) -> dict[str, float]:
    """Host side: merged sums and maxima → quantities by name. Quantities without a row are left out."""
    s = dict(zip(SUMS, sums, strict=True))
    sampled = s["live"] + s["underflowed"] + s["ignored"] + s["non_finite"]
    if sampled == 0:
        return {}
    values = {"live_fraction": s["live"] / sampled, "non_finite_rows": s["non_finite"]}
    if s["counted"]:
        values["mean_logit"] = s["mean_logit"] / s["counted"]
    if single_output:
        return values
    values["ignored_fraction"] = s["ignored"] / sampled
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
        values["partially_absorbed_fraction"] = s["partial"] / s["live"]
        values["unexplained_violation_fraction"] = s["unexplained"] / s["live"]
        values["soft_target_fraction"] = s["soft"] / s["live"]
        values["residual_mass"] = s["residual"] / s["live"]
    return values


def _effective_eps(grad: Tensor) -> Tensor:
    """Machine epsilon of the precision the gradient was computed in, which may be below its dtype's."""
    eps = torch.full((), torch.finfo(grad.dtype).eps, device=grad.device)
    if grad.dtype is torch.float32:
        for narrow in (torch.float16, torch.bfloat16):
            eps = torch.where(absorption.fits(grad, narrow), torch.finfo(narrow).eps, eps)
    return eps


def _non_finite_column(columns: Tensor) -> Tensor:
    zeros = torch.zeros_like(columns)
    position = ROW_SUMS.index("non_finite")
    zeros[position] = columns[position]
    return zeros
