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

MASKS = ("live", "absorbed", "above_floor", "underflowed", "silent", "finite", "unexplained", "soft")
"""Rows counted by kind."""
LIVE_SUMS = ("violation", "signed", "absolute", "residual")
"""Summed over live rows."""
COUNTED_SUMS = ("loss", "max_probability", "mean_logit")
"""Summed over rows that count: live or underflowed."""
BATCH_SUMS = ("rows", "sampled", "margin_median_rows", "counted")
"""Of the micro-batch; ``margin_median_rows`` is the median margin times ``counted``."""
MAXIMA = ("violation_max", "negative_margin_min", "eps", "gradient_scale")
"""Of the micro-batch, merged by maximum; ``eps`` is the machine epsilon the gradient shows,
``gradient_scale`` the s in g = s·(p − y)."""

SUMS = MASKS + LIVE_SUMS + COUNTED_SUMS + BATCH_SUMS


class RowStatistics(NamedTuple):
    """``sums`` [len(SUMS)], ``maxima`` [len(MAXIMA)]; per row [N]: ``counts`` (1.0 for a row that counts:
    live or underflowed), ``winner`` (int64, class of the largest logit) and ``absorbed`` (1.0 or 0.0)."""

    sums: Tensor
    maxima: Tensor
    counts: Tensor
    winner: Tensor | None
    absorbed: Tensor | None


def row_statistics(
    grad: Tensor, logits: Tensor, rows: int, eps: Tensor | None = None, scale: Tensor | None = None
) -> RowStatistics:
    """Measure rows of a head with at least two outputs.

    Args:
        grad: ∂L/∂z [N, K] of the (sampled) rows, in the run's own dtype.
        logits: z [N, K] of the same rows.
        rows: rows of the whole batch, which a mean reduction divides by.
        eps: machine epsilon of the precision the gradient was computed in, if already known
            (:func:`shown_eps`); scalar tensor.
        scale: largest gradient scale seen in earlier passes; scalar tensor.
    """
    dtype = zero_sum.accumulation_dtype(grad.dtype, logits.dtype)
    top = margins.top_logits(logits.to(dtype))
    if eps is None:
        eps = shown_eps(grad)

    signed, absolute = zero_sum.row_sums(grad)
    violation = zero_sum.row_violation(signed, absolute)
    lowest, argmin = grad.min(-1)
    finite = torch.isfinite(absolute + top.largest)
    live = (absolute > 0) & finite
    silent = (absolute == 0) & finite
    absorbed = absorption.absorbed_rows(lowest, live)
    above = live & (violation > zero_sum.rounding_floor(grad.dtype, grad.shape[-1]))
    underflowed = absorption.underflowed_rows(silent, top.log_rest, rows, grad.dtype)
    counts = live | underflowed

    target = margins.target_class(lowest, argmin, top.winner)
    target_logit = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1).to(dtype)
    loss = margins.row_loss(top, target_logit)
    residual = margins.residual_mass(loss)
    soft = live & ((grad < 0).sum(-1) > 1)
    absolute_live = torch.where(live, absolute, torch.zeros((), dtype=dtype, device=grad.device))
    shown_scale = shift_invariance.gradient_scale(absolute_live, residual, live)
    if scale is not None:
        shown_scale = torch.maximum(shown_scale, scale.to(dtype))
    told = shift_invariance.gradient_residual(residual, absolute_live, soft, shown_scale)
    unexplained = live & shift_invariance.unexplained(violation, told, top.largest, eps)
    margin = margins.margin(top, target, target_logit)

    # One bad row must not turn the means of all others into NaN: ``where`` drops it, and it is counted.
    zero = torch.zeros((), dtype=dtype, device=grad.device)
    masks = torch.stack([live, absorbed, above, underflowed, silent, finite, unexplained, soft])
    of_live = torch.stack([violation, signed, absolute, residual])
    of_counted = torch.stack([loss, torch.sigmoid(-top.log_rest), logits.mean(-1, dtype=dtype)])
    counted = counts.to(dtype)
    total = counted.sum()
    median = torch.where(counts, margin, torch.nan).nanmedian().nan_to_num(0.0)
    sums = torch.cat(
        [
            masks.sum(-1, dtype=dtype),
            torch.where(live, of_live, zero).sum(-1),
            torch.where(counts, of_counted, zero).sum(-1),
            torch.tensor([float(rows), float(len(grad))], dtype=dtype).to(grad.device, non_blocking=True),
            torch.stack([median * total, total]),
        ]
    )
    maxima = torch.stack(
        [
            torch.where(live, violation, zero).amax(),
            torch.where(counts, -margin, -torch.inf).amax(),
            eps.to(dtype),
            shown_scale,
        ]
    )
    return RowStatistics(sums, maxima, counted, top.winner, absorbed.to(dtype))


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
    return RowStatistics(sums, maxima, counted, None, None)


def finish(sums: Sequence[float], maxima: Sequence[float], *, single_output: bool) -> dict[str, float]:
    """Host side: merged sums and maxima → quantities by name. Quantities without a row are left out."""
    s = dict(zip(SUMS, sums, strict=True))
    if s["sampled"] == 0:
        return {}
    values = {
        "live_fraction": s["live"] / s["sampled"],
        "non_finite_rows": s["sampled"] - s["finite"],
    }
    if s["counted"]:
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
        values["unexplained_violation_fraction"] = s["unexplained"] / s["live"]
        values["soft_target_fraction"] = s["soft"] / s["live"]
        values["residual_mass"] = s["residual"] / s["live"]
    return values


def shown_eps(grad: Tensor) -> Tensor:
    """Machine epsilon of the precision the gradient was computed in, which may be below its dtype's.

    ``grad`` [N, K] → scalar tensor.  A float32 gradient all of whose entries are bfloat16 (float16)
    numbers comes from a loss in that precision.
    """
    eps = torch.full((), torch.finfo(grad.dtype).eps, device=grad.device)
    if grad.dtype is torch.float32:
        for narrow in (torch.float16, torch.bfloat16):
            eps = torch.where(absorption.fits(grad, narrow), torch.finfo(narrow).eps, eps)
    return eps
