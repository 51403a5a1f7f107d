"""Save a monitor's state for the run's checkpoint, and restore it.

A state is read as a whole before anything of the monitor changes.  So a state that is refused leaves the
monitor as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from nfi_monitor._version import __version__
from nfi_monitor.detect.detector import Detector
from nfi_monitor.engine.loop import StepLoop
from nfi_monitor.engine.reader_state import ReaderState
from nfi_monitor.schema import decode
from nfi_monitor.types import Note, Phase

PHASES = 4_096
"""Number of changes of the phase in a saved state: the last ones. A checkpoint must not grow with the run."""


def state_dict(loop: StepLoop) -> dict[str, Any]:
    """Return detector, alerts and schedule in plain types; see :meth:`nfi_monitor.Monitor.state_dict`."""
    # Save deferred losses and do not judge them here: the original run judges them later, together.
    loop.losses.flush(loop.transfer)
    loop.judge.drain(everything=True)
    return {
        "version": __version__,
        "step": loop.step,
        "detector": loop.detector.state_dict(),
        "interval": loop.schedule.healthy_interval,
        "lowered": loop.schedule.reduced_sample,
        "phases": [[step, phase.value] for step, phase in loop.judge.phases[-PHASES:]],
        **loop.step_reader.state_dict(loop.step),
        "plain_losses": [[step, loss] for step, loss in loop.losses.deferred],
        "reports_untrained": loop.loss_sources.reports_untrained,
        "notes": [[note.code, note.message, note.step] for note in loop.notes.by_code.values()],
    }


class _Saved(TypedDict, total=False):
    """Declaration of a state; the detector's and the reader's parts are read by their own classes."""

    interval: int | None
    lowered: bool
    reports_untrained: bool
    plain_losses: list[tuple[int, float]]


class _Needed(_Saved):
    step: int
    detector: dict[str, Any]
    phases: list[tuple[int, Phase]]
    notes: list[tuple[str, str, int]]


class _State(NamedTuple):
    """A state that was read as a whole."""

    saved: Any
    reader: ReaderState


def load_state_dict(loop: StepLoop, state: Mapping[str, Any]) -> None:
    """Continue where :func:`state_dict` left off.

    Raises ValueError for a state of another kind and for a damaged one, and then changes nothing.
    """
    if not isinstance(state, Mapping) or "detector" not in state or "step" not in state:
        found = sorted(map(str, state))[:8] if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"Not a monitor's state: expected keys 'step' and 'detector', found {found}. Pass what "
            "monitor.state_dict() returned."
        )
    try:
        read = _read(loop, state)
    except Exception as error:  # whatever a wrong value makes of it: nothing has changed yet
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"Not a monitor's state, or a damaged one: {what}. The monitor goes on without it. Pass what "
            "monitor.state_dict() returned."
        ) from error
    _apply(loop, read)


def _read(loop: StepLoop, state: Mapping[str, Any]) -> _State:
    """Return the state in checked form. Raises any error for a wrong one; changes nothing."""
    saved = decode(_Needed, dict(state))
    if saved["step"] < 0 or (saved.get("interval") or 1) < 1 or not saved["phases"]:
        raise ValueError("step, interval or phases are of no run")
    Detector(loop.thresholds, loop.detector.context).load_state_dict(saved["detector"])
    weight = loop.head.weight if loop.head is not None else None
    device = weight.device if weight is not None else next(loop.model.parameters()).device
    return _State(saved, loop.step_reader.read_state(state, device))


def _apply(loop: StepLoop, read: _State) -> None:
    saved = read.saved
    step, waiting = saved["step"], saved.get("plain_losses", [])
    if step < loop.step:
        # The deferred losses will be judged again.
        _forget_after(loop, min([step, *(waited - 1 for waited, _ in waiting)]))
    loop.step = step
    loop.detector.load_state_dict(saved["detector"])
    loop.recent_snapshots.clear()
    if loop.schedule.budget is not None:
        loop.schedule.healthy_interval = saved.get("interval")
        loop.schedule.reduced_sample = isinstance(loop.every, str) and saved.get("lowered", False)
    loop.judge.phases[:] = saved["phases"]
    loop.step_reader.apply_state(read.reader)
    loop.losses.deferred = waiting
    loop.loss_sources.resume(reports_untrained=saved.get("reports_untrained", False))
    if loop.membership.exchange is not None:  # with several ranks no loss is deferred
        loop.judge.judge_deferred()
    loop.rows.clear(loop.step + 1)
    loop.look_ahead()
    for code, message, noted in saved["notes"]:
        loop.notes.by_code.setdefault(code, Note(code, message, noted))


def _forget_after(loop: StepLoop, last: int) -> None:
    """Remove readings and replays after step ``last``: the run goes back to it."""
    loop.losses.flush(loop.transfer)
    loop.transfer.take(everything=True)
    loop.judge.recorded.cut(last)
    loop.replays[:] = [verdict for verdict in loop.replays if verdict.snapshot_step <= last]
    loop.reports.went_back()
