"""Measure an optimizer step with the C library where it can, else with torch: the same arguments and results.

The library reads the packed coordinates once, and adds in float64.  :func:`nfi_monitor.measure.step
.step_statistics` gives the same quantities, up to rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int32, c_int64, c_ubyte, c_void_p
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nfi_monitor.capture.sampling import CoordinateSample
from nfi_monitor.capture.update import Update
from nfi_monitor.measure import declared, row_match
from nfi_monitor.measure import step as eager
from nfi_monitor.measure.memory import Memory
from nfi_monitor.measure.views import StepView
from nfi_monitor.native import library

LARGE = 1 << 18
"""Products of the logit displacement beyond which torch's matrix product is quicker than the library's."""

_NAMES = (
    "gradient_norm", "update_rms", "weight_norm", "relative_update", "rms_t_max", "rms_t_head",
    "sqrt_exp_avg_sq_median", "sqrt_exp_avg_sq_mean", "head_sqrt_exp_avg_sq_median",
    "head_sqrt_exp_avg_sq_mean", "effective_learning_rate", "secant_curvature", "gradient_alignment",
)  # fmt: skip
_HEAD_NAMES = (
    "logit_displacement", "logit_displacement_rms", "head_weight_norm", "classifier_mean_norm",
    "mean_alignment", "feature_displacement", "feature_mean_norm", "zero_sum_violation_weight",
    "zero_sum_violation_bias", "row_match",
)  # fmt: skip
"""The results of step.c, in its order."""
_OF_GRADIENT = {
    "zero_sum_violation_weight": "nfi_monitor.measure.zero_sum:violation_of_head_weight",
    "zero_sum_violation_bias": "nfi_monitor.measure.zero_sum:violation_of_head_bias",
}
"""The declared functions that the library computes."""


class _Step(ctypes.Structure):
    """``nfi_step_call`` of nfi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("grad", "before", "after", "exp_avg_sq")),
        *((name, c_void_p) for name in ("old_grad", "old_before", "old_preconditioner", "preconditioner")),
        *((name, c_void_p) for name in ("ends", "rates", "corrections", "epsilons", "lrs", "matrices")),
        *((name, c_int64) for name in ("tensors", "moment_tensors", "moments", "head")),
        *((name, c_double) for name in ("total", "moment_total", "correction", "eps", "lr", "mean_eps")),
        ("wide", c_int32),
        ("out", c_double * 16),
    )


class _Head(ctypes.Structure):
    """``nfi_head_call`` of nfi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "grad", "bias_grad", "update", "bias_update", "features")),
        *((name, c_void_p) for name in ("mean", "old_mean", "sketch", "old_sketch")),
        *((f"{name}_stride", c_int64) for name in ("weight", "grad", "update", "feature")),
        *((name, c_int64) for name in ("classes", "width", "columns", "kept", "rows", "sketched")),
        ("wide", c_int32),
        ("out", c_double * 16),
    )


class _Layout:
    """Where the tensors of a sample lie: ends, rates and matrices of nfi.h, and the first coordinates."""

    def __init__(self, sample: CoordinateSample) -> None:
        self.starts = [start for start, _ in sample.spans]
        count = len(self.starts)
        rates = [1.0] * count if sample.weights is None else sample.weights[self.starts].tolist()
        self.ends = (c_int64 * count)(*(end for _, end in sample.spans))
        self.rates = (c_double * count)(*rates)
        self.matrices = (c_ubyte * count)(*sample.matrices.tolist())


_layouts: WeakKeyDictionary[CoordinateSample, _Layout] = WeakKeyDictionary()


def step_statistics(
    update: Update,
    features: Tensor | None,
    feature_mean: Tensor | None,
    previous: Memory | None,
    step: int,
) -> tuple[dict[str, Tensor], Memory | None]:
    """Measure what one optimizer step did: see :func:`nfi_monitor.measure.step.step_statistics`.

    The arguments and the result are those of that function, which serves where the library cannot.
    """
    loaded = library.library()
    if loaded is not None:
        try:
            if _fits(update):
                return _measured(loaded, update, features, feature_mean, previous, step)
        except Exception as error:
            library.failed(error)
    return eager.step_statistics(update, features, feature_mean, previous, step)


def _fits(update: Update) -> bool:
    """Return whether the library can read the packed coordinates, which are the reader's own copies."""
    moment, dtype = update.exp_avg_sq, update.grad.dtype
    vectors = (update.grad, update.before, update.after, *(() if moment is None else (moment,)))
    return (
        dtype in (torch.float32, torch.float64)
        and not isinstance(update.lr, Tensor)
        and all(
            vector.is_cpu and vector.dtype is dtype and vector.is_contiguous() and not vector.is_neg()
            for vector in vectors
        )
        and all(isinstance(x, float) or (x.ndim == 1 and x.is_cpu) for x in (update.correction, update.eps))
    )


def _measured(
    loaded: Any,
    update: Update,
    features: Tensor | None,
    feature_mean: Tensor | None,
    previous: Memory | None,
    step: int,
) -> tuple[dict[str, Tensor], Memory | None]:
    known = update.with_moments()
    consecutive = previous is not None and previous.step == step - 1
    comparable = previous if previous is not None and previous.precedes(known, step) else None
    numbers, preconditioner = _coordinates(loaded, update, known, comparable)
    memory = rows = None
    if preconditioner is not None:
        rows = None if features is None or len(features) < 2 else row_match.row_sketch(features)
        layout = known.sample.layout
        memory = Memory(step, known.before, known.grad, preconditioner, feature_mean, layout, rows)
    before = previous if consecutive else None
    values: dict[str, Tensor] = {}
    head = _around_head(loaded, update, features, feature_mean, rows, before)
    if head is None:
        values = eager.head_statistics(
            update, features, feature_mean, None if before is None else before.feature_mean
        )
        if rows is not None and before is not None and before.rows is not None:
            values["row_match"] = row_match.row_match(rows, before.rows)
    else:
        numbers |= head
    if head is None or declared.OF_STEP != _OF_GRADIENT:
        same_coordinates = comparable if known is update else None
        moved = update.after - update.before
        values |= declared.step_values(StepView(update, moved, features, feature_mean, same_coordinates))
    packed = torch.tensor(list(numbers.values()), dtype=update.grad.dtype)
    values |= zip(numbers, packed.unbind(), strict=True)
    if update.found_inf is not None:
        values[eager.SKIPPED] = update.found_inf.reshape(())
    return values, memory


def _coordinates(
    loaded: Any, update: Update, known: Update, previous: Memory | None
) -> tuple[dict[str, float], Tensor | None]:
    """Measure all coordinates. Returns quantities by name, and sqrt(v̂) + ε_A [M]."""
    sample, moment = update.sample, known.exp_avg_sq
    if previous is not None and not _alike(update.grad, previous):
        previous = None
    layout = _layouts.get(sample)
    if layout is None:
        layout = _layouts[sample] = _Layout(sample)
    preconditioner = None if moment is None else torch.empty_like(moment)
    head = -1 if known.head_position is None or moment is None else known.head_position
    correction, eps = known.correction, known.eps
    per_tensor = [_each(values, layout) for values in (correction, eps, known.lrs)]
    call = _Step(
        update.grad.data_ptr(),
        update.before.data_ptr(),
        update.after.data_ptr(),
        _address(moment),
        *(_address(x) for x in (_of(previous, "grad"), _of(previous, "before"))),
        _address(_of(previous, "preconditioner")),
        _address(preconditioner),
        ctypes.addressof(layout.ends),
        ctypes.addressof(layout.rates),
        *(None if values is None else ctypes.addressof(values) for values in per_tensor),
        ctypes.addressof(layout.matrices),
        len(layout.starts),
        len(known.sample.spans) if moment is not None else 0,
        0 if moment is None else len(moment),
        head,
        sample.total,
        known.sample.total,
        correction if isinstance(correction, float) else 1.0,
        eps if isinstance(eps, float) else 0.0,
        update.lr,
        _mean_eps(known, head),
        update.grad.dtype is torch.float64,
    )
    if loaded.nfi_step(ctypes.addressof(call)):
        raise MemoryError("no memory for a median")
    out = call.out
    count = 4 if moment is None else 11 if previous is None else 13
    left_out = () if head >= 0 else (5, 8, 9)
    return {_NAMES[at]: out[at] for at in range(count) if at not in left_out}, preconditioner


def _alike(grad: Tensor, previous: Memory) -> bool:
    """Return whether the step before was read in the same dtype, on the host."""
    return all(
        x.dtype is grad.dtype and x.is_cpu and x.is_contiguous()
        for x in (previous.grad, previous.before, previous.preconditioner)
    )


def _of(memory: Memory | None, name: str) -> Tensor | None:
    return None if memory is None else getattr(memory, name)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _each(values: Tensor | float | None, layout: _Layout) -> Any:
    """Return one number a tensor of what is given for each coordinate; None if one number holds for all."""
    if not isinstance(values, Tensor):
        return None
    numbers = values[[start for start in layout.starts if start < len(values)]].tolist()
    return (c_double * len(numbers))(*numbers)


def _mean_eps(known: Update, head: int) -> float:
    if not isinstance(known.eps, Tensor):
        return known.eps
    own = known.eps if head < 0 else known.eps[slice(*known.sample.spans[head])]
    return own.mean().item()


def _around_head(
    loaded: Any,
    update: Update,
    features: Tensor | None,
    feature_mean: Tensor | None,
    sketch: Tensor | None,
    previous: Memory | None,
) -> dict[str, float] | None:
    """Measure the head; None where torch must do it. ``previous``: the step just before this one."""
    weight, moved, bias_moved = update.head_weight, update.head_weight_update, update.head_bias_update
    if features is None or not len(features):
        moved = bias_moved = features = None
    if moved is None:
        bias_moved = features = None
    old_mean = None if previous is None or feature_mean is None else previous.feature_mean
    if old_mean is not None and feature_mean is not None and old_mean.shape != feature_mean.shape:
        old_mean = None
    old_sketch = None if previous is None else previous.rows
    grads = (update.head_weight_grad, update.head_bias_grad)
    matrices = (weight, grads[0], moved, features)
    vectors = (grads[1], bias_moved, feature_mean, old_mean, sketch, old_sketch)
    if not _consistent(update.grad.dtype, matrices, vectors):
        return None
    if sketch is not None and old_sketch is not None and sketch.shape != old_sketch.shape:
        return None
    classes = next((len(x) for x in (weight, *grads) if x is not None), 0)
    widths = {x.shape[-1] for x in (weight, moved, features, feature_mean) if x is not None}
    if len(widths) > 1 or any(len(x) != classes for x in (weight, *grads) if x is not None):
        return None
    call = _Head(
        *map(_address, (weight, *grads, moved, bias_moved, features)),
        *map(_address, (feature_mean, old_mean, sketch, old_sketch)),
        *(0 if x is None else x.stride(0) for x in matrices),
        classes,
        max(widths, default=0),
        0 if grads[0] is None else grads[0].shape[1],
        0 if moved is None else len(moved),
        0 if features is None else len(features),
        0 if sketch is None else len(sketch) // row_match.WIDTH,
        update.grad.dtype is torch.float64,
    )
    if loaded.nfi_head(ctypes.addressof(call)):
        raise MemoryError("no memory for the head's columns")
    several = weight is not None and classes > 1
    present = (
        moved is not None,
        moved is not None,
        weight is not None,
        several,
        several and feature_mean is not None,
        weight is not None and old_mean is not None,
        feature_mean is not None,
        grads[0] is not None,
        grads[1] is not None,
        sketch is not None and old_sketch is not None,
    )
    out = call.out
    return {name: out[at] for at, name in enumerate(_HEAD_NAMES) if present[at]}


def _consistent(
    dtype: torch.dtype, matrices: Sequence[Tensor | None], vectors: Sequence[Tensor | None]
) -> bool:
    """Return whether the library can read these: one dtype, on the host, the last axis contiguous."""
    _, _, moved, features = matrices
    if moved is not None and features is not None and moved.numel() * len(features) > LARGE:
        return False
    return all(
        x.dtype is dtype and x.ndim == 2 and x.stride(1) == 1 and library.readable(x)
        for x in matrices
        if x is not None
    ) and all(
        x.dtype is dtype and x.is_contiguous() and library.readable(x) for x in vectors if x is not None
    )
