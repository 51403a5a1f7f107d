"""Read the rows of a plain training in one call of the C library, without a tensor for each result.

A plan prepares what stays from step to step: sizes, and memory for results.  Where it does not serve (the
kind of loss is looked at, another device or layout), :func:`nfi_monitor.measure.native_rows.row_statistics`
measures the rows: the same numbers.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from ctypes import c_double, c_float, c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from nfi_monitor.capture.rows import Rows
from nfi_monitor.measure import zero_sum
from nfi_monitor.measure.loss_kind import LossKind
from nfi_monitor.measure.native_rows import THRESHOLDS_OF_ROWS, measures_all, numbers_of
from nfi_monitor.measure.rows import SUMS
from nfi_monitor.native import library
from nfi_monitor.native.calls import RowTotalsCall

FEATURE_ROWS = 64
"""Number of rows of features kept until the optimizer step, for the logit displacement."""
_WIDE = (torch.float32, torch.float64)
_ABSORBED, _COUNTED = SUMS.index("absorbed"), SUMS.index("counted")


class HostRows(NamedTuple):
    """What the rows of a backward pass show, in numbers of the host.

    ``sums``, ``maxima``: of ``measure.rows``.  ``wide``: whether they were added in float64.  ``absorbed``:
    absorbed rows by class.  ``feature_sum`` [d]: over the ``counted`` rows that count; ``features`` [n, d]:
    of the first rows.  Both are None without features.
    """

    sums: list[float]
    maxima: list[float]
    wide: bool
    absorbed: Counter[int]
    counted: float
    feature_sum: Tensor | None
    features: Tensor | None


class RowPlan:
    """The prepared call for rows of one size and of certain dtypes."""

    def __init__(self, grad: Tensor, logits: Tensor, features: Tensor | None) -> None:
        """Use :class:`RowPlans`, which checks that the tensors can be read."""
        self._shape, self._dtypes = grad.shape, (grad.dtype, logits.dtype)
        self._features = None if features is None else (features.shape, features.dtype)
        dtype = zero_sum.accumulation_dtype(grad.dtype, logits.dtype)
        self._wide = dtype is torch.float64
        count, classes = grad.shape
        real = c_double if self._wide else c_float
        self._counts, self._absorbed, self._winner = (real * count)(), (real * count)(), (c_int64 * count)()
        self._results = (real * len(SUMS))(), (real * len(SUMS))()
        self._call = call = RowTotalsCall()
        rows = self._rows = call.rows
        rows.grad_strides[:] = rows.logit_strides[:] = (classes, 1)
        rows.rows, rows.classes, rows.wide = count, classes, self._wide
        rows.grad_dtype, rows.logit_dtype = library.DTYPES[grad.dtype], library.DTYPES[logits.dtype]
        rows.summation_error = zero_sum.summation_error(dtype, classes)
        rows.thresholds[:] = THRESHOLDS_OF_ROWS
        rows.sums, rows.maxima = map(ctypes.addressof, self._results)
        rows.counts, rows.absorbed = ctypes.addressof(self._counts), ctypes.addressof(self._absorbed)
        rows.winner = ctypes.addressof(self._winner)
        self._kind: LossKind | None = None
        self._width, self._feature_dtype = 0, torch.float32
        if features is not None:
            self._width, self._feature_dtype = features.shape[1], features.dtype
            call.width, call.keep = features.shape[1], min(count, FEATURE_ROWS)
            call.feature_wide = features.dtype is torch.float64
        self._address = ctypes.addressof(call)

    def fits(self, grad: Tensor, logits: Tensor, features: Tensor | None) -> bool:
        """Return whether the plan was made for rows like these."""
        of_features = None if features is None else (features.shape, features.dtype)
        return (
            grad.shape == self._shape == logits.shape
            and (grad.dtype, logits.dtype) == self._dtypes
            and of_features == self._features
        )

    def measure(self, rows: Rows, kind: LossKind) -> HostRows:
        """Measure rows for which the plan was made. Raises MemoryError."""
        call, of = self._call, self._rows
        of.grad, of.logits, of.total = rows.grad.data_ptr(), rows.logits.data_ptr(), rows.total
        if kind is not self._kind:
            of.facts[:] = numbers_of(kind)
            self._kind = kind
        features = rows.features
        total = kept = None
        if features is not None:
            call.features, call.feature_stride = features.data_ptr(), features.stride(0)
            total = torch.empty(self._width, dtype=self._feature_dtype, device="cpu")
            kept = torch.empty((call.keep, self._width), dtype=self._feature_dtype, device="cpu")
            call.feature_sum, call.kept = total.data_ptr(), kept.data_ptr()
        loaded = library.library()
        if loaded.nfi_row_totals(self._address):
            raise MemoryError(f"no memory for {of.rows} rows of {of.classes} classes")
        numbers = call.totals[:]
        absorbed: Counter[int] = Counter()
        if numbers[_ABSORBED]:
            absorbed.update(
                [at for at, is_absorbed in zip(self._winner, self._absorbed, strict=True) if is_absorbed]
            )
        count = len(SUMS)
        return HostRows(
            numbers[:count], numbers[count:], self._wide, absorbed, numbers[_COUNTED], total, kept
        )


class RowPlans:
    """Measure rows by the plan of the last rows while it fits, and make another plan where it does not."""

    def __init__(self) -> None:
        self._plan: RowPlan | None = None

    def measure(self, rows: Rows, kind: LossKind) -> HostRows | None:
        """Measure rows of a known ``kind`` of loss; None where tensors must be made."""
        if library.library() is None or rows.normalized or rows.recomputed is not None:
            return None
        grad, logits, features = rows.grad, rows.logits, rows.features
        try:
            if not (_is_whole(grad) and _is_whole(logits)):
                return None
            plan = self._plan
            if plan is None or not plan.fits(grad, logits, features):
                if not _fits(grad, logits, features):
                    return None
                plan = self._plan = RowPlan(grad, logits, features)
            if features is not None and not (features.stride(1) == 1 and library.readable(features)):
                return None
            return plan.measure(rows, kind)
        except Exception as error:
            library.failed(error)
            return None


def _is_whole(tensor: Tensor) -> bool:
    """Return whether a copy that the monitor made itself can be read as one block."""
    plain = type(tensor) is Tensor and tensor.is_cpu and tensor.layout is torch.strided
    return plain and tensor.is_contiguous()


def _fits(grad: Tensor, logits: Tensor, features: Tensor | None) -> bool:
    return (
        measures_all()
        and grad.dim() == 2
        and grad.shape == logits.shape
        and grad.shape[0] > 0
        and grad.shape[1] > 1
        and grad.dtype in library.DTYPES
        and logits.dtype in library.DTYPES
        and (features is None or (features.dim() == 2 and len(features) == len(grad)))
        and (features is None or features.dtype in _WIDE)
    )
