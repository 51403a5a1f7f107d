"""Find where the logits are that the loss takes, if they are changed after the head, and read rows there.

The gradient at the head's output is then not that of a softmax of this output.  The changed logits may be in
the model's output, or at the softmax of the loss that the model returns.  If they are in neither, no rows are
read, and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from nfi_monitor.capture.head_layer import Head, Place
from nfi_monitor.capture.head_probe import HeadProbe
from nfi_monitor.capture.logit_changes import (
    CHOOSE,
    Arrival,
    arrivals,
    class_axis,
    first_added,
    first_changed,
    has_softmax,
    softmax_logits,
)
from nfi_monitor.capture.origin import Logits, at_path, paths_of
from nfi_monitor.engine.head_notes import changed_text, elsewhere_text

LOGITS = ("logits", "pred", "out", "scores")
"""Parts of the names under which models return their logits."""


class RowPlace:
    """Find the place of the changed logits, and read rows there.

    Args:
        probe: reads the rows.
        move: called as ``move(head)`` with the head whose rows are read elsewhere.
        note: makes a note, as ``note(code, message)``.
    """

    def __init__(
        self, probe: HeadProbe, move: Callable[[Head], None], note: Callable[[str, str], None]
    ) -> None:
        self._probe, self._move, self._note = probe, move, note
        self._moved: str | None = None  # the note for this step
        self._at_returned: Arrival | None = None  # found at the softmax of the loss that the model returns
        self._candidates: list[tuple[Place, Any]] = []  # tensors in the model's output, with their nodes

    def look_at_output(self, head: Head, output: Any, *, sure: bool) -> None:
        """Find out whether a model's output, or the loss in it, takes changed logits.

        ``sure``: whether it is known that this is the head.  If not, only a loss can tell.
        """
        nodes, probe = self._probe.nodes or (), self._probe
        if not nodes or probe.tapped:
            return
        returned = list(paths_of(output))
        losses = [tensor for _, tensor in returned if tensor.dim() == 0]
        if losses:
            paths = self._to_head(losses[0].grad_fn, head)
            self._show(paths)
            changed = first_changed(paths)
            if changed is not None:
                place = self._at_softmax(head, changed) or Place("nowhere")
                self._settle(head, place._replace(same_rows=not changed.mixed), changed, output)
            elif (added := first_added(paths)) is not None:
                self._find_candidates(head, returned)
                self._read_sum(head, added, losses[0].grad_fn, output)
            return
        found = self._find_candidates(head, returned)
        changed, added = first_changed(found), first_added(found)
        if sure and changed is not None and self._candidates:
            place = self._candidates[0][0]._replace(same_rows=not changed.mixed)
            self._settle(head, place, changed, output)
        elif sure and added is not None:
            self._read_sum(head, added, None, output)

    def _show(self, paths: list[Arrival]) -> None:
        """Keep what the graph of a loss has shown."""
        if paths and not self._probe.shown:  # the first look may be before the backward pass frees constants
            self._probe.shown = True
            self._probe.scaled = all(path.scaled for path in paths)

    def _to_head(self, start: Any, head: Head | None, *, at_logits: bool = False) -> list[Arrival]:
        """Return the paths from a loss, or from logits, to the outputs of the head in this pass."""
        axis = -1 if head is None or head.bare else -1 - head.spatial
        return arrivals(start, self._probe.nodes or (), at_logits=at_logits, axis=axis)

    def _find_candidates(self, head: Head, returned: list[tuple[Any, Tensor]]) -> list[Arrival]:
        """Find the tensors that may be the changed logits. Returns the paths from all tensors to the head."""
        returned.sort(key=lambda one: not any(part in str(one[0]) for part in LOGITS))
        paths = [self._to_head(tensor.grad_fn, head, at_logits=True) for _, tensor in returned]
        classes = head.outputs or head.classes or 0
        self._candidates = [
            (Place("output", keys, axis), tensor.grad_fn)
            for (keys, tensor), found in zip(returned, paths, strict=True)
            if found and (axis := _axis(head, tensor, found, classes)) is not None
        ]
        return [path for found in paths for path in found]

    def _read_sum(self, head: Head, added: Arrival, loss: Any, output: Any) -> None:
        """Read the rows in the model's output, after a sum that keeps rows and features.

        ``loss``: the node of one that takes these logits as they are; None: not known yet.
        """
        fits = [
            place
            for place, node in self._candidates
            if loss is None or _as_it_is(arrivals(loss, (node,), at_logits=False, axis=place.axis))
        ]
        if fits and not head.bare and (loss is not None or added.added not in CHOOSE or len(fits) == 1):
            self._settle(head, fits[0]._replace(same_rows=True), added, output)
        elif output is not None and loss is not None and (place := self._at_softmax(head, added)):
            self._settle(head, place._replace(same_rows=True), added, output)
        elif loss is not None:
            self._probe.added = added.added

    def look_at_loss(self, head: Head | None, loss: Any) -> bool:
        """Find out whether a loss takes the logits that are read, or changed ones. Returns whether either.

        ``loss``: its node.  Changed ones that the model has returned are read from the next pass on.
        """
        nodes = self._probe.nodes or ()
        if head is None or not nodes or (head.place is not None and head.place.where == "nowhere"):
            return False
        paths = self._to_head(loss, head)
        self._show(paths)
        changed = first_changed(paths)
        if not paths and self._at_returned is not None and has_softmax(loss):
            changed = self._at_returned  # another loss than the returned one is trained
        if changed is not None:
            there = (
                place
                for place, node in self._candidates
                if any(path.change is None for path in arrivals(loss, (node,), at_logits=False))
            )
            place = next(there, Place("nowhere"))._replace(same_rows=not changed.mixed)
            self._settle(head, place, changed, None)
        elif (added := first_added(paths)) is not None:
            self._read_sum(head, added, loss, None)
        return bool(paths)

    def end_step(self) -> None:
        """Say where rows are read, unless the user has tapped logits since; drop the nodes of this step."""
        head, message = self._probe.head, self._moved
        self._candidates, self._moved, self._at_returned = [], None, None
        if self._probe.tapped and head is not None and head.place is not None:
            self._move(replace(head, place=None))
        elif message is not None:
            self._note("rows_after_head", message)

    def read(self, place: Place, output: Any) -> None:
        """Read the rows of a forward pass of the model."""
        probe, logits = self._probe, None
        if place.where == "output":
            tensor = at_path(output, place.path)
            if tensor is not None and tensor.dim() >= -place.axis:
                logits = Logits(tensor, None, None, place.axis)
        elif place.where == "loss":
            losses = [tensor for _, tensor in paths_of(output) if tensor.dim() == 0]
            nodes = list(probe.nodes or ())
            if probe.nodes:
                probe.nodes.clear()
            if losses and nodes:
                paths = arrivals(losses[0].grad_fn, nodes, at_logits=False, axis=place.axis)
                changed = first_changed(paths) or first_added(paths)
                logits = None if changed is None else softmax_logits(changed.softmax)
        if logits is not None:
            probe.read_at(logits)

    def _at_softmax(self, head: Head, changed: Arrival) -> Place | None:
        logits = softmax_logits(changed.softmax)
        fits = logits is not None and logits.values.shape[logits.axis] == (head.outputs or head.classes)
        return Place("loss", (), logits.axis) if fits and logits is not None and not head.bare else None

    def _settle(self, head: Head, place: Place, changed: Arrival, output: Any) -> None:
        """Read rows at ``place`` from now on. ``output``: of the pass that is running, or None."""
        change = changed.change or changed.added or ""
        if place.where == "nowhere":
            self._moved = self._at_returned = None
            self._move(replace(head, place=place))
            self._note("logits_changed", changed_text(head, change))
            return
        nodes = list(self._probe.nodes or ())
        self._moved = None if place.same_rows else elsewhere_text(head, place, change)  # else nothing lacks
        self._move(replace(head, place=place))
        self._probe.multiplied = changed.scaled or changed.change is not None
        self._at_returned = changed if place.where == "loss" else None
        if output is not None:
            self._probe.nodes = nodes
            self.read(place, output)


def _axis(head: Head, tensor: Tensor, paths: list[Arrival], classes: int) -> int | None:
    """Return the axis of the classes; also of a tensor that holds a slice of the head's classes."""
    axis, own = class_axis(tensor, classes, spatial=head.spatial), -1 - head.spatial
    sliced = first_added(paths) is not None and all(
        path.added in CHOOSE and not path.turned for path in paths
    )
    fewer = sliced and tensor.dim() > -own and 2 <= tensor.shape[own] < classes
    return own if axis is None and fewer else axis


def _as_it_is(paths: list[Arrival]) -> bool:
    return any(path.change is None and path.added is None for path in paths)
