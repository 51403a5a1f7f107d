"""Take a snapshot of a watched run, and replay its last slingshot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nfi_monitor.capture.foreign_optimizer import ForeignOptimizer
from nfi_monitor.engine.loop import StepLoop
from nfi_monitor.errors import MonitorError
from nfi_monitor.replay.arm import Arm
from nfi_monitor.replay.planning import plan
from nfi_monitor.replay.run import RECIPE, STEP_FN, replay
from nfi_monitor.replay.snapshots import Snapshot
from nfi_monitor.replay.verdict import ReplayVerdict


def take_snapshot(loop: StepLoop) -> Snapshot:
    """Return the state of the run after the last step. Raises MonitorError once the monitor is closed."""
    if loop.closed:
        raise MonitorError("A closed monitor does not hold the model. Use Snapshot.take(step, model, ...).")
    _check_optimizer(loop)
    spike, decay = loop.detector.spike.state_dict(), loop.detector.signals.decay
    return Snapshot.take(
        loop.step, loop.model, loop.optimizer, loop.stateful, spike, second_moment_decay=decay
    )


def replay_slingshot(
    loop: StepLoop,
    step_fn: Callable[[int], Any],
    arms: Sequence[Arm] | None,
    steps: int | None,
    snapshot: Snapshot | None,
) -> ReplayVerdict:
    """Replay the last slingshot and report the verdict; see :meth:`nfi_monitor.Monitor.replay`."""
    if not callable(step_fn):
        raise MonitorError(f"replay needs a function, got {type(step_fn).__name__}. {STEP_FN} {RECIPE}")
    if loop.closed:
        raise MonitorError(
            "A closed monitor does not hold the model. Call monitor.replay before close(), inside the "
            "with block, or nfi_monitor.replay.replay(snapshot, step_fn, model=..., optimizer=...) with "
            f"one of monitor.snapshots. {RECIPE}"
        )
    _check_optimizer(loop)
    loop.judge.settle()
    context = loop.detector.context
    start = plan(list(loop.detector.alerts), loop.recent_snapshots, context.tau, snapshot, steps)
    taken = start.snapshot
    if taken.second_moment_decay == 0.0:  # taken by the user: read the decay from the history
        read_at, decays = loop.judge.history["second_moment_decay"]
        known = decays[read_at <= taken.step]
        if len(known):
            taken = replace(taken, second_moment_decay=float(known[-1]))
    verdict = replay(
        taken,
        step_fn,
        arms,
        start.steps,
        model=loop.model,
        optimizer=loop.optimizer,
        head=loop.head if loop.head is not None else False,
        stateful=loop.stateful,
        beta2=context.beta2,
        recorded={int(step): float(loss) for step, loss in zip(*loop.judge.history["loss"], strict=True)},
        thresholds=loop.thresholds,
    )
    verdict = replace(verdict, slingshot=None if start.slingshot is None else start.slingshot.id)
    loop.replays.append(verdict)
    loop.reports.replay(verdict)
    return verdict


def _check_optimizer(loop: StepLoop) -> None:
    optimizer: object = loop.optimizer
    if isinstance(optimizer, ForeignOptimizer):
        raise MonitorError(
            f"{type(optimizer).__name__} is no torch.optim.Optimizer: its state cannot be put back, so "
            "there are no snapshots and no replays of this run."
        )
