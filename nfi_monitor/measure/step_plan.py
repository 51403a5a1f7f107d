"""Read an optimizer step of a plain model in two calls of the C library.

A plan prepares what stays from step to step: where the tensors lie, how they are sampled, memory for copies
and results.  Each step it checks that all of this still holds.  Where it does not, and for any other model,
:class:`~nfi_monitor.capture.optimizer.OptimizerReader` and :mod:`nfi_monitor.measure.native_step` read the
step: the same numbers, with some hundred operations.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_size_t
from typing import Any

import torch
from torch import Tensor

from nfi_monitor.capture.head import Head
from nfi_monitor.capture.optimizer import Layout, OptimizerReader
from nfi_monitor.capture.stepped_gradient import is_changed
from nfi_monitor.capture.update import BeforeStep
from nfi_monitor.measure import displacement, native_step, row_match
from nfi_monitor.measure.memory import Memory
from nfi_monitor.measure.planned_moments import moment_names
from nfi_monitor.native import library
from nfi_monitor.native.calls import HEAD_NAMES, STEP_NAMES, PlanCall

_SETTINGS = ("lr", "betas", "eps", "amsgrad")


class StepPlan:
    """The prepared calls for one head, one optimizer and one list of parameters with a gradient."""

    def __init__(self, reader: OptimizerReader, layout: Layout, head: Head, weight: Tensor) -> None:
        """Use ``planned_steps.plan_for``, which checks that all tensors can be read."""
        self._reader, self._layout, self._head, self._weight = reader, layout, head, weight
        self._params, self._sample = layout.params, layout.sample
        self._reduced, self._checked_at = reader.plan.reduced_sample, reader.check.version
        self._dtype = weight.dtype
        count, total = len(layout.params), layout.sample.spans[-1][1]
        self._addresses: dict[str, Any] = {
            name: (c_size_t * count)()
            for name in ("params", "grads", "moments", "taken", "after_of", "moment_of")
        }
        numbers = {name: (c_double * count)() for name in ("betas", "corrections", "epsilons", "lrs")}
        sizes = [end - start for start, end in layout.sample.spans]
        self._strides = (c_int64 * count)(*layout.sample.strides)
        self._counts = (c_int64 * count)(*sizes)
        self._packed = native_step.Layout(layout.sample)
        self._numbers = numbers
        # Two memories in turn: a step is compared with the one before.
        self._kept = [[self._empty(total) for _ in ("grad", "before", "preconditioner")] for _ in range(2)]
        whole = all(stride == 1 for stride in layout.sample.strides)
        self._scratch = [self._empty(0 if whole else total) for _ in ("after", "exp_avg_sq")]
        self._turn = 0
        self._constants: list[tuple[Any, ...]] = []
        self._call = self._prepared()
        self._step, self._around = self._call.step, self._call.head
        self._address = ctypes.addressof(self._call)
        self._parts = [self._parts_of(grad, before) for grad, before, _ in self._kept]
        self._sketches = [self._empty(0) for _ in self._kept]
        self._states = [reader.optimizer.state[param] for param in layout.params]
        self._names = moment_names(reader, layout)
        self._amsgrad = [group.get("amsgrad") for group in reader.optimizer.param_groups]
        self._shapes = [param.shape for param in layout.params]
        self._known = [*map(Tensor.data_ptr, layout.params)]
        self._addresses["params"][:] = self._known
        self._known_moments: list[int] = []

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device="cpu")

    def _holds(self) -> bool:
        """Return whether the reader and the optimizer are as they were."""
        reader = self._reader
        optimizer = reader.optimizer
        return (
            reader.plan.reduced_sample is self._reduced
            and reader.check.version == self._checked_at
            and reader.head is self._head
            and getattr(optimizer, "grad_scale", None) is None
            and getattr(optimizer, "found_inf", None) is None
        )

    def _prepared(self) -> PlanCall:
        """Return the call with all that stays."""
        head, weight, params = self._head, self._weight, self._params
        classes, width = weight.shape
        at = next(i for i, param in enumerate(params) if param is weight)
        bias = head.bias
        bias_at = -1 if bias is None else next(i for i, param in enumerate(params) if param is bias)
        places = [at] if bias is None else [at, bias_at]
        apart = any(self._sample.strides[place] > 1 for place in places)
        self._places, self._apart = places, apart
        sizes = [classes * width, classes][: len(places)]
        copies = 2 if apart else 0  # the gradient and the value before the step
        self._own = [self._empty(size) for size in sizes for _ in range(copies)]
        self._updates = [self._empty(classes, width), self._empty(classes)]
        # For each of the four numbers its own direction, one after the other.
        self._directions = row_match.directions(width, self._dtype, "cpu").double().t().contiguous()
        call, packed = PlanCall(), self._packed.call
        ctypes.memmove(ctypes.addressof(call.step), ctypes.addressof(packed), ctypes.sizeof(packed))
        for name, array in self._addresses.items():
            setattr(call, name, ctypes.addressof(array))
        call.strides, call.counts = ctypes.addressof(self._strides), ctypes.addressof(self._counts)
        call.betas = ctypes.addressof(self._numbers["betas"])
        call.corrections = ctypes.addressof(self._numbers["corrections"])
        call.directions = self._directions.data_ptr()
        call.weight_at, call.bias_at, call.copy_head = at, bias_at, apart
        step, around = call.step, call.head
        wide = self._dtype is torch.float64
        step.wide = around.wide = wide
        step.after, step.exp_avg_sq = (x.data_ptr() for x in self._scratch)
        step.moment_tensors, step.moments = len(params), self._sample.spans[-1][1]
        step.moment_total, step.head = self._sample.total, at
        around.weight = weight.data_ptr()
        around.update, around.bias_update = (
            self._updates[0].data_ptr(),
            None if bias is None else self._updates[1].data_ptr(),
        )
        call.bias = None if bias is None else bias.data_ptr()
        around.classes = around.kept = classes
        around.width = around.columns = width
        around.weight_stride = around.grad_stride = around.update_stride = width
        return call

    # --- before the step -------------------------------------------------------------------------

    def before(self) -> bool:
        """Copy gradients and weights. Returns False if the plan no longer holds: drop it then."""
        loaded = library.library()
        if loaded is None or not self._holds() or not self._find_gradients():
            return False
        if [*map(Tensor.data_ptr, self._params)] != self._known or self._head.weight is not self._weight:
            return False
        self._turn ^= 1
        grad, before, _ = self._kept[self._turn]
        self._step.grad, self._step.before = grad.data_ptr(), before.data_ptr()
        self._point_at_head()
        loaded.nfi_before(self._address)
        return True

    def _find_gradients(self) -> bool:
        """Set where the gradients are. Returns False if they are not those that the plan was made for."""
        params, shapes, dtype = self._params, self._shapes, self._dtype
        places, found = self._addresses["grads"], 0
        for group in self._reader.optimizer.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if (
                    found == len(params)
                    or param is not params[found]
                    # The same parameter may get another size, and grad.data any: optimizers broadcast.
                    or param.shape != shapes[found]
                    or not param.is_contiguous()
                    or param.dtype is not dtype
                    or type(grad) is not Tensor
                    or grad.shape != shapes[found]
                    or grad.dtype is not dtype
                    or grad.layout is not torch.strided
                    or not grad.is_contiguous()
                    or grad.is_neg()
                ):
                    return False
                place = places[found] = grad.data_ptr()
                if not place:  # the storage was freed
                    return False
                found += 1
        return found == len(params)

    def _parts_of(self, grad: Tensor, before: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return gradient and value before the step of the head's weight and bias."""
        if self._apart:
            return [*zip(self._own[::2], self._own[1::2], strict=True)]
        spans = [self._sample.spans[place] for place in self._places]
        return [(grad[start:end], before[start:end]) for start, end in spans]

    def _point_at_head(self) -> None:
        """Set where the head's gradient and its values before the step are."""
        call, around, head = self._call, self._around, self._head
        self._head_parts = self._parts[self._turn]
        (weight_grad, weight), *rest = self._head_parts
        around.grad, call.old_weight = weight_grad.data_ptr(), weight.data_ptr()
        if rest:
            around.bias_grad, call.old_bias = rest[0][0].data_ptr(), rest[0][1].data_ptr()
        self._has_violation = head.has_zero_sum and head.outputs != 1

    def before_step(self) -> BeforeStep:
        """Return what :meth:`before` has read, for :meth:`OptimizerReader.after`."""
        grad, before, _ = self._kept[self._turn]
        (weight_grad, weight), *rest = self._head_parts
        shown = self._has_violation
        return BeforeStep(
            sample=self._sample,
            params=self._params,
            grad=grad,
            before=before,
            found_inf=None,
            head_weight=weight.view(self._weight.shape),
            head_bias=rest[0][1] if rest else None,
            head_weight_grad=weight_grad.view(self._weight.shape) if shown else None,
            head_bias_grad=rest[0][0] if rest and shown else None,
            moments=len(self._params),
            earlier=None,
        )

    # --- after the step --------------------------------------------------------------------------

    def after(
        self, features: Tensor | None, mean: Tensor | None, previous: Memory | None, step: int
    ) -> tuple[dict[str, float], Memory] | None:
        """Return the quantities of the step, with the learning rate, and the memory for the next step.

        The arguments are those of :func:`nfi_monitor.measure.step.step_statistics`.  None where the plan
        does not serve: then read the step with :meth:`before_step`.
        """
        loaded = library.library()
        if loaded is None or not self._ready() or not self._usable(features, mean):
            return None
        before = previous if previous is not None and previous.step == step - 1 else None
        comparable = self._set_memory(before)
        rows = self._set_rows(features, mean, before)
        if loaded.nfi_after(self._address):
            raise MemoryError("no memory for an optimizer step")
        grad, weights, preconditioner = self._kept[self._turn]
        memory = Memory(step, weights, grad, preconditioner, mean, self._sample.layout, rows)
        values = dict(zip(STEP_NAMES[: 14 if comparable else 12], self._step.out[:14], strict=False))
        self._add_head(values, features, mean, before, rows)
        if math.isfinite(self._step.lr):
            values["learning_rate"] = self._step.lr
        return values, memory

    def _ready(self) -> bool:
        """Check the optimizer's state, and set its constants. Returns False if they cannot be read."""
        optimizer, check, addresses = self._reader.optimizer, self._reader.check, self._addresses
        state = optimizer.state
        for param, known in zip(self._params, self._states, strict=True):
            if state.get(param) is not known:
                return False
        shapes = [param.shape for param in self._params]  # the step may have changed them
        if shapes != self._shapes or [*map(Tensor.data_ptr, self._params)] != self._known:
            return False
        moments = [known[name] for known, name in zip(self._states, self._names, strict=True)]
        counts = [known["step"] for known in self._states]
        places = [*map(Tensor.data_ptr, moments), *map(Tensor.data_ptr, counts)]
        if places != self._known_moments:
            plain = all(
                library.is_plain(moment, self._dtype) and moment.shape == shape
                for moment, shape in zip(moments, self._shapes, strict=True)
            )
            if not plain or not all(library.is_plain(count, torch.float32) for count in counts):
                return False
            # Known last: Ctrl-C in between must not leave places that the library has not been given.
            self._known_moments = []
            addresses["moments"][:] = places[: len(moments)]
            addresses["taken"][:] = places[len(moments) :]
            self._known_moments = places
        constants = [  # with the number of parameters: one may have moved to another group
            (*(group.get(name) for name in _SETTINGS), is_changed(check, group), len(group["params"]))
            for group in optimizer.param_groups
        ]
        return constants == self._constants or self._set_constants(constants)

    def _set_constants(self, constants: Sequence[tuple[Any, ...]]) -> bool:
        """Set learning rates, ε_A and β2. Returns False for such as the plan cannot read."""
        self._constants = []
        if [amsgrad for *_, amsgrad, _, _ in constants] != self._amsgrad:
            return False
        for lr, betas, eps, _, changed, _ in constants:
            if changed:
                return False
            if type(lr) is not float or type(eps) not in (float, int) or not isinstance(betas, (tuple, list)):
                return False
            if len(betas) != 2 or type(betas[1]) not in (float, int) or not 0.0 <= betas[1] < 1.0:
                return False
        groups = self._reader.optimizer.param_groups
        of = {
            id(param): known
            for group, known in zip(groups, constants, strict=True)
            for param in group["params"]
        }
        each = [of[id(param)] for param in self._params]
        numbers, step = self._numbers, self._step
        numbers["betas"][:] = [betas[1] for _, betas, *_ in each]
        numbers["lrs"][:], numbers["epsilons"][:] = (
            [lr for lr, *_ in each],
            [float(eps) for _, _, eps, *_ in each],
        )
        head_lr, _, head_eps, *_ = each[self._places[0]]
        step.lr, step.eps, step.mean_eps = head_lr, float(each[0][2]), float(head_eps)
        same_lr, same_eps = (len({known[i] for known in constants}) == 1 for i in (0, 2))
        step.lrs = None if same_lr else ctypes.addressof(numbers["lrs"])
        step.epsilons = None if same_eps else ctypes.addressof(numbers["epsilons"])
        self._constants = [*constants]
        return True

    def _usable(self, features: Tensor | None, mean: Tensor | None) -> bool:
        """Return whether the library can read the features of this step."""
        width, dtype = self._weight.shape[1], self._dtype
        if features is not None and not (
            features.dtype is dtype
            and features.is_cpu
            and features.dim() == 2
            and features.shape[1] == width
            and features.stride(1) == 1
            and len(features) > 0
        ):
            return False
        return mean is None or (mean.dtype is dtype and mean.is_cpu and mean.shape == (width,))

    def _set_memory(self, before: Memory | None) -> bool:
        """Set the step before, if it has the same coordinates; return whether it has."""
        step = self._step
        grad, _, preconditioner = self._kept[self._turn]
        step.preconditioner = preconditioner.data_ptr()
        old = None if before is None else before.preconditioner
        comparable = (
            before is not None
            and old is not None
            and before.grad is not grad  # a step that Ctrl-C ended has taken its turn
            and before.layout in (None, self._sample.layout)
            and all(
                x.shape == preconditioner.shape and x.dtype is self._dtype and x.is_cpu and x.is_contiguous()
                for x in (before.grad, before.before, old)
            )
        )
        if before is None or old is None or not comparable:
            step.old_grad = step.old_before = step.old_preconditioner = None
            return False
        step.old_grad, step.old_before = before.grad.data_ptr(), before.before.data_ptr()
        step.old_preconditioner = old.data_ptr()
        return True

    def _set_rows(self, features: Tensor | None, mean: Tensor | None, before: Memory | None) -> Tensor | None:
        """Set the features; return memory for the sketch of their rows, or None."""
        call, around = self._call, self._around
        around.grad = self._head_parts[0][0].data_ptr() if self._has_violation else None
        if not self._has_violation:
            around.bias_grad = None
        around.mean = None if mean is None else mean.data_ptr()
        old = None if before is None or mean is None else before.feature_mean
        fits = old is not None and old.shape == mean.shape and old.dtype is self._dtype  # type: ignore[union-attr]
        around.old_mean = old.data_ptr() if old is not None and fits else None
        around.features = around.sketch = around.old_sketch = None
        if features is None:
            return None
        around.rows, around.feature_stride = len(features), features.stride(0)
        call.features = features.data_ptr()
        if self._updates[0].numel() * len(features) <= native_step.LARGE:
            around.features = call.features
        if len(features) < 2:
            return None
        rows = self._sketches[self._turn]
        if len(rows) != len(features) * row_match.WIDTH:
            rows = self._sketches[self._turn] = self._empty(len(features) * row_match.WIDTH)
        around.sketch, around.sketched = rows.data_ptr(), len(features)
        known = None if before is None else before.rows
        if known is not None and known.shape == rows.shape and known.dtype is self._dtype:
            around.old_sketch = known.data_ptr()
        return rows

    def _add_head(
        self,
        values: dict[str, float],
        features: Tensor | None,
        mean: Tensor | None,
        before: Memory | None,
        rows: Tensor | None,
    ) -> None:
        around = self._around
        several = around.classes > 1
        here = (
            around.features is not None,
            around.features is not None,
            True,
            several,
            several and mean is not None,
            around.old_mean is not None,
            mean is not None,
            around.grad is not None,
            around.bias_grad is not None,
            around.old_sketch is not None,
        )
        values.update(
            [(name, x) for name, x, there in zip(HEAD_NAMES, around.out[:10], here, strict=True) if there]
        )
        if features is not None and not here[0]:
            weight, bias = self._updates[0], self._updates[1] if len(self._places) > 1 else None
            largest, mean_square = displacement.logit_displacement(weight, bias, features)
            values["logit_displacement"], values["logit_displacement_rms"] = (
                largest.item(),
                mean_square.item(),
            )
        if rows is not None and not here[-1] and before is not None and before.rows is not None:
            values["row_match"] = 0.0  # other numbers of rows
