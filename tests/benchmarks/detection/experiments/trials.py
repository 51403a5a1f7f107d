"""Train a recorded run again, without a monitor, and continue it in other ways from the steps of the plan."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nfi_monitor import Monitor
from nfi_monitor.capture.head import find_head
from nfi_monitor.detect.spike import QUIET, SpikeDetector
from nfi_monitor.replay.run import (
    AS_IT_WAS,
    FLOAT64_LOSS,
    ZERO_SUM,
    Arm,
    ArmContext,
    combined,
    replay,
    smaller_lr,
)
from nfi_monitor.replay.snapshots import Snapshot
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.types import Thresholds
from tests.benchmarks.detection.experiments.plan import Plan, Stretch, Trial, averted
from tests.benchmarks.detection.families import Family
from tests.benchmarks.detection.generate import Run
from tests.benchmarks.detection.replay import replay as replay_readings
from tests.benchmarks.detection.training import Training

GROWS_LESS = 0.01 * Thresholds().inflating_growth
"""Nats per τ of ln‖μ_G‖ or ln‖w‖ by which a twin must grow less to confirm a state: 1% of what is
inflating. Without a floor, one of two meaningless differences points the right way three times in four."""


def remedy_arms(tau: float) -> dict[str, Arm]:
    """Name in the plan → what is switched on at the alarm."""
    briefly = smaller_lr(0.1, steps=round(2 * tau))
    return {
        "float64 loss": FLOAT64_LOSS,
        # Float64 from the alarm on: the small learning rate gives it the time it needs.
        "lr × 0.1 for 2τ, then float64": combined(FLOAT64_LOSS, briefly),
        "lr × 0.1 for 2τ": briefly,
        "lr × 0.1 for 300 steps": smaller_lr(0.1, steps=300),
        "zero-sum projection": ZERO_SUM,
    }


class NoMonitor:
    """Stands where the training expects a monitor: keeps the step's loss, watches nothing."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []

    def observe_loss(self, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def tap(self, logits: Tensor) -> Tensor:
        return logits

    def loss(self) -> float:
        """Mean over the step's micro-batches, rounded as the monitor's own, to be compared bit for bit."""
        wide = (torch.float32, torch.float64)
        losses = torch.stack(
            [loss.mean(dtype=loss.dtype if loss.dtype in wide else torch.float32) for loss in self._losses]
        )
        self._losses.clear()
        if len(losses) > 1:
            return float(torch.where(torch.isfinite(losses), losses, torch.nan).nanmean())
        return float(losses[0])


class Rerun:
    """The training of a recorded run, built again, with snapshots of the steps that were asked for.

    Attributes:
        snapshots: step → snapshot, with the :class:`SpikeDetector` of the losses until then.
        differs_at: the first step whose loss is not the recorded one bit for bit, or None. Later steps have
            no snapshot: the recorded alarms are not this training's.
    """

    def __init__(
        self,
        family: Family,
        seed: int,
        recorded: Mapping[int, float],
        tau: float,
        decays: Mapping[int, float] | None = None,
    ) -> None:
        self.training: Training = family.build(seed, family.arm)
        self.recorded = recorded
        self.decays = decays or {}
        self.tau = tau
        self.snapshots: dict[int, Snapshot] = {}
        self.differs_at: int | None = None
        self._monitor = NoMonitor()

    def step(self, number: int) -> float:
        """Make optimizer step ``number``; returns its loss."""
        self.training.step(number, cast(Monitor, self._monitor))
        return self._monitor.loss()

    @property
    def extras(self) -> tuple[Any, ...]:
        return () if self.training.scheduler is None else (self.training.scheduler,)

    @property
    def head(self) -> Any:
        return self.training.watch.get("head")

    def train(self, snapshots: Sequence[int]) -> None:
        """From the beginning to the last step a snapshot is wanted of."""
        detector, limits, wanted = SpikeDetector(), Thresholds(), set(snapshots)
        for number in range(1, max(wanted, default=0) + 1):
            loss = self.step(number)
            if not same(loss, self.recorded[number]):
                self.differs_at = number
                return
            detector.update(number, loss, self.tau, limits)
            if number in wanted:
                self.snapshots[number] = Snapshot.take(
                    number,
                    self.training.model,
                    self.training.optimizer,
                    self.extras,
                    spike=detector.state_dict(),
                    second_moment_decay=self.decays.get(number, 0.0),
                )

    # --- other ways on -----------------------------------------------------------------------------

    def follow(self, stretch: Stretch, arm: Arm) -> int | None:
        """Go on under an arm: where the first slingshot starts, or None.

        :func:`nfi_monitor.replay.replay` stops soon after the slingshot of the run as it was: enough to tell
        what caused it, not to tell that none comes for 10 τ.  The training is left where it got to.
        """
        model, optimizer = self.training.model, self.training.optimizer
        snapshot, limits, detector = self.snapshots[stretch.step], Thresholds(), SpikeDetector()
        snapshot.restore(model, optimizer, self.extras)
        detector.load_state_dict(dict(snapshot.spike or {}))
        head = None if self.head is False else find_head(model, self.head)
        context = ArmContext(model, optimizer, head, snapshot, stretch.steps)
        with arm.change(context):
            for number in range(stretch.step + 1, stretch.end + 1):
                was, loss = detector.state, self.step(context.data_step(number))
                if not math.isfinite(loss):
                    return number
                if detector.update(number, loss, self.tau, limits) != QUIET and was == QUIET:
                    return detector.start
        return None

    def replay(self, stretch: Stretch) -> ReplayVerdict:
        """The causal verdict over a stretch."""
        return replay(
            self.snapshots[stretch.step],
            self.step,
            steps=stretch.steps,
            model=self.training.model,
            optimizer=self.training.optimizer,
            head=self.head,
            stateful=self.extras,
            beta2=1.0 - 1.0 / self.tau,
            recorded=self.recorded,
        )

    def twin(self, stretch: Stretch) -> dict[str, Any]:
        """How much ‖μ_G‖ and the weights' norm grow over the stretch, in nats, as it was and in float64."""
        batch = stretch.step + 1  # the same rows at both ends
        self.snapshots[stretch.step].restore(self.training.model, self.training.optimizer, self.extras)
        start = self.norms(batch)
        ends = []
        for arm in (AS_IT_WAS, FLOAT64_LOSS):
            spiked_at = self.follow(stretch, arm)
            ends.append(self.norms(batch) if spiked_at is None else (math.nan, math.nan))
        floor = GROWS_LESS * stretch.steps / self.tau
        feature, weight = ([_growth(start[which], end[which]) for end in ends] for which in (0, 1))
        return {
            "confirmed": any(grown[1] < grown[0] - floor for grown in (feature, weight)),
            "steps": stretch.steps,
            "feature_growth": [_number(value) for value in feature],
            "weight_growth": [_number(value) for value in weight],
        }

    def norms(self, batch: int) -> tuple[float, float]:
        """‖μ_G‖ over the rows of optimizer step ``batch`` (NaN without a head) and the weights' norm."""
        model = self.training.model
        parameters = [parameter.detach().double().norm() for parameter in model.parameters()]
        weight = float(torch.linalg.vector_norm(torch.stack(parameters)))
        if self.head is False:
            return math.nan, weight
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.append(inputs[0].detach().double().flatten(0, -2))

        handle = find_head(model, self.head).module.register_forward_pre_hook(keep)
        try:
            for micro_batch in self.training.micro_batches(batch):
                self.training.loss(self.training, micro_batch, cast(Monitor, self._monitor))
        finally:
            handle.remove()
        return float(torch.cat(seen).mean(0).norm()), weight


def seconds_per_step(family: Family, seed: int, steps: int = 15) -> float:
    """What an optimizer step of the bare training takes here, when nothing else runs.

    Not from the recorded times: they hold the monitor's readings and whatever ran beside them.
    """
    rerun, times = Rerun(family, seed, {}, math.nan), []
    for number in range(1, steps + 1):
        started = time.perf_counter()
        rerun.step(number)
        times.append(time.perf_counter() - started)
    return min(times)


def carry_out(family: Family, seed: int, run: Run, plan: Plan) -> dict[str, Any]:
    """Do what the plan says; plain types, ready for JSON: ``{"events", "at_risk", "differs_at"}``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as recorded: another number of threads rounds sums in another order
    try:
        steps, losses = run.columns["loss"]
        decays = dict(enumerate(replay_readings(run).decays.tolist()))
        recorded = dict(zip(steps.tolist(), losses.tolist(), strict=True))
        rerun = Rerun(family, seed, recorded, plan.tau, decays)
        rerun.train(plan.snapshots)
        where = {"family": family.name, "seed": seed}
        return {
            "events": [
                {**where, **_event(rerun, plan, trial)}
                for trial in plan.trials
                if all(stretch.step in rerun.snapshots for stretch in trial.stretches())
            ],
            "at_risk": [
                {**where, "step": twin.step, "twin": rerun.twin(twin)}
                for twin in plan.twins
                if twin.step in rerun.snapshots
            ],
            "differs_at": rerun.differs_at,
        }
    finally:
        torch.set_num_threads(threads)


def _event(rerun: Rerun, plan: Plan, trial: Trial) -> dict[str, Any]:
    start, remedy = trial.slingshot.start, trial.remedy
    arms = remedy_arms(plan.tau)
    # Not warned of is not averted, whatever the remedy.
    worked = dict.fromkeys(plan.remedies, False)
    spiked_at: dict[str, int | None] = dict.fromkeys(plan.remedies, start)
    if remedy is not None:
        spiked_at = {name: rerun.follow(remedy, arms[name]) for name in plan.remedies}
        worked = {name: averted(step, remedy) for name, step in spiked_at.items()}
    verdict = rerun.replay(trial.replay)
    return {
        "alarm": "imminent",
        "alarm_step": None if remedy is None else remedy.step,
        "slingshot_step": start,
        "lead_tau": None if remedy is None else (start - remedy.step) / plan.tau,
        "remedies": worked,
        "spiked_at": spiked_at,
        "replay": {
            "snapshot_step": trial.replay.step,
            "mechanism": str(verdict.mechanism),
            "reproduced": verdict.reproduced,
            "arms": {name: outcome.spiked_at for name, outcome in verdict.outcomes.items()},
            "reasons": list(verdict.reasons),
        },
        "at_risk_step": None if trial.twin is None else trial.twin.step,
        "twin": None if trial.twin is None else rerun.twin(trial.twin),
        "named": trial.named,
    }


def same(one: float, other: float) -> bool:
    """Equal bit for bit (NaN is NaN)."""
    return one == other or (math.isnan(one) and math.isnan(other))


def _growth(start: float, end: float) -> float:
    return math.log(end / start) if start > 0 and end > 0 else math.nan


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
