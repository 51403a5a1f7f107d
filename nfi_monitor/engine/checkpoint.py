"""Save a monitor's state for the run's checkpoint, and restore it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nfi_monitor._version import __version__
from nfi_monitor.engine.loop import StepLoop
from nfi_monitor.types import Note, Phase


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
        "phases": [[step, phase.value] for step, phase in loop.judge.phases],
        **loop.step_reader.state_dict(loop.step),
        "plain_losses": [[step, loss] for step, loss in loop.losses.deferred],
        "notes": [[note.code, note.message, note.step] for note in loop.notes.by_code.values()],
    }


def load_state_dict(loop: StepLoop, state: Mapping[str, Any]) -> None:
    """Continue where :func:`state_dict` left off. Raises ValueError for a state of another kind."""
    if "detector" not in state or "step" not in state:
        raise ValueError(
            "Not a monitor's state: expected keys 'step' and 'detector', found "
            f"{sorted(map(str, state))[:8]}. Pass what monitor.state_dict() returned."
        )
    step = int(state["step"])
    waiting = [(int(waited), float(loss)) for waited, loss in state.get("plain_losses", [])]
    if step < loop.step:
        # The deferred losses will be judged again.
        _forget_after(loop, min([step, *(waited - 1 for waited, _ in waiting)]))
    loop.step = step
    loop.detector.load_state_dict(state["detector"])
    loop.recent_snapshots.clear()
    if loop.schedule.budget is not None:
        loop.schedule.healthy_interval = state.get("interval")
        loop.schedule.reduced_sample = isinstance(loop.every, str) and bool(state.get("lowered"))
    loop.judge.phases[:] = [(int(step), Phase(phase)) for step, phase in state["phases"]]
    weight = loop.head.weight if loop.head is not None else None
    device = weight.device if weight is not None else next(loop.model.parameters()).device
    loop.step_reader.load_state_dict(state, device)
    loop.losses.deferred = waiting
    if loop.membership.exchange is not None:  # with several ranks no loss is deferred
        loop.judge.judge_deferred()
    loop.rows.clear(loop.step + 1)
    loop.look_ahead()
    for code, message, step in state["notes"]:
        loop.notes.by_code.setdefault(code, Note(code, message, int(step)))


def _forget_after(loop: StepLoop, last: int) -> None:
    """Remove readings and replays after step ``last``: the run goes back to it."""
    loop.losses.flush(loop.transfer)
    loop.transfer.take(everything=True)
    loop.judge.recorded.cut(last)
    loop.replays[:] = [verdict for verdict in loop.replays if verdict.snapshot_step <= last]
    loop.reports.went_back()
