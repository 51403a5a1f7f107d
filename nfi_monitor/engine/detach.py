"""Detach a loop from its training: at ``close()``, after an attach that failed, and in a forked process."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import suppress

from nfi_monitor.engine.loop import StepLoop
from nfi_monitor.registry import unregister
from nfi_monitor.types import Change

_LOOPS: weakref.WeakSet[StepLoop] = weakref.WeakSet()


def abandon_if_forked(loop: StepLoop) -> None:
    """Detach this loop in processes that are forked later: they inherit the hooks, but train nothing."""
    _LOOPS.add(loop)


def close(loop: StepLoop) -> None:
    """Detach all hooks and finish the reports. Calling it again does nothing.

    An error in one part is reported, and the other parts still run.  Ctrl-C ends the part in which it
    arrives; the others still run, and the interrupt is raised at the end.  Calling ``close`` again then
    repeats what was interrupted.
    """
    # A callback or a sink may call close() from inside it.
    if loop.closing or (loop.closed and not loop.endings):
        return
    try:
        loop.closing = True
        if not loop.closed:
            loop.endings = list(_ENDINGS)
            loop.closed = True
        _run_endings(loop)
    finally:
        loop.closing = False


def _run_endings(loop: StepLoop) -> None:
    interrupt: BaseException | None = None
    for ending in list(loop.endings):
        if ending is _release_references and interrupt is not None:
            break
        try:
            with loop.faults.guarded("close"):
                ending(loop)
        except BaseException as raised:
            interrupt = interrupt or raised
        else:
            loop.endings.remove(ending)
    if interrupt is not None:
        raise interrupt


def _remove_hooks(loop: StepLoop) -> None:
    loop.hooks.remove_forward()


def _unregister(loop: StepLoop) -> None:
    """Let a new monitor attach."""
    unregister(loop.owner, loop.watched_module)


def _leave_ranks(loop: StepLoop) -> None:
    """Leave the other ranks, which may take until their timeout, and remove the optimizer's hooks."""
    handed_over = False
    with loop.faults.guarded("close"):
        loop.judge.receive(loop.membership.last_readings(loop.step))
    try:
        handed_over = loop.membership.leave(loop.hooks.step, loop.step, loop.detector)
    finally:
        if not handed_over:
            loop.hooks.step.remove()


def _call_back(loop: StepLoop) -> None:
    while loop.close_callbacks:
        with loop.faults.guarded("close"):
            loop.close_callbacks[0]()
        loop.close_callbacks.pop(0)


def _settle(loop: StepLoop) -> None:
    loop.judge.settle()
    loop.recent_snapshots.close()


def _finish_schedule(loop: StepLoop) -> None:
    loop.schedule.finish()


def _release_tensors(loop: StepLoop) -> None:
    loop.step_reader.release()
    loop.silence.release()
    if loop.head_check is not None:
        loop.head_check.stop()
    loop.rank_search.release()


def _finish_reports(loop: StepLoop) -> None:
    loop.rows.clear(loop.step + 1)
    loop.probe.forget()
    loop.final_info = loop.info()
    reports = loop.reports
    still_firing = loop.detector.run_ended(loop.step)
    if reports.sinks:
        for alert in still_firing:
            reports.alert(alert, Change.UPDATE)
        reports.close(loop.info(), loop.summary())


def _release_judge(loop: StepLoop) -> None:
    loop.judge.release()


def _release_references(loop: StepLoop) -> None:
    """Release model and optimizer: the user may keep the monitor for its history."""
    loop.probe.head = None
    for name in ("owner", "model", "optimizer", "reader", "head", "stateful"):
        vars(loop).pop(name, None)
    _LOOPS.discard(loop)


_ENDINGS: tuple[Callable[[StepLoop], None], ...] = (
    _remove_hooks, _unregister, _leave_ranks, _call_back, _settle, _finish_schedule, _release_tensors,
    _finish_reports, _release_judge, _release_references,
)  # fmt: skip
"""The parts of :func:`close`, in their order.  Each may run twice."""


def _abandon_all() -> None:
    """Detach all loops without any report: the files and the other ranks belong to the parent process."""
    for loop in list(_LOOPS):
        loop.closed = True
        loop.endings.clear()
        with suppress(Exception):
            loop.hooks.remove_forward()
        with suppress(Exception):
            loop.hooks.step.remove()
        loop.reports.sinks.clear()
    _LOOPS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
