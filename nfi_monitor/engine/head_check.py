"""Check the head that was found by names against what the first passes and the first losses show.

A model may make its logits with the weight of its input embedding, outside of any module, or register
its layers in another order than it calls them.  Then the last linear layer is an inner one.  The autograd
graph of the output, or of the loss, tells which weight made the logits (:mod:`nfi_monitor.capture.origin`),
and what changes them before the loss takes them (:mod:`nfi_monitor.engine.row_place`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nfi_monitor.caller import call_with
from nfi_monitor.capture import devices
from nfi_monitor.capture.head import describe, find_head, most_classes
from nfi_monitor.capture.head_layer import Head, is_layer, own_parameter
from nfi_monitor.capture.head_probe import HeadProbe
from nfi_monitor.capture.logit_changes import Arrival, arrivals, first_changed, has_softmax, reached
from nfi_monitor.capture.model_hooks import ModelHook
from nfi_monitor.capture.names import inner_names
from nfi_monitor.capture.origin import Origin, Product, origin, tensors_of
from nfi_monitor.engine.head_notes import WITHOUT_HEAD
from nfi_monitor.engine.row_place import LOGITS, RowPlace

STEPS = 3
"""Optimizer steps in which outputs, losses and gradients are looked at."""

ROUNDED = 1e-2
"""Sum over the classes, as a share of the sum of sizes, up to which it is rounding, in half precision too."""

PRODUCTS = 8
"""Maximum number of products of which each is searched for the others."""

Switch = Callable[[Head | None, str, str], None]


class HeadCheck(ModelHook):
    """Hook the model's forward pass, and look at losses, in the first optimizer steps.

    Args:
        model: the watched model.
        probe: reads the rows of the head.
        named: the user has named the head: it stays.
        switch: called as ``switch(head, code, message)`` with the true head (None: no layer is the head).
        note: makes a note, as ``note(code, message)``.
        place: finds where the logits are that the loss takes.
        captured: returns whether this step is read.
        ended: called as ``ended(check)`` when nothing is to be looked at any more.
        failed: reports an error.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: HeadProbe,
        named: bool,
        switch: Switch,
        note: Callable[[str, str], None],
        place: RowPlace,
        captured: Callable[[], bool],
        ended: Callable[[HeadCheck], None],
        failed: Callable[[str, BaseException], None],
    ) -> None:
        self._model, self._probe, self._place = model, probe, place
        self._switch, self._note, self._captured = switch, note, captured
        self._ended, self._failed = ended, failed
        self._naming = call_with("head=...")
        self._steps = 0
        self._shown = False  # the output or the loss has shown that this is the head
        self._guessed = False  # neither shows what makes the logits
        self._output_seen = False
        self._loss_seen = False  # a loss that takes the head's logits
        self._arrived = False  # a gradient at the head
        self._makers: list[Head] = []  # layers that make the other outputs
        self._named = named
        self._open = not named  # whether the head may be another one
        self.done = False
        self.traced = 0  # whether the hook is part of a compiled graph: without it, that is compiled anew
        probe.nodes = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            self.traced = 1  # set, not counted: it is a constant to the tracer
            return
        try:
            if devices.is_traced():
                return
            if not (module.training and torch.is_grad_enabled() and self._captured()):
                return
            head = self._probe.head
            if head is not None and head.place is not None:
                self._place.read(head.place, output)
            elif not self.done:
                self._look(module, output)
        except Exception as error:
            self._failed("head_check", error)

    def loss(self, loss: Any) -> None:
        """Look at the graph of a loss that is trained, before or after its backward pass, by its node."""
        try:
            if self.done or loss is None or not self._captured():
                return
            head, nodes = self._probe.head, self._probe.nodes or ()
            if self._open and (head is None or nodes):
                self._identify(self._model, [origin(loss, nodes)], "the graph of the loss", loss)
            if self._probe.head is head and self._place.look_at_loss(head, loss):
                self._open = False
                self._shown = self._loss_seen = True  # the loss takes its logits, if changed ones
        except Exception as error:
            self._failed("head_check", error)

    def before_step(self) -> None:
        """Look at what has arrived until the optimizer's step; end the check after some of them."""
        try:
            if self.done or not self._captured():
                return
            self._steps += 1
            self._look_at_gradient()
            if self._probe.nodes:
                self._probe.nodes.clear()
            self._place.end_step()
            if self._steps >= STEPS or self._loss_seen:
                self.stop()
        except Exception as error:
            self._failed("head_check", error)

    def stop(self) -> None:
        """End the check, and release the model. Rows that are read outside of the head still are."""
        self.done, self._open = True, False
        head = self._probe.head
        if head is None or head.place is None or head.place.where != "loss":
            self._probe.nodes = None
        self._ended(self)
        vars(self).pop("_model", None)

    def _look(self, model: nn.Module, output: Any) -> None:
        head = self._probe.head
        if not self._output_seen:
            self._output_seen = True
            if self._open and not (head is not None and head.sure):
                self._identify(model, _behind(output, self._probe.nodes or ()), "the model's first output")
        if head is not None and self._probe.head is head:
            self._place.look_at_output(head, output, sure=self._shown or head.sure or not self._open)

    def _identify(self, model: nn.Module, found: list[Origin], shown_by: str, loss: Any = None) -> None:
        """Watch the layer that makes the logits, if that is another one. ``loss``: its node, if it shows."""
        head = self._probe.head
        seen = [product.weight for one in found for product in one.products]
        if head is not None and head.weight is None:
            return
        if head is not None and (
            any(one.reached for one in found) or any(weight is head.weight for weight in seen)
        ):
            self._shown = True
            self._open = loss is None  # the loss shows more than the output
            self._makers = _makers(model, found) if loss is None else []
            return
        known = _last([product for one in found if one.complete for product in one.products])
        believed = head is not None and (head.sure or self._shown)
        if not known:
            self._guessed = not believed
            if head is not None and not head.sure and loss is not None and self._is_indirect(loss):
                self._features(head)
            return
        # A loss may be a part of the trained one: what is believed is inner only if the loss depends on it.
        if believed and (loss is None or not reached(loss, self._probe.nodes or ())):
            return
        ours = {id(parameter) for parameter in model.parameters()}
        weights = [product.weight for product in known if product.weight is not None]
        inside = [weight for weight in weights if id(weight) in ours]
        changed = next((product.changed for product in known if product.changed is not None), None)
        self._guessed = False
        heads = [one for weight in inside if (one := _head_of(model, weight)) is not None]
        if heads:
            paths = [path for one in found for path in _paths(one, at_logits=loss is None)]
            mixed = first_changed(paths) is not None
            self._other(head, [replace(one, changed=one.bare and mixed) for one in heads], shown_by)
        elif inside:
            self._no_matrix(head, inside[-1])
        elif weights:
            self._outside(head, weights[-1])
        else:
            self._no_layer(head, changed)

    def _other(
        self, head: Head | None, heads: list[Head], shown_by: str, why: str = "is an inner one"
    ) -> None:
        true = most_classes(heads)
        if (true.classes or 0) < 2:
            return
        self._open = False
        wrong = "" if head is None else f" The last layer by its name, {head.describe()}, {why}."
        rest = f" Other outputs come from {', '.join(true.others)}." if true.others else ""
        self._switch(
            true,
            "head_by_output",
            f"The logits are made by {true.describe()}, as {shown_by} shows: it is watched as "
            f"the head.{wrong}{rest} To watch another: {self._naming}.",
        )

    def _no_layer(self, head: Head | None, changed: nn.Parameter | None) -> None:
        inner = head is not None and head.weight is not changed
        watched = f" {head.describe()} makes features, and is not watched." if head and inner else ""
        why = (
            "The logits are not features times the weight of one layer: no layer is the head. They may be a "
            "product of two features or their distance (contrastive models), or come from experts or "
            "attention."
            if changed is None
            else f"The logits are made with a weight that is computed from a parameter {list(changed.shape)} "
            "(a normalised one, as for cosine logits): no layer is the head."
        )
        self._without(
            f"{why}{watched} The optimizer, the norms and the observed loss are. For rows, tap the logits: "
            f"logits = monitor.tap(logits). To watch a layer all the same: {self._naming}."
        )

    def _no_matrix(self, head: Head | None, weight: nn.Parameter) -> None:
        watched = "" if head is None else f" {head.describe()} makes features, and is not watched."
        self._without(
            f"The logits are made with a parameter {list(weight.shape)}, which is no single matrix (an "
            f"ensemble of heads?): no layer is the head.{watched} {WITHOUT_HEAD} For rows, tap the logits: "
            "logits = monitor.tap(logits)."
        )

    def _is_indirect(self, node: Any) -> bool:
        """Return whether a softmax takes what is made of the head's output, and not this output."""
        nodes = self._probe.nodes or ()
        return (
            has_softmax(node) and not arrivals(node, nodes, at_logits=False) and len(reached(node, nodes)) > 0
        )

    def _features(self, head: Head) -> None:
        self._without(
            f"The logits of the loss are not the output of {head.describe()}, the last layer by its name: "
            f"other operations, such as distances, make them of it. It is not watched. {WITHOUT_HEAD} For "
            f"rows, tap the logits: logits = monitor.tap(logits). To watch a layer all the same: "
            f"{self._naming}."
        )

    def _outside(self, head: Head | None, weight: nn.Parameter) -> None:
        watched = "" if head is None else f" {head.describe()} makes features, and is not watched."
        self._without(
            f"The loss makes its logits with a weight {list(weight.shape)} that is not in the watched model "
            f"(a classifier inside the loss?).{watched} {WITHOUT_HEAD} For rows, attach to a module that "
            "holds both, as nn.ModuleList([model, classifier]), or tap the logits: "
            "logits = monitor.tap(logits)."
        )

    def _without(self, message: str) -> None:
        self._open = self._guessed = False
        self._switch(None, "no_head", message)

    def _look_at_gradient(self) -> None:
        """Note that the head is a guess, or that no gradient arrives at it: then it is none."""
        head, probe = self._probe.head, self._probe
        if head is None or head.sure or head.bare or self._named:
            return
        weight = head.weight
        self._arrived |= bool(probe.delivered or probe.recomputed or probe.traced or _sharded())
        self._arrived |= weight is None or not weight.requires_grad or weight.grad is not None
        if self._arrived:
            if self._shown or not self._guessed:
                return
            self._guessed = False
            self._note(
                "head_guessed",
                f"Watched as the head: {head.describe()}, the last layer by its name. The output does not "
                f"show whether it makes the logits. If another does: {self._naming}. If none returns them: "
                "logits = monitor.tap(logits).",
            )
        elif self._steps >= STEPS:
            others = [one for one in self._makers if (one.classes or 0) >= 2 and _is_of_softmax(one.weight)]
            if others:
                return self._other(head, others, "the gradient of the first steps", "is not in the loss")
            self._without(
                f"No gradient has arrived at {head.describe()}, the last layer by its name, in {STEPS} "
                f"optimizer steps: the loss does not use it, and it is not watched. {WITHOUT_HEAD} "
                f"If a layer makes logits, name it: {self._naming}. If none does: "
                "logits = monitor.tap(logits)."
            )


def _paths(found: Origin, *, at_logits: bool) -> list[Arrival]:
    """Return the paths from an output or a loss to the products that it comes from."""
    nodes = [product.node for product in found.products]
    return arrivals(found.start, nodes, at_logits=at_logits)


def _sharded() -> bool:
    """Return whether several processes may keep the gradient of a parameter elsewhere."""
    return dist.is_available() and dist.is_initialized()


def _behind(output: Any, nodes: list[Any] | tuple[()]) -> list[Origin]:
    """Return the products behind a model's loss if it returns one, else behind each of its logits."""
    named = list(tensors_of(output))
    losses = [tensor for _, tensor in named if tensor.dim() == 0]
    logits = [tensor for name, tensor in named if any(part in name for part in LOGITS)]
    chosen: list[Tensor] = losses[:1] or logits or [tensor for _, tensor in named]
    return [origin(tensor.grad_fn, nodes) for tensor in chosen]


def _last(products: list[Product]) -> list[Product]:
    """Return the products that none of the others depends on, as the encoder's of an autoencoder does."""
    nodes = {product.node for product in products}
    if not 2 <= len(nodes) <= PRODUCTS:
        return products
    inner = set().union(*(reached(node, nodes - {node}) for node in nodes))
    return [product for product in products if product.node not in inner]


def _is_of_softmax(weight: nn.Parameter | None) -> bool:
    """Return whether the gradient of a head's weight [K, d] sums to 0 over the classes, as a softmax's does.

    The gradient of an embedding does not.  On an accelerator the answer is no, because it would take a wait.
    """
    grad = None if weight is None else weight.grad
    if grad is None or not grad.is_cpu or grad.is_sparse:
        return False
    grad = grad.double().flatten(1)
    return bool(grad.sum(0).abs().sum() < ROUNDED * grad.abs().sum())


def _makers(model: nn.Module, found: list[Origin]) -> list[Head]:
    """Return the layers that make the outputs which are known to the last operation."""
    products = _last([product for one in found if one.complete for product in one.products])
    heads = [_head_of(model, product.weight) for product in products if product.weight is not None]
    return [head for head in heads if head is not None]


def _head_of(model: nn.Module, weight: nn.Parameter) -> Head | None:
    """Return the head whose weight this is: a layer, or the bare matrix; None if it is no matrix."""
    for name, module in inner_names(model).items():
        if own_parameter(module, "weight") is weight and is_layer(module):
            return describe(model, name, module)
    return replace(find_head(model, weight), sure=True) if weight.dim() == 2 else None
