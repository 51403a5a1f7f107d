"""Detach a loop from its training: at ``close()``, and in a forked process."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress

from nfi_monitor.engine.loop import StepLoop
from nfi_monitor.open_monitors import unregister
from nfi_monitor.types import Change

_LOOPS: weakref.WeakSet[StepLoop] = weakref.WeakSet()


def abandon_if_forked(loop: StepLoop) -> None:
    """Detach this loop in processes that are forked later: they inherit the hooks, but train nothing."""
    _LOOPS.add(loop)


def close(loop: StepLoop) -> None:
    """Detach all hooks and finish the reports. Calling it again does nothing.

    Each part is guarded, so that an error in one part does not stop the others from detaching.
    """
    if loop.closed:
        return
    loop.closed = True
    guarded = loop.faults.guarded
    with guarded("close"):
        if loop.membership.leave(loop.handles[0], loop.step, loop.detector):
            del loop.handles[0]
    for handle in loop.handles:
        with guarded("close"):
            handle.remove()
    loop.handles.clear()
    for ending in loop.close_callbacks:
        with guarded("close"):
            ending()
    loop.close_callbacks.clear()
    _LOOPS.discard(loop)
    with guarded("close"):
        unregister(loop.owner, loop.watched_module)
    with guarded("close"):
        loop.judge.settle()
        loop.recent_snapshots.close()
    with guarded("close"):
        loop.schedule.finish()
    with guarded("close"):
        loop.step_reader.release()
    with guarded("close"):  # an error here must not hide an exception of the user's code
        _finish_reports(loop)
    with guarded("close"):
        loop.judge.release()
    # The user may keep the monitor for its history: it must not keep the model and the optimizer alive.
    loop.probe.head = None
    del loop.owner, loop.model, loop.optimizer, loop.reader, loop.head, loop.stateful


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


def _abandon_all() -> None:
    """Detach all loops without any report: the files and the other ranks belong to the parent process."""
    for loop in list(_LOOPS):
        loop.closed = True
        for handle in loop.handles:
            with suppress(Exception):
                handle.remove()
        loop.handles.clear()
        loop.reports.sinks.clear()
    _LOOPS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
