"""Watch the gradient at the head's output.

A tensor hook on the head's output gets the true ∂L/∂z of the run, in the run's own precision, without labels
and without a second backward pass.  The hook is on the head module, not on the model: under mixed precision
the model's output is often a converted copy, whose hook never runs.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.capture import devices
from nfi_monitor.capture.backward_pass import Pass, nearest_parameter, pass_of
from nfi_monitor.capture.discarded import Discards
from nfi_monitor.capture.head_layer import Head, is_layer, own_parameter
from nfi_monitor.capture.logit_changes import arrivals, first_changed, multiplies
from nfi_monitor.capture.model_hooks import ModelHook
from nfi_monitor.capture.origin import Logits, logits_of, takes
from nfi_monitor.capture.reading_plan import ReadingPlan
from nfi_monitor.capture.row_samples import classes_of as classes_of
from nfi_monitor.capture.row_samples import features_of, same_rows
from nfi_monitor.capture.row_samples import rows_of as rows_of
from nfi_monitor.capture.row_samples import whole_rows as whole_rows
from nfi_monitor.capture.rows import Rows as Rows
from nfi_monitor.capture.rows import memory_of
from nfi_monitor.capture.sampling import ROW_ELEMENTS, copies, local, offset, strides
from nfi_monitor.capture.sharding import ClassShard, class_shard

NODES = 32
"""Maximum number of nodes that are kept of one step. A head may run many times in it."""
Hook = Callable[[Callable[["Tensor | None"], None]], object]
"""Registers a function that is called with the gradient of the logits."""
Sampler = Callable[[Tensor], Tensor]
"""Takes the sampled rows of a tensor: [..., K or d] → [n, K or d]."""


class HeadProbe(ModelHook):
    """Hook the head's forward pass, and deliver its rows in the backward pass.

    It is an object of its own, and no bound method: a copy of the model, such as an EMA, must neither copy
    the monitor nor report its rows as rows of the run.
    """

    def __init__(
        self,
        wanted: Callable[[], int | None],
        deliver: Callable[[Rows], None],
        failed: Callable[[str, BaseException], None],
        spent: Callable[[float], None] = lambda seconds: None,
        head: Head | None = None,
        discarded: Callable[[], object] = lambda: None,
    ) -> None:
        """``wanted`` returns the step to capture, or None.  ``spent`` gets the seconds of each hook.

        ``discarded`` is called when the gradients of the rows delivered so far in this step are gone.
        """
        self.head = head
        self.head_changed: Callable[[Head], object] = lambda head: None
        self._discards = Discards(discarded)
        self._wanted = wanted
        self._deliver = deliver
        self._failed = failed
        self._spent = spent
        self.restart()
        self.traced = 0
        self.traced_backward = 0
        # Whether the watched model is on the meta device.
        self.on_meta = head is not None and any(weight.is_meta for weight in head.module.parameters())
        self.unreadable = 0  # forward passes of tensors without numbers of their own
        self.tapped = False
        self.plan = ReadingPlan()
        self.can_reduce = False  # whether a reduced sample would have fewer rows
        self.dtype: torch.dtype | None = None  # of the watched logits
        self.sharded = 0  # number of sharded logits that could not be read
        # While the head is checked: the nodes that made the logits of the last pass.
        self.nodes: list[Any] | None = None
        self._backward_ran = False  # since the last forward pass of the head
        self._features: Tensor | None = None
        self._untapped: Any = None  # node of the head's output, whose logits are tapped later

    def restart(self, retired: nn.Module | None = None) -> None:
        """Count from zero: another head is watched now. The module ``retired`` was the head until now."""
        self._retired = None if self.head is not None and self.head.module is retired else retired
        self.fired = self.delivered = 0
        self.recomputed = 0  # number of backward passes whose rows were recomputed
        self.fired_without_gradient = 0
        self.in_evaluation = 0  # how many of these were in eval mode, with gradients enabled
        self.frozen = 0  # how many of these were in training mode, of a frozen module
        self.not_in_output = 0  # outputs that hold no logits made by the bare parameter that is the head
        self.without_features = 0
        self.returned: str | None = None  # type of an output that is no tensor
        self.added: str | None = None  # the operation of the loss that adds to the logits before its softmax
        self.scaled = False  # whether the loss takes the head's logits times a factor
        self.shown = False  # whether the graph of a loss has shown how it takes the head's logits
        self.multiplied = False  # whether the logits that are read are multiples of the head's, or capped
        self.misshapen: tuple[int, ...] | None = None  # shape of an output without the head's classes

    @property
    def level(self) -> str:
        """The place where violations are read: "rows", "tap", "recomputed" or, before any row,
        "weight_gradient"."""
        if self.tapped:
            return "tap"
        if self.delivered:
            return "rows"
        return "recomputed" if self.recomputed else "weight_gradient"

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            # Inside a compiled graph a Python hook would be a graph break, so the head's weight gradient is
            # read instead.  Set the count, do not add to it: it is a constant to the tracer.
            self.traced = 1
            return
        try:
            step = self._wanted()
            head = self.head
            if module is self._retired:
                return
            if head is not None and head.place is not None and not self.tapped:
                self._pass_by(module, (*args, *kwargs.values()), output, step)
                return
            bare = head is not None and head.bare
            if not (bare or isinstance(output, Tensor)):
                self.returned = type(output).__name__
                return
            if step is None:
                return
            if isinstance(output, Tensor) and not devices.is_readable(output, meta=self.on_meta):
                self.unreadable += module.training and torch.is_grad_enabled()
                return
            started = time.perf_counter()
            try:
                self._look(module, args, kwargs, output, step)
            finally:
                self._spent(time.perf_counter() - started)
        except Exception as error:
            self._failed("rows", error)

    def _look(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, step: int
    ) -> None:
        head = self.head
        if not (module.training and torch.is_grad_enabled()):
            self.fired_without_gradient += 1
            self.in_evaluation += torch.is_grad_enabled() and not module.training
            return
        inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        features = next(inputs, None)
        if head is not None and head.bare and not self.tapped:
            found = None if head.weight is None else logits_of(output, head.weight)
            if found is not None:
                classes = found.values.shape[-1]
                if classes != head.outputs:  # the classes are the weight's other axis
                    head = self.head = replace(head, class_axis=1 - head.class_axis, classes=classes)
                    self.head_changed(head)
                given = features if takes(found.values, head.weight, features) else None
                features = given if found.features is None else found.features
                paths = arrivals(found.values.grad_fn, (found.product,), at_logits=True)
                if first_changed(paths) is not None and not head.changed:
                    head = self.head = replace(head, changed=True)
                    self.head_changed(head)
                self.multiplied = multiplies(paths)
                self._watch(found.values, features, step, tapped=False, made=found)
                return
            if not isinstance(output, Tensor):
                self.not_in_output += 1
                return
        if not output.requires_grad:
            self.fired_without_gradient += 1
            self.frozen += 1
            return
        if self.tapped:
            # The tapped tensor comes later. This input may be its features.
            self._features = None if features is None else features.detach()
            self._untapped = output.grad_fn
            return
        axis = -1 if head is None else head.class_axis_of(output)
        if axis is None:
            self.misshapen = tuple(output.shape)
            return
        plain = head is None or head.weight is None or is_layer(head.module)
        known = plain or (head is not None and takes(output, head.weight, features))
        features = features_of(module, features, axis) if known else None
        if self.nodes is not None:  # the rows may be read elsewhere, from this pass on
            self._features = None if features is None else features.detach()
            self._untapped = output.grad_fn
        self._watch(output, features, step, tapped=False, module=module, axis=axis)

    def _pass_by(self, module: nn.Module, given: tuple[Any, ...], output: Any, step: int | None) -> None:
        """Keep what a reading elsewhere needs: the node of the head's output, or the features of its rows."""
        place = None if self.head is None else self.head.place
        if place is None or step is None or not isinstance(output, Tensor) or output.grad_fn is None:
            return
        features = next((value for value in given if isinstance(value, Tensor)), None)
        if not place.same_rows or (place.where == "loss" and self.nodes):
            features = None  # several calls make the logits
        if place.where == "loss":
            self.nodes = [*(self.nodes or ())[: NODES - 1], output.grad_fn]
        features = features_of(module, features, place.axis)
        self._features = None if features is None else features.detach()

    def read_at(self, logits: Logits) -> None:
        """Watch these logits, where they are changed after the head (:attr:`Head.place`)."""
        step = self._wanted()
        if step is None or self.tapped or not devices.is_readable(logits.values, meta=self.on_meta):
            return
        started = time.perf_counter()
        try:
            made = None if logits.node is None else logits
            place = None if self.head is None else self.head.place
            features = self._features if place is not None and place.same_rows else None
            self._features = None
            self._watch(logits.values, features, step, tapped=False, axis=logits.axis, made=made)
        finally:
            self._spent(time.perf_counter() - started)

    def tap(self, logits: Tensor, axis: int = -1) -> None:
        """Watch this tensor from now on, instead of the head's output. ``axis``: that of the classes."""
        self.tapped = True
        features, self._features = self._features, None
        made, self._untapped = self._untapped, None
        step = self._wanted()
        if step is None or not devices.is_readable(logits, meta=True):
            return
        if torch.is_grad_enabled() and logits.requires_grad:
            started = time.perf_counter()
            try:
                axis = axis if axis < 0 else axis - logits.dim()
                paths = [] if made is None else arrivals(logits.grad_fn, (made,), at_logits=True)
                self.multiplied = multiplies(paths)
                self._watch(logits, features if axis == -1 else None, step, tapped=True, axis=axis)
            finally:
                self._spent(time.perf_counter() - started)

    def _watch(
        self,
        logits: Tensor,
        features: Tensor | None,
        step: int,
        *,
        tapped: bool,
        module: nn.Module | None = None,
        axis: int = -1,
        made: Logits | None = None,
    ) -> None:
        """Register the gradient hook on ``logits`` [..., K], computed from ``features`` [..., d].

        ``axis``: that of the classes, below zero; features have theirs at the same place.  ``made`` registers
        another hook than that of the tensor.  ``module``: the layer whose output the logits are.
        """
        self.fired += 1
        node, hook = (logits.grad_fn, logits.register_hook) if made is None else (made.node, made.hook)
        self._keep(node)
        if logits.is_complex():
            self.returned = "complex tensor"
            return
        plan = self.plan
        shard, shown = None, whole_rows(logits)
        whole = plan.head_outputs
        if shown is None or (
            not tapped and whole is not None and shown.movedim(axis, -1).shape[-1:] != (whole,)
        ):
            weight = None if module is None else own_parameter(module, "weight")
            shard = class_shard(logits if shown is None else weight, -1 if shown is None else 0)
            shown = local(logits.detach())
            if shard is None or not plan.row_slots or shown.shape[-1] != shard.classes:
                self.sharded += 1
                return
        self.dtype = shown.dtype
        features = None if features is None else whole_rows(features)
        classes = shown.shape[axis] if shown.dim() else 0
        total = shown.numel() // classes if classes else 0
        if total == 0:
            return  # an empty batch
        wide = shard.outputs if shard else classes
        stride, self.can_reduce = strides(total, wide, reduced=plan.reduced_sample)
        if shard is not None:
            stride = max(stride, -(-total // plan.row_slots))

        def sample(tensor: Tensor) -> Tensor:
            tensor = tensor.detach() if axis == -1 else tensor.detach().movedim(axis, -1)
            return rows_of(tensor, offset(step, stride), stride)

        fits = features is not None and same_rows(features, shown, axis)
        kept = self._copies(shown, features if fits else None, sample, whole=stride == 1)
        head = self.head

        def register(on_gradient: Callable[[Tensor | None], None]) -> object:
            # Another head may have been found since.
            return hook(lambda g: on_gradient(g if self.head is head else None))

        normalized, memory = made is not None and made.normalized, memory_of(*kept[1:])
        make = partial(Rows, total=total, shard=shard, normalized=normalized, features_from=memory)
        self._deliver_at_backward(logits, kept, sample, make, shard, tapped=tapped, hook=register)

    def _keep(self, node: Any) -> None:
        """Keep the node that made logits, while the head is checked."""
        if self.nodes is not None:
            if self._backward_ran:  # these are of the micro-batch before: they keep its graph alive
                self.nodes.clear()
            if len(self.nodes) < NODES:
                self.nodes.append(node)
        self._backward_ran = False

    def _copies(
        self, shown: Tensor, features: Tensor | None, sample: Sampler, *, whole: bool
    ) -> list[Tensor]:
        """Return sampled rows of the logits and, if these are known, of their features."""
        # Copies, because some losses write their gradient over the logits, and a strided view would keep the
        # whole [N, K] and [N, d] storages alive.  Large features of which all are read are not copied:
        # autograd keeps them until its backward pass.  Rows.finished sees whether they are as they were.
        rows = sample(shown)
        if features is None or features.device != shown.device:
            self.without_features += 1
            return [rows.clone()]
        read = sample(features)
        large = whole and read.numel() > ROW_ELEMENTS and not read.is_inference()
        if large:
            return [rows.clone(), read]
        return [copy for copy in copies(rows, read) if copy is not None]

    def _deliver_at_backward(
        self,
        logits: Tensor,
        kept: list[Tensor],
        sample: Sampler,
        make: Callable[..., Rows],
        shard: ClassShard | None,
        *,
        tapped: bool,
        hook: Hook,
    ) -> None:
        """Call ``hook``, and deliver the logits' gradient with the rows ``kept`` from the forward pass."""

        parameter = nearest_parameter(logits)
        given = _Given()  # owned by the hook, which lives as long as the graph

        def on_gradient(grad: Tensor | None) -> None:
            # Some compiled outer graphs call tensor hooks with None.  If logits were tapped after this
            # forward pass, the tapped tensor reports the rows.
            # Compiled autograd traces this hook: a graph break would be an error under fullgraph=True.
            if grad is None or self.tapped is not tapped:
                return
            if torch.compiler.is_compiling():
                self.traced_backward = 1
                return
            try:
                readable = devices.is_readable(grad, meta=self.on_meta or tapped)  # or this pass is traced
                kind = pass_of(parameter) if readable else Pass.OTHER
                if kind is Pass.OTHER:
                    return
                started = time.perf_counter()
                try:
                    deliver(whole_rows(grad) if shard is None else classes_of(grad, shard), kind)
                finally:
                    self._spent(time.perf_counter() - started)
            except Exception as error:
                self._failed("rows", error)

        def deliver(grad: Tensor | None, kind: Pass) -> None:
            if grad is None:
                self.sharded += 1
                return
            self.delivered += 1
            self._backward_ran = True
            if given:  # a further backward pass through the same graph
                rows = given[0]()
                if rows is not None:
                    rows.add(sample(grad), kind)
                return
            if kind is Pass.TRAINS and self.head is not None:
                self._discards.arrived(self.head.weight)
            # A copy: a view would keep the whole gradient until the step, and autograd may write to it.
            features = kept[1] if len(kept) > 1 else None
            rows = make(sample(grad).clone(), kept[0], features, graph=weakref.ref(given), kind=kind)
            kept.clear()  # the graph may live longer than its backward pass
            given.append(weakref.ref(rows))
            self._deliver(rows)

        hook(on_gradient)

    def forget(self) -> None:
        """Drop features whose logits were never tapped, and nodes of this step."""
        self._features = self._untapped = None
        self._discards.end_step()
        if self.nodes:
            self.nodes.clear()


class _Given(list["weakref.ref[Rows]"]):
    """The rows given away by one hook. Unlike a list, it can be referenced weakly."""
