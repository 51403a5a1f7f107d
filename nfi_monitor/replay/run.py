"""Diagnosis by replay: go back to before a slingshot and see which change makes it not happen.

A signal that precedes a spike may be its cause or its companion.  Here the run is continued from a snapshot
once as it was and then under *arms*, each of which takes one possible cause away: the loss in float64, the
zero-sum restored, the second moment held, the learning rate held.  The arm under which nothing happens names
the mechanism; :mod:`nfi_monitor.replay.verdict` holds the rules.

    def step_fn(step):                       # one whole optimizer step, its data included
        x, y = batches[step]
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    verdict = replay(snapshot, step_fn, model=model, optimizer=optimizer, stateful=[scheduler])

The price is one short training per arm.  Afterwards everything is as it was, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace as replaced
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nfi_monitor.capture.head import find_head
from nfi_monitor.capture.optimizer import OptimizerReader, unwrap
from nfi_monitor.deprecation import renamed_keyword
from nfi_monitor.detect.spike import QUIET, SpikeDetector
from nfi_monitor.errors import MonitorError
from nfi_monitor.open_monitors import open_monitors
from nfi_monitor.replay.arms import (
    ARMS,
    AS_IT_WAS,
    FLOAT64_LOSS,
    LARGER_EPS,
    LR_HELD,
    NUDGED,
    OTHER_DATA,
    SECOND_MOMENT_HELD,
    SECOND_MOMENT_RESET,
    SMALLER_LR,
    ZERO_SUM,
    Arm,
    Context,
    combined,
    larger_eps,
    smaller_lr,
)
from nfi_monitor.replay.recent_snapshots import RecentSnapshots
from nfi_monitor.replay.replayed_step import OBJECTIONS, replaying
from nfi_monitor.replay.snapshots import Snapshot
from nfi_monitor.replay.verdict import BASELINE, Outcome, ReplayVerdict, arm_in_words, judge, margin
from nfi_monitor.types import Alert, AlertKind, Thresholds

StepFunction = Callable[[int], Any]


class Plan(NamedTuple):
    """Where a replay of a watched run begins, for how many steps (None: the default), and of what."""

    snapshot: Snapshot
    steps: int | None
    slingshot: Alert | None


__all__ = [
    "ARMS", "AS_IT_WAS", "FLOAT64_LOSS", "LARGER_EPS", "LR_HELD", "NUDGED", "OTHER_DATA",
    "SECOND_MOMENT_HELD", "SECOND_MOMENT_RESET", "SMALLER_LR", "ZERO_SUM", "Arm", "Context", "Outcome",
    "ReplayVerdict", "Snapshot", "combined", "larger_eps", "replay", "smaller_lr",
]  # fmt: skip

STEP_FN = (
    "step_fn(step) has to do one whole optimizer step number `step` (counted from 1) and return its loss: "
    "fetch that step's batch itself, zero_grad, forward, backward, clip, optimizer.step(), scheduler.step()."
)
RECIPE = (
    "With a HuggingFace Trainer: loader = trainer.get_train_dataloader(), made with the run's args.seed; in "
    "step_fn(step) loader.set_epoch(the epoch), batches = iter(loader), advanced to that step's (under "
    "torch.random.fork_rng(), unless the step begins an epoch), inputs, items = "
    "trainer.get_batch_samples(batches, accumulation, device), losses = trainer.training_step(model, one, "
    "items) for each of them, clip by args.max_grad_norm, trainer.optimizer.step(), "
    "trainer.lr_scheduler.step(), model.zero_grad(); return the losses' sum (their mean, if the model is not "
    "told items). stateful=[trainer.lr_scheduler]; the callback has given it to its monitor."
)


def plan(
    alerts: Sequence[Alert],
    ring: RecentSnapshots,
    tau: float,
    snapshot: Snapshot | None = None,
    steps: int | None = None,
) -> Plan:
    """How to replay the last slingshot of a run: from the newest snapshot at least 2 τ before it, or else the
    oldest, until max(2 τ, 20) steps after it. What is given stays.

    Raises MonitorError, saying why, where there is no snapshot.
    """
    slingshot = next((a for a in reversed(alerts) if a.kind is AlertKind.SLINGSHOT), None)
    if snapshot is None:
        snapshot = _snapshot_before(slingshot, ring, tau)
    if slingshot is not None and slingshot.first_step <= snapshot.step:
        slingshot = None  # the given snapshot is of later: what comes is another one
    if steps is None and slingshot is not None:
        steps = slingshot.first_step - snapshot.step + margin(tau)
    return Plan(snapshot, steps, slingshot)


def _snapshot_before(slingshot: Alert | None, ring: RecentSnapshots, tau: float) -> Snapshot:
    kept = ring.snapshots
    before = [s for s in kept if slingshot is None or s.step < slingshot.first_step]
    if before:
        early = [s for s in before if slingshot is None or s.step <= slingshot.first_step - round(2 * tau)]
        return early[-1] if early else before[0]
    if kept and slingshot is not None:
        why = f"those kept are of steps {kept[0].step:,}–{kept[-1].step:,}, after the slingshot began"
    elif ring.refused:
        why = ring.refused
    elif not ring.limit:
        why = "the monitor was told to keep none"
    else:
        why = "one is taken when an at-risk alert begins, and none has, or it failed (see monitor.notes)"
    raise MonitorError(
        f"No snapshot to replay from: {why}. Pass snapshots=<bytes> to Monitor (say snapshots=4 << 30), "
        "or take one yourself with Snapshot.take(step, model, optimizer, stateful) and pass snapshot=."
    )


@renamed_keyword("extras", "stateful")
def replay(
    snapshot: Snapshot,
    step_fn: StepFunction,
    arms: Sequence[Arm] | None = None,
    steps: int | None = None,
    *,
    model: nn.Module,
    optimizer: Any,
    head: nn.Module | str | bool | None = None,
    stateful: Sequence[Any] = (),
    beta2: float | None = None,
    recorded: Mapping[int, float] | None = None,
    thresholds: Thresholds | None = None,
) -> ReplayVerdict:
    """Continue from ``snapshot`` under each arm; which arms spike is the verdict.

    Args:
        snapshot: where to go back to; at least 1.25 τ before the slingshot, or float64 comes too late.
        step_fn: ``step_fn(step) -> loss`` does optimizer step number ``step`` (from 1) as the run did,
            deterministic in ``step`` and in the random state, and returns its loss.
        arms: which to try, default :data:`ARMS`; the run as it was is always replayed first.
        steps: how many optimizer steps to wait for the slingshot (default: max(10 τ, 200)). The other arms
            run until max(2 τ, 20) steps after the slingshot of the run as it was, however long that is.
        model, optimizer, head, stateful: as for :class:`nfi_monitor.Monitor`; in ``stateful`` whatever else
            step_fn advances, in the order the snapshot was taken with.
        beta2: for τ = 1/(1−β2); default: that of the head's parameter group, or .99 where it has no betas
            (:data:`nfi_monitor.capture.optimizer.ASSUMED_BETAS`).
        recorded: optimizer step → loss of the original run, for the bitwise check.
        thresholds: what counts as a slingshot.

    Afterwards, exceptions included, weights, buffers, gradients, optimizer state, hyperparameters, stateful
    objects, training mode and random state are what they were before the call.  Monitors open on the model
    are paused. Remedies that are on act from the step from which they did in the run (of those that began
    without an open monitor nobody knows: in all), and are not used up; an eps that was raised since is not
    raised again.

    Raises:
        MonitorError: step_fn is no function, returns no loss, makes no optimizer step, or raises; or a
            learning rate is lowered for a number of steps, nobody knows since when.
        ValueError: the snapshot is of another model or optimizer, or two arms have one name.
    """
    if not callable(step_fn):
        raise MonitorError(f"replay needs a function, got {type(step_fn).__name__}. {STEP_FN} {RECIPE}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: replay at least 1 step.")
    tried = [AS_IT_WAS, *(arm for arm in (ARMS if arms is None else arms) if arm.name != BASELINE)]
    names = [arm.name for arm in tried]
    if len(set(names)) < len(names):
        raise ValueError(f"Two arms have the same name: {', '.join(names)}.")
    found = None if head is False else find_head(model, None if head is True else head)
    inner = unwrap(optimizer)
    for objection in OBJECTIONS:
        why = objection(inner)
        if why is not None:
            raise MonitorError(why)
    if beta2 is None:
        beta2 = OptimizerReader(inner, found).betas_or_assumed()[1]
    tau = 1.0 / max(1.0 - beta2, 1e-9)
    wait = math.ceil(max(10 * tau, 200.0)) if steps is None else steps
    limits = thresholds or Thresholds()

    outcomes: dict[str, Outcome] = {}
    with _monitors_paused(model, inner), _put_back(model, inner, stateful) as parameters:
        for arm in tried:
            snapshot.restore(model, inner, stateful)
            for param in parameters:
                param.grad = None
            context = Context(model, inner, found, snapshot, wait)
            outcome = _run(arm, context, step_fn, tau, limits, recorded)
            if outcomes and outcome.losses == outcomes[BASELINE].losses:
                outcome = replaced(outcome, applied=False)  # a constant rate is held, one batch is repeated
            outcomes[arm.name] = outcome
            spiked = outcomes[BASELINE].spiked_at
            if spiked is None:
                break  # nothing to avert: every arm would be silent
            wait = spiked - snapshot.step + margin(tau)
    mechanism, reasons = judge(outcomes, snapshot.step, tau)
    reproduced = _reproduced(outcomes[BASELINE], snapshot.step, recorded)
    if reproduced is False:
        reasons.append(_not_reproduced(inner, stateful))
    idle = [arm for arm in outcomes.values() if not arm.applied]
    if idle:
        reasons.append(f"made no difference at all: {', '.join(arm_in_words(arm.arm) for arm in idle)}")
    return ReplayVerdict(snapshot.step, outcomes, mechanism, tuple(reasons), reproduced)


def _run(
    arm: Arm,
    context: Context,
    step_fn: StepFunction,
    tau: float,
    limits: Thresholds,
    recorded: Mapping[int, float] | None,
) -> Outcome:
    start = context.snapshot.step
    detector = _detector(context.snapshot, tau, limits, recorded)
    losses: list[float] = []
    spiked_at = None
    taken = 0

    def count(*_: Any) -> None:
        nonlocal taken
        taken += 1

    rates: list[float] = []

    def rate(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates.append(float(optimizer.param_groups[0]["lr"]))

    counter = context.optimizer.register_step_post_hook(count)
    reader = context.optimizer.register_step_pre_hook(rate)
    try:
        with arm.change(context):
            for step in range(start + 1, start + context.steps + 1):
                before = taken
                with replaying(step):
                    loss = _loss(step_fn(context.data_step(step)), step)
                if taken > before + 1:
                    raise MonitorError(f"step_fn({step}) made {taken - before} optimizer steps. {STEP_FN}")
                losses.append(loss)
                was = detector.state
                if not math.isfinite(loss):
                    spiked_at = step
                elif detector.update(step, loss, tau, limits) != QUIET and was == QUIET:
                    spiked_at = detector.start
                if spiked_at is not None:
                    break
                # A gradient scaler may skip some steps, but not so many.
                if taken == 0 and len(losses) >= 20:
                    break
    except MonitorError:
        raise
    except Exception as error:
        raise MonitorError(
            f"The arm {arm.name!r} failed at step {start + len(losses) + 1}: {type(error).__name__}: "
            f"{error}. Everything is as it was before the replay. Leave that arm out with arms=[...], or "
            "mend step_fn."
        ) from error
    finally:
        counter.remove()
        reader.remove()
    if losses and taken == 0:
        raise MonitorError(f"step_fn made no step of the optimizer that was given. {STEP_FN}")
    peak = max((loss for loss in losses if math.isfinite(loss)), default=math.nan)
    known = [*context.snapshot.lrs[:1], *rates]
    jump = max((new / old for old, new in pairwise(known) if old > 0), default=1.0)
    return Outcome(
        arm.name,
        spiked_at,
        peak,
        tuple(losses),
        len(losses),
        context.applied,
        max(jump, 1.0),
        context.note,
    )


def _loss(value: Any, step: int) -> float:
    if isinstance(value, Tensor):
        return float(value.detach().mean(dtype=torch.float64)) if value.numel() > 1 else float(value.detach())
    try:
        return float(value)
    except (TypeError, ValueError):
        raise MonitorError(
            f"step_fn({step}) returned {type(value).__name__}, not a loss. {STEP_FN}"
        ) from None


def _detector(
    snapshot: Snapshot, tau: float, limits: Thresholds, recorded: Mapping[int, float] | None
) -> SpikeDetector:
    """The spike detector as it stood at the snapshot; without its state, one fed the losses until then."""
    detector = SpikeDetector()
    if snapshot.spike is not None:
        detector.load_state_dict(dict(snapshot.spike))
    else:
        for step in sorted(step for step in recorded or () if step <= snapshot.step):
            detector.update(step, (recorded or {})[step], tau, limits)
    return detector


def _reproduced(outcome: Outcome, start: int, recorded: Mapping[int, float] | None) -> bool | None:
    pairs = [
        (loss, (recorded or {})[step])
        for step, loss in enumerate(outcome.losses, start + 1)
        if step in (recorded or {})
    ]
    return all(map(_same, *zip(*pairs, strict=True))) if pairs else None


def _same(loss: float, known: float) -> bool:
    # The monitor may have kept a float64 loss as float32.
    return loss == known or (loss != loss and known != known) or _as_float32(loss) == known


def _as_float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _not_reproduced(optimizer: torch.optim.Optimizer, stateful: Sequence[Any]) -> str:
    text = (
        "as it was, the losses are not those of the original run to the last bit: step_fn, its batches or "
        "its random numbers differ from the run's"
    )
    scheduled = hasattr(optimizer.step, "_wrapped_by_lr_sched")
    if scheduled and not any(getattr(extra, "optimizer", None) is optimizer for extra in stateful):
        text += ", or its learning rate does: the scheduler is not among stateful="
    return text


# --- nothing of a replay stays ----------------------------------------------------------------------


@contextmanager
def _put_back(
    model: nn.Module, optimizer: torch.optim.Optimizer, stateful: Sequence[Any]
) -> Iterator[list[nn.Parameter]]:
    """All that a replay moves, restored at the end; gives the parameters, whose gradients it may drop."""
    before = Snapshot.take(0, model, optimizer, stateful)
    params = {id(p): p for p in model.parameters()}
    params |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
    # The gradients' own tensors are kept aside: step_fn may zero or scale them in place.
    gradients = [(param, param.grad) for param in params.values()]
    try:
        yield list(params.values())
    finally:
        before.restore(model, optimizer, stateful)
        for param, gradient in gradients:
            param.grad = gradient


@contextmanager
def _monitors_paused(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    with ExitStack() as stack:
        for monitor in open_monitors(model, optimizer):
            stack.enter_context(monitor.paused())
        yield
