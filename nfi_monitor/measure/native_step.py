"""Measure an optimizer step with the C library where it can, else with torch: the same arguments and results.

The library reads the packed coordinates once, and adds in float64.  :func:`nfi_monitor.measure.step
.step_statistics` gives the same quantities, up to rounding.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_ubyte
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nfi_monitor.capture.sampling import CoordinateSample
from nfi_monitor.capture.update import Update
from nfi_monitor.measure import declared, displacement, row_match, weight_norm
from nfi_monitor.measure import step as eager
from nfi_monitor.measure.memory import Memory
from nfi_monitor.measure.views import StepView
from nfi_monitor.native import library
from nfi_monitor.native.calls import HEAD_NAMES, STEP_NAMES, HeadCall, StepCall

LARGE = 1 << 18
"""Products of the logit displacement beyond which torch's matrix product is quicker than the library's."""

_DTYPES = (torch.float32, torch.float64)
OF_GRADIENT = {
    "zero_sum_violation_weight": "nfi_monitor.measure.zero_sum:violation_of_head_weight",
    "zero_sum_violation_bias": "nfi_monitor.measure.zero_sum:violation_of_head_bias",
}
"""The declared functions that the library computes."""


class Layout:
    """Where the tensors of a sample lie: ends, rates and matrices of nfi.h, and the first coordinates."""

    def __init__(self, sample: CoordinateSample) -> None:
        self.starts = [start for start, _ in sample.spans]
        count = len(self.starts)
        rates = torch.tensor(sample.rates, device="cpu").tolist()  # rounded as a coordinate's weight is
        self.ends = (c_int64 * count)(*(end for _, end in sample.spans))
        self.rates = (c_double * count)(*rates)
        self.matrices = (c_ubyte * count)(*sample.matrices.tolist())
        self.call = StepCall(
            ends=ctypes.addressof(self.ends),
            rates=ctypes.addressof(self.rates),
            matrices=ctypes.addressof(self.matrices),
            tensors=count,
            total=sample.total,
        )


_LAYOUTS: WeakKeyDictionary[CoordinateSample, Layout] = WeakKeyDictionary()


def step_statistics(
    update: Update,
    features: Tensor | None,
    feature_mean: Tensor | None,
    previous: Memory | None,
    step: int,
) -> tuple[dict[str, Tensor | float], Memory | None]:
    """Measure what one optimizer step did: see :func:`nfi_monitor.measure.step.step_statistics`.

    The arguments are those of that function, which serves where the library cannot.  What the library
    measures is a number in the result, and no tensor.
    """
    loaded = library.library()
    if loaded is not None:
        try:
            if _fits(update):
                return _measured(loaded, update, features, feature_mean, previous, step)
        except Exception as error:
            library.failed(error)
    values, memory = eager.step_statistics(update, features, feature_mean, previous, step)
    return {**values}, memory


def _fits(update: Update) -> bool:
    """Return whether the library can read the packed coordinates, which are the reader's own copies."""
    moment, dtype = update.exp_avg_sq, update.grad.dtype
    return (
        dtype in _DTYPES
        and isinstance(update.lr, float)
        and update.grad.is_cpu
        and all(_packed(x, dtype) for x in (update.grad, update.before, update.after))
        and (moment is None or _packed(moment, dtype))
        and all(isinstance(x, float) or (x.ndim == 1 and x.is_cpu) for x in (update.correction, update.eps))
    )


def _packed(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a tensor that the monitor made itself is one vector of this dtype on the host."""
    return tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous()


def _measured(
    loaded: Any,
    update: Update,
    features: Tensor | None,
    feature_mean: Tensor | None,
    previous: Memory | None,
    step: int,
) -> tuple[dict[str, Tensor | float], Memory | None]:
    known = update.with_moments()
    before = previous if previous is not None and previous.step == step - 1 else None
    comparable = before if before is not None and before.precedes(known, step) else None
    measured, preconditioner = _coordinates(loaded, update, known, comparable)
    values: dict[str, Tensor | float] = {**measured}
    memory = rows = None
    if known.exp_avg_sq is None and comparable is not None and known.gradients_left:
        values |= eager.of_two_steps(known, comparable)
    if known.gradients_left:
        rows, layout = row_match.row_sketch_of(features), known.sample.layout
        preconditioner = preconditioner if known.preconditioner is None else known.preconditioner
        memory = Memory(step, known.before, known.grad, preconditioner, feature_mean, layout, rows)
    around = _Head.of(update, features, feature_mean, rows, before)
    large = around if around.products > LARGE else None
    if large is not None:
        around = around._replace(update=None, features=None, bias_update=None)
    head = _around_head(loaded, around)
    if head is None:
        old_mean = None if before is None else before.feature_mean
        values |= eager.head_statistics(update, features, feature_mean, old_mean)
        if rows is not None and before is not None and before.rows is not None:
            values["row_match"] = row_match.row_match(rows, before.rows)
    else:
        values |= head
        if large is not None and large.update is not None and large.features is not None:
            values["logit_displacement"], values["logit_displacement_rms"] = displacement.logit_displacement(
                large.update, large.bias_update, large.features.to(large.update.dtype)
            )
    if head is None or declared.OF_STEP != OF_GRADIENT:
        same_coordinates = comparable if known.sample is update.sample else None
        change = update.after - update.before
        values |= declared.step_values(StepView(update, change, features, feature_mean, same_coordinates))
    if update.found_inf is not None:
        values[eager.SKIPPED] = update.found_inf.reshape(())
    return values, memory


def _coordinates(
    loaded: Any, update: Update, known: Update, previous: Memory | None
) -> tuple[dict[str, float], Tensor | None]:
    """Measure all coordinates. Returns quantities by name, and sqrt(v̂) + ε_A [M]."""
    sample, moment, dtype = update.sample, known.exp_avg_sq, update.grad.dtype
    layout = _LAYOUTS.get(sample)
    if layout is None:
        layout = _LAYOUTS[sample] = Layout(sample)
    call = StepCall.from_buffer_copy(layout.call)
    call.wide = dtype is torch.float64
    stepped = update.grad if update.stepped_by is None else update.stepped_by
    call.grad, call.before, call.after = (x.data_ptr() for x in (stepped, update.before, update.after))
    preconditioner: Tensor | None = None
    held: list[Any] = []
    head = -1
    if moment is not None:
        preconditioner = torch.empty_like(moment)
        head = -1 if known.head_position is None else known.head_position
        call.exp_avg_sq, call.preconditioner = moment.data_ptr(), preconditioner.data_ptr()
        call.moments, call.moment_tensors = len(moment), len(known.sample.spans)
        call.moment_total, call.head, call.lr = known.sample.total, head, update.lr
        held = _set_constants(call, known, layout, head)
        old = () if previous is None else (previous.grad, previous.before, previous.preconditioner)
        found = [x.data_ptr() for x in old if x is not None and _packed(x, dtype)]
        if len(found) == 3:
            call.old_grad, call.old_before, call.old_preconditioner = found
        else:
            previous = None
    if loaded.nfi_step(ctypes.addressof(call)):
        raise MemoryError("no memory for a median")
    del held  # until here the library has read from it
    out = call.out[:]
    present = _WITHOUT_MOMENT if moment is None else PRESENT[previous is not None, head >= 0]
    values = {name: out[at] for at, name in present}
    if update.stepped_by is not None:
        values["gradient_norm"] = weight_norm.norm(update.grad, sample.weights).item()
        moved = update.after - update.before
        values["predicted_reduction"] = weight_norm.predicted_reduction(
            update.grad, moved, sample.weights
        ).item()
    if not update.gradients_left:
        del values["predicted_reduction"]
    return values, preconditioner


def _set_constants(call: StepCall, known: Update, layout: Layout, head: int) -> list[Any]:
    """Set bias correction, ε_A and learning rate. Returns arrays that must live until the call is over."""
    held = []
    for name, each, value in (
        ("correction", "corrections", known.correction),
        ("eps", "epsilons", known.eps),
        ("lr", "lrs", known.lrs),
    ):
        if isinstance(value, Tensor):
            numbers = value[[start for start in layout.starts if start < len(value)]].tolist()
            held.append((c_double * len(numbers))(*numbers))
            setattr(call, each, ctypes.addressof(held[-1]))
        elif value is not None:
            setattr(call, name, value)
    call.mean_eps = call.eps
    if isinstance(known.eps, Tensor):
        own = known.eps if head < 0 else known.eps[slice(*known.sample.spans[head])]
        call.mean_eps = own.mean().item()
    return held


class _Head(NamedTuple):
    """The tensors around the head: three matrices with classes first, features, and vectors."""

    weight: Tensor | None
    grad: Tensor | None
    update: Tensor | None
    features: Tensor | None
    bias_grad: Tensor | None
    bias_update: Tensor | None
    mean: Tensor | None
    old_mean: Tensor | None
    sketch: Tensor | None
    old_sketch: Tensor | None

    @classmethod
    def of(
        cls,
        update: Update,
        features: Tensor | None,
        mean: Tensor | None,
        sketch: Tensor | None,
        previous: Memory | None,
    ) -> _Head:
        """``previous``: the step just before this one."""
        moved, bias_moved = update.head_weight_update, update.head_bias_update
        if moved is None or features is None or not len(features):
            moved = bias_moved = features = None
        old_mean = None if previous is None or mean is None else previous.feature_mean
        if old_mean is not None and mean is not None and old_mean.shape != mean.shape:
            old_mean = None
        return cls(
            update.head_weight,
            update.head_weight_grad,
            moved,
            features,
            update.head_bias_grad,
            bias_moved,
            mean,
            old_mean,
            sketch,
            None if previous is None or sketch is None else previous.rows,
        )

    @property
    def products(self) -> int:
        """Number of products in the logit displacement."""
        return 0 if self.update is None or self.features is None else self.update.numel() * len(self.features)

    def fits(self, dtype: torch.dtype) -> bool:
        """Return whether the library can read all: one dtype, on the host, the last axis contiguous."""
        # All others are copies that the monitor made.
        if self.weight is not None and not library.readable(self.weight):
            return False
        for tensor in self:
            if tensor is not None and (
                tensor.dtype is not dtype or not tensor.is_cpu or tensor.stride(-1) != 1 or tensor.ndim > 2
            ):
                return False
        return self.old_sketch is None or self.sketch is None or self.sketch.shape == self.old_sketch.shape


def _around_head(loaded: Any, head: _Head) -> dict[str, float] | None:
    """Measure the head; None where torch must do it."""
    dtype = next((tensor.dtype for tensor in head if tensor is not None), None)
    if dtype not in _DTYPES or not head.fits(dtype):
        return None
    weight, mean = head.weight, head.mean
    classes = {len(x) for x in (weight, head.grad, head.bias_grad) if x is not None}
    widths = {x.shape[-1] for x in (weight, head.update, head.features, mean) if x is not None}
    if len(classes) > 1 or len(widths) > 1:
        return None
    call = HeadCall(
        wide=dtype is torch.float64, classes=max(classes, default=0), width=max(widths, default=0)
    )
    for name, tensor in zip(_Head._fields, head, strict=True):
        if tensor is not None:
            setattr(call, name, tensor.data_ptr())
    for stride, rows, tensor in zip(_STRIDES, _ROWS, head, strict=False):
        if tensor is not None:
            setattr(call, stride, tensor.stride(0))
            setattr(call, rows, len(tensor))
    if head.grad is not None:
        call.columns = head.grad.shape[1]
    if head.sketch is not None:
        call.sketched = len(head.sketch) // row_match.WIDTH
    if loaded.nfi_head(ctypes.addressof(call)):
        raise MemoryError("no memory for the head's columns")
    several = weight is not None and len(weight) > 1
    present = (
        head.update is not None,
        head.update is not None,
        weight is not None,
        several,
        several and mean is not None,
        weight is not None and head.old_mean is not None,
        mean is not None,
        head.grad is not None,
        head.bias_grad is not None,
        head.sketch is not None and head.old_sketch is not None,
    )
    return {name: x for name, x, here in zip(HEAD_NAMES, call.out, present, strict=False) if here}


_STRIDES = ("weight_stride", "grad_stride", "update_stride", "feature_stride")
_ROWS = ("classes", "classes", "kept", "rows")
_WITHOUT_MOMENT = [*enumerate(STEP_NAMES[:5])]
PRESENT = {
    (pair, head): [
        (at, name) for at, name in enumerate(STEP_NAMES[: 14 if pair else 12]) if head or "head" not in name
    ]
    for pair in (False, True)
    for head in (False, True)
}
"""Place and name of the results, by whether the step before is known and whether the head is read."""
