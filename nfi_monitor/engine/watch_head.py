"""Hook the head, and hook another one if the model's first output shows that it is the head."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

from torch import nn

from nfi_monitor.capture.fused_loss import FusedLossHook, fused_loss_of, is_chunked
from nfi_monitor.capture.head_layer import Head
from nfi_monitor.capture.head_probe import HeadProbe
from nfi_monitor.capture.optimizer import OptimizerReader
from nfi_monitor.capture.recomputed import RowRecomputer
from nfi_monitor.engine.faults import Faults
from nfi_monitor.engine.head_check import HeadCheck
from nfi_monitor.engine.hooks import RunHooks
from nfi_monitor.engine.loss_sources import LossSources
from nfi_monitor.engine.notes import NoteTaker
from nfi_monitor.engine.rank_search import RankSearch
from nfi_monitor.engine.row_place import RowPlace
from nfi_monitor.engine.silence import Silence
from nfi_monitor.engine.step_reader import StepReader
from nfi_monitor.measure.accumulator import RowAccumulator
from nfi_monitor.registry import register, unregister


class Run(Protocol):
    """The parts of a :class:`~nfi_monitor.engine.loop.StepLoop` that know the head."""

    owner: Any
    model: nn.Module
    head: Head | None
    reader: OptimizerReader
    probe: HeadProbe
    rows: RowAccumulator
    notes: NoteTaker
    faults: Faults
    rank_search: RankSearch
    hooks: RunHooks
    recomputer: RowRecomputer
    silence: Silence
    loss_sources: LossSources
    step_reader: StepReader
    step: int
    wanted_step: int | None
    closed: bool

    @property
    def watched_module(self) -> nn.Module:
        """The head, or the model if there is no head."""
        ...


def watch_head(run: Run, *, named: bool) -> HeadCheck:
    """Hook the head that was found at attach, and return its check. ``named``: the user has named it."""
    run.probe.head_changed = partial(_set_head, run)

    def note(code: str, message: str) -> None:
        run.notes.note(code, message, run.step)

    check = HeadCheck(
        run.model,
        run.probe,
        named,
        partial(_change, run),
        note,
        RowPlace(run.probe, partial(_move, run), note),
        lambda: run.wanted_step is not None,
        partial(_ended, run),
        run.faults.failed,
    )
    if not (named and run.head is None):  # else rows come from a tap alone
        run.hooks.add(run.model, check)
        run.loss_sources.look = partial(_look, run, check)
    if run.head is not None:
        _hook(run, run.head)
    return check


def _look(run: Run, check: HeadCheck, loss: Any) -> None:
    """Look at the graph that ends in the node of a loss that is trained."""
    try:
        run.recomputer.cancels |= loss is not None and is_chunked(loss)
    except Exception as error:
        run.faults.failed("head_check", error)
    check.loss(loss)


def _hook(run: Run, head: Head) -> None:
    """Hook the head, and a fused loss that holds it."""
    run.hooks.add(head.module, run.probe)
    loss = fused_loss_of(run.model, head)
    if loss is not None:
        run.hooks.add(loss, FusedLossHook(run.recomputer, run.faults.failed))


def _ended(run: Run, check: HeadCheck) -> None:
    """Look at no further losses, and at no output of the model but for rows in it."""
    run.loss_sources.look = None
    place = None if run.probe.head is None else run.probe.head.place
    if not check.traced and (place is None or place.where == "nowhere"):
        run.hooks.drop(check)


def _move(run: Run, head: Head) -> None:
    """Read the rows of the same head elsewhere from now on, or nowhere."""
    if not run.closed:
        run.head = run.reader.head = run.probe.head = run.recomputer.head = head
        if not run.probe.tapped:
            _forget_rows(run)


def _forget_rows(run: Run) -> None:
    """Forget the rows of another head, or of other logits."""
    run.probe.restart()
    run.step_reader.forget_rows()
    if run.rows.measured:  # already; else the facts are those of a resumed run
        run.rows.loss_kind = run.rows.single_output = None
        run.rows.absorbed = {}
    run.rows.clear(run.step + 1)


def _set_head(run: Run, head: Head) -> None:
    """Read the weight of the same head along its other axis."""
    run.head = run.reader.head = run.recomputer.head = head
    run.silence.watch(head)
    run.notes.by_code.pop("head_parameter", None)  # it named another number of classes
    run.notes.attached(run.model, head, run.reader)


def _change(run: Run, head: Head | None, code: str, message: str) -> None:
    """Watch another head from now on, or none, and say so."""
    if run.closed:
        return
    if not run.rank_search.watch(head):  # the ranks have agreed on the layout of the first one
        run.notes.note(
            "wrong_head", f"{message} After the first reading it is not changed any more.", run.step
        )
        return
    unregister(run.owner, run.watched_module)
    # The old hook stays until the end: torch cannot remove a hook from a module that is being called.
    before = None if run.head is None else run.head.module
    run.head = run.reader.head = run.probe.head = run.recomputer.head = head
    run.silence.watch(head)
    register(run.owner, run.watched_module)
    _forget_rows(run)
    run.probe.restart(retired=before)
    if head is not None and head.module is not before:
        _hook(run, head)
    for earlier in ("no_head", "several_heads"):  # these were about the first one
        run.notes.by_code.pop(earlier, None)
    run.notes.note(code, message, run.step)
    if head is not None:
        run.notes.attached(run.model, head, run.reader)
