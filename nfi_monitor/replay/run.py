"""Find the cause of a slingshot by replay: restore an earlier step and see which change averts it.

A signal that precedes a spike may be its cause, or only come with it.  So the run is continued from a
snapshot, once unchanged and then under *arms*.  Each arm removes one possible cause: the loss in float64, the
zero-sum restored, the second moment held, the learning rate held.  The arm without a slingshot names the
mechanism, by the rules of :mod:`nfi_monitor.replay.verdict`.

    def step_fn(step):                       # one whole optimizer step, its data included
        x, y = batches[step]
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    verdict = replay(snapshot, step_fn, model=model, optimizer=optimizer, stateful=[scheduler])

A replay costs one short training per arm.  Afterwards weights, buffers, gradients, optimizer state,
hyperparameters, ``stateful``, training mode and random state are as before, to the last bit.  Monitors that
are open on the model are paused.  A remedy takes effect at its original step.  If no monitor was open when
the remedy began, that step is unknown, and the remedy acts at all steps.  The replayed steps do not count
towards the duration of a remedy.  An eps that was raised after the snapshot is not raised in the replay.
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

from nfi_monitor.capture.head import Head, find_head
from nfi_monitor.capture.names import HeadLike
from nfi_monitor.capture.optimizer import OptimizerReader
from nfi_monitor.capture.unwrap import unwrap
from nfi_monitor.deprecation import renamed_keyword
from nfi_monitor.detect.spike import QUIET, SpikeDetector
from nfi_monitor.errors import MonitorError
from nfi_monitor.registry import open_monitors
from nfi_monitor.replay.arm import Arm, ArmContext, combined
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
)
from nfi_monitor.replay.optimizer_arms import larger_eps, smaller_lr
from nfi_monitor.replay.replayed_step import OBJECTIONS, replaying
from nfi_monitor.replay.sag import jumps
from nfi_monitor.replay.snapshots import Snapshot
from nfi_monitor.replay.verdict import BASELINE, Outcome, ReplayVerdict, arm_in_words, judge, margin
from nfi_monitor.types import Thresholds

StepFunction = Callable[[int], Any]
LAST = 24
"""Last losses of the unchanged run in which its slingshot is looked for: it may be seen in a mean of 20."""


__all__ = [
    "ARMS", "AS_IT_WAS", "FLOAT64_LOSS", "LARGER_EPS", "LR_HELD", "NUDGED", "OTHER_DATA",
    "SECOND_MOMENT_HELD", "SECOND_MOMENT_RESET", "SMALLER_LR", "ZERO_SUM", "Arm", "ArmContext",
    "Outcome", "ReplayVerdict", "Snapshot", "combined", "larger_eps", "replay", "smaller_lr",
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


@renamed_keyword("extras", "stateful")
def replay(
    snapshot: Snapshot,
    step_fn: StepFunction,
    arms: Sequence[Arm] | None = None,
    steps: int | None = None,
    *,
    model: nn.Module,
    optimizer: Any,
    head: Head | HeadLike | bool | None = None,
    stateful: Sequence[Any] = (),
    beta2: float | None = None,
    recorded: Mapping[int, float] | None = None,
    thresholds: Thresholds | None = None,
) -> ReplayVerdict:
    """Continue from ``snapshot`` under each arm, and conclude from the arms that spike.

    Args:
        snapshot: where to start; at least 1.25 τ before the slingshot, because float64 works too late after.
        step_fn: ``step_fn(step) -> loss`` does optimizer step number ``step`` (from 1) as the run did,
            deterministic in ``step`` and in the random state, and returns its loss.
        arms: default :data:`ARMS`; the unchanged run is always replayed first.
        steps: maximum number of steps to the slingshot of the unchanged run (default: max(10 τ, 200)). The
            other arms run until max(2 τ, 20) steps after that slingshot.
        model, optimizer, head, stateful: as for :class:`nfi_monitor.Monitor`; ``stateful`` as in the
            snapshot.
        beta2: for τ = 1/(1−β2); default: that of the head's parameter group, or .99 where it has no betas
            (:data:`nfi_monitor.capture.optimizer.ASSUMED_BETAS`).
        recorded: optimizer step → loss of the original run, for the bitwise check.
        thresholds: the levels of the loss that define a slingshot.

    The call restores everything afterwards, also if it raises an error (see the module).

    Raises:
        MonitorError: step_fn is no function, returns no loss, makes no optimizer step, or raises an error; or
            a timed cool-down with an unknown start step is active.
        ValueError: the snapshot is of another model or optimizer, or two arms have one name.
    """
    tried = _tried(step_fn, arms, steps)
    if not isinstance(head, Head):
        head = None if head is False else find_head(model, None if head is True else head)
    inner = unwrap(optimizer)
    for objection in OBJECTIONS:
        why = objection(inner)
        if why is not None:
            raise MonitorError(why)
    if beta2 is None:
        beta2 = OptimizerReader(inner, head).betas_or_assumed()[1]
    tau = 1.0 / max(1.0 - beta2, 1e-9)
    wait = math.ceil(max(10 * tau, 200.0)) if steps is None else steps
    run = _Run(model, inner, head, snapshot, step_fn, tau, thresholds or Thresholds(), recorded)
    with _monitors_paused(model, inner), _put_back(model, inner, stateful) as parameters:
        outcomes = _outcomes(run, tried, wait, stateful, parameters)
    return _verdict(run, outcomes, stateful)


def _tried(step_fn: StepFunction, arms: Sequence[Arm] | None, steps: int | None) -> list[Arm]:
    """Return the arms in their order, the unchanged run first. Raises as :func:`replay`."""
    if not callable(step_fn):
        raise MonitorError(f"replay needs a function, got {type(step_fn).__name__}. {STEP_FN} {RECIPE}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: replay at least 1 step.")
    tried = [AS_IT_WAS, *(arm for arm in (ARMS if arms is None else arms) if arm.name != BASELINE)]
    names = [arm.name for arm in tried]
    if len(set(names)) < len(names):
        raise ValueError(f"Two arms have the same name: {', '.join(names)}.")
    return tried


class _Run(NamedTuple):
    """The settings that all arms of a replay share."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    head: Head | None
    snapshot: Snapshot
    step_fn: StepFunction
    tau: float
    limits: Thresholds
    recorded: Mapping[int, float] | None


def _outcomes(
    run: _Run,
    tried: Sequence[Arm],
    wait: int,
    stateful: Sequence[Any],
    parameters: Sequence[nn.Parameter],
) -> dict[str, Outcome]:
    """Run the arms, the first for ``wait`` steps. Stop after the first if it has no slingshot."""
    outcomes: dict[str, Outcome] = {}
    snapshot = run.snapshot
    for arm in tried:
        snapshot.restore(run.model, run.optimizer, stateful)
        for param in parameters:
            param.grad = None
        context = ArmContext(run.model, run.optimizer, run.head, snapshot, wait)
        # Only a slingshot that jumps can be told from a sag.
        sags = arm.may_sag and bool(outcomes) and jumps(outcomes[BASELINE].losses[-LAST:])
        outcome = _try(arm, context, run, sags=sags)
        if outcomes and outcome.losses == outcomes[BASELINE].losses:
            outcome = replaced(outcome, applied=False)  # nothing changed: a constant rate, or the same batch
        outcomes[arm.name] = outcome
        spiked = outcomes[BASELINE].spiked_at
        if spiked is None:
            break  # without a slingshot in the unchanged run, no arm can avert one
        wait = spiked - snapshot.step + margin(run.tau)
    return outcomes


def _verdict(run: _Run, outcomes: dict[str, Outcome], stateful: Sequence[Any]) -> ReplayVerdict:
    step = run.snapshot.step
    mechanism, reasons = judge(outcomes, step, run.tau)
    reproduced = _reproduced(outcomes[BASELINE], step, run.recorded)
    if reproduced is False:
        reasons.append(_not_reproduced(run.optimizer, stateful))
    idle = [arm for arm in outcomes.values() if not arm.applied]
    if idle:
        reasons.append(f"had no effect: {', '.join(arm_in_words(arm.arm) for arm in idle)}")
    return ReplayVerdict(step, outcomes, mechanism, tuple(reasons), reproduced)


class _Steps:
    """Count the optimizer steps that ``step_fn`` makes, and keep the first group's learning rate in each."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.taken = 0
        self.rates: list[float] = []
        counter = optimizer.register_step_post_hook(self._count)
        reader = optimizer.register_step_pre_hook(self._rate)
        self._handles = (counter, reader)

    def _count(self, *_: Any) -> None:
        self.taken += 1

    def _rate(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _try(arm: Arm, context: ArmContext, run: _Run, *, sags: bool) -> Outcome:
    """Train under one arm until the loss spikes, or for ``context.steps`` steps.

    ``sags``: a slow rise of the loss is the arm's own, and no slingshot.
    """
    start = context.snapshot.step
    detector = _detector(context.snapshot, run.tau, run.limits, run.recorded)
    losses: list[float] = []
    steps = _Steps(context.optimizer)
    try:
        with arm.change(context):
            spiked_at = _train(context, run, detector, steps, losses, sags=sags)
    except MonitorError:
        raise
    except Exception as error:
        raise MonitorError(
            f"The arm {arm.name!r} failed at step {start + len(losses) + 1}: {type(error).__name__}: "
            f"{error}. Everything is as it was before the replay. Leave that arm out with arms=[...], or "
            "correct step_fn."
        ) from error
    finally:
        steps.remove()
    if losses and steps.taken == 0:
        raise MonitorError(f"step_fn made no step of the given optimizer. {STEP_FN}")
    peak = max((loss for loss in losses if math.isfinite(loss)), default=math.nan)
    known = [*context.snapshot.lrs[:1], *steps.rates]
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


def _train(
    context: ArmContext,
    run: _Run,
    detector: SpikeDetector,
    steps: _Steps,
    losses: list[float],
    *,
    sags: bool,
) -> int | None:
    """Add each step's loss to ``losses``; return the first step of the slingshot, None if there is none."""
    start, sagging = context.snapshot.step, False
    for step in range(start + 1, start + context.steps + 1):
        before = steps.taken
        with replaying(step):
            loss = _loss(run.step_fn(context.data_step(step)), step)
        if steps.taken > before + 1:
            raise MonitorError(f"step_fn({step}) made {steps.taken - before} optimizer steps. {STEP_FN}")
        losses.append(loss)
        was = detector.state
        if not math.isfinite(loss):
            return step
        if detector.update(step, loss, run.tau, run.limits) != QUIET and (was == QUIET or sagging):
            since = max(detector.start - start - 2, 0) if was == QUIET else len(losses) - 2
            if not sags or jumps(losses[since:]):
                return detector.start if was == QUIET else step
            sagging = True
        # A gradient scaler may skip some steps, but not this many in a row.
        if steps.taken == 0 and len(losses) >= 20:
            break
    return None


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
    """Return the spike detector with its state at the snapshot.

    If the snapshot has no such state, the detector reads the recorded losses up to the snapshot.
    """
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
        "the unchanged arm does not give the original losses to the last bit: step_fn, its batches or its "
        "random numbers differ from the run's"
    )
    scheduled = hasattr(optimizer.step, "_wrapped_by_lr_sched")
    if scheduled and not any(getattr(extra, "optimizer", None) is optimizer for extra in stateful):
        text += ", or its learning rate does: the scheduler is not among stateful="
    return text


# --- restore everything -----------------------------------------------------------------------------


@contextmanager
def _put_back(
    model: nn.Module, optimizer: torch.optim.Optimizer, stateful: Sequence[Any]
) -> Iterator[list[nn.Parameter]]:
    """Restore everything at the end of the block. Yields the parameters, whose gradients may be dropped."""
    before = Snapshot.take(0, model, optimizer, stateful)
    params = {id(p): p for p in model.parameters()}
    params |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
    # The gradients' own tensors are kept: step_fn may zero or scale them in place.
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
