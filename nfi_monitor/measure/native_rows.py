"""Measure rows with the C library where it can, else with torch: the same arguments, the same results.

Masks, counts and classes are those of :func:`nfi_monitor.measure.rows.row_statistics`.  Sums differ by
rounding: the library adds in float64.  A mask that compares such a sum with a level may differ in a row that
is that close to it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from nfi_monitor.measure import (
    absorption,
    cross_entropy_fit,
    logit_scale,
    margins,
    shift_invariance,
    zero_sum,
)
from nfi_monitor.measure import rows as eager
from nfi_monitor.measure.loss_kind import LossKind
from nfi_monitor.measure.rows import MAXIMA, SUMS, RowStatistics
from nfi_monitor.native import library
from nfi_monitor.native.calls import RowsCall

_SUMS = (
    "live", "absorbed", "above_floor", "underflowed", "silent", "finite",
    "unexplained", "contradicted", "unsure", "soft", "mean_logit",
    "violation", "signed", "absolute", "residual_mass",
    "head_loss", "max_probability",
    "rows", "sampled", "margin_median_rows", "counted", "recomputed",
)  # fmt: skip
_MAXIMA = ("violation_max", "negative_margin_min", "epsilon", "logit_scale", "mismatch", "uneven")
"""The results of rows.c, in its order."""
THRESHOLDS_OF_ROWS = (
    eager.ZERO_SUM,
    logit_scale.SURE,
    logit_scale.FEWEST,
    logit_scale.SAME,
    logit_scale.STRAIGHT,
    logit_scale.NEAR,
    logit_scale.SPREAD,
    logit_scale.STEEP,
    shift_invariance.SAFETY,
    shift_invariance.UNSURE,
    shift_invariance.CLEARLY,
    shift_invariance.RESOLVED,
    shift_invariance.MISMATCH,
    margins.MISCLASSIFIED,
    shift_invariance.VISIBLE,
    cross_entropy_fit.TURNED,
    cross_entropy_fit.LIGHTER,
    cross_entropy_fit.RESOLVED,
)
_NARROWER = {  # bits that nfi_shown returns, the narrowest last
    torch.float64: ((1, torch.float32), (2, torch.float16), (4, torch.bfloat16)),
    torch.float32: ((2, torch.float16), (4, torch.bfloat16)),
}
_NONZERO = 8


def row_statistics(
    grad: Tensor, logits: Tensor, rows: int, loss_kind: LossKind | None = None, *, look: bool = True
) -> RowStatistics:
    """Measure rows of a head with at least two outputs: see :func:`nfi_monitor.measure.rows.row_statistics`.

    The arguments and the result are those of that function, which serves where the library cannot: other
    devices, other layouts, quantities declared elsewhere.
    """
    loaded = library.library()
    if loaded is not None:
        try:
            if _fits(grad, logits):
                return _measured(loaded, grad, logits, rows, loss_kind, look=look or loss_kind is None)
        except Exception as error:
            library.failed(error)
    return eager.row_statistics(grad, logits, rows, loss_kind, look=look)


def measures_all() -> bool:
    """Return whether the library computes all quantities of rows: none is declared elsewhere."""
    return SUMS == _SUMS and MAXIMA == _MAXIMA


def _fits(grad: Tensor, logits: Tensor) -> bool:
    return (
        measures_all()
        and grad.dim() == 2
        and grad.shape == logits.shape
        and grad.shape[1] > 1
        and library.readable(grad)
        and library.readable(logits)
    )


def _measured(
    loaded: Any, grad: Tensor, logits: Tensor, rows: int, kind: LossKind | None, *, look: bool
) -> RowStatistics:
    dtype = zero_sum.accumulation_dtype(grad.dtype, logits.dtype)
    count, classes = grad.shape
    sums, maxima = (
        torch.empty(len(SUMS), dtype=dtype, device="cpu"),
        torch.empty(len(MAXIMA), dtype=dtype, device="cpu"),
    )
    counts, absorbed = (
        torch.empty(count, dtype=dtype, device="cpu"),
        torch.empty(count, dtype=dtype, device="cpu"),
    )
    winner = torch.empty(count, dtype=torch.int64, device="cpu")
    call = RowsCall(
        grad.data_ptr(),
        logits.data_ptr(),
        grad.stride(),
        logits.stride(),
        count,
        classes,
        rows,
        library.DTYPES[grad.dtype],
        library.DTYPES[logits.dtype],
        dtype is torch.float64,
        look,
        zero_sum.summation_error(dtype, classes),
        (),
        THRESHOLDS_OF_ROWS,
        sums.data_ptr(),
        maxima.data_ptr(),
        counts.data_ptr(),
        absorbed.data_ptr(),
        winner.data_ptr(),
    )
    address = ctypes.addressof(call)
    if look or kind is None:
        kind = _shown(loaded, call, address, grad, kind)
    call.facts = numbers_of(kind)
    if loaded.nfi_rows(address):
        raise MemoryError(f"no memory for {count} rows of {classes} classes")
    if look:
        scale, _, mismatch, uneven = (
            torch.full((), fact, dtype=dtype, device="cpu") for fact in call.facts[3:]
        )
        kind = kind._replace(scale=scale, mismatch=mismatch, uneven=uneven)
    return RowStatistics(sums, maxima, counts, winner, absorbed, kind)


def _shown(loaded: Any, call: RowsCall, address: int, grad: Tensor, known: LossKind | None) -> LossKind:
    """Look at the precision of the gradient and at the factor after the head, as eager code does."""
    dtype = zero_sum.accumulation_dtype(grad.dtype)
    fits = loaded.nfi_shown(address)
    narrow = [narrower for bit, narrower in _NARROWER.get(grad.dtype, ()) if fits & bit and fits & _NONZERO]
    number = torch.finfo(narrow[-1] if narrow else grad.dtype).eps
    eps = torch.full((), number, device="cpu")
    if known is not None and not fits & _NONZERO:
        eps, number = known.eps, known.eps.item()
    half = number == torch.finfo(torch.float16).eps
    level = torch.full((), absorption.underflow_level(torch.float16 if half else grad.dtype), device="cpu")
    floor = zero_sum.floor_of(eps, dtype, grad.shape[-1])
    scale = torch.zeros((), dtype=dtype, device="cpu") if known is None else known.scale
    slope = torch.ones((), dtype=dtype, device="cpu") if known is None else known.slope.to(dtype)
    kind = LossKind(eps, floor, level, scale, slope)
    if known is not None:
        kind = kind._replace(mismatch=known.mismatch, uneven=known.uneven)
    call.facts = tuple(fact.item() for fact in kind)
    found = loaded.nfi_logit_scale(address)
    if found != found:
        raise MemoryError(f"no memory for {len(grad)} rows")
    return kind._replace(slope=torch.full((), found, dtype=dtype, device="cpu"))


_last: tuple[LossKind | None, tuple[float, ...]] = (None, ())


def numbers_of(kind: LossKind) -> tuple[float, ...]:
    """Return the facts as numbers. Those of the last call are kept, because they rarely change."""
    global _last
    known, numbers = _last
    if known is not kind:
        numbers = tuple(fact.item() for fact in kind)
        _last = (kind, numbers)
    return numbers
