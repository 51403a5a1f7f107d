"""One family and seed under every remedy: from the start, from an alarm on, and flown by the Autopilot."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F

from nfi_monitor import Alert, AlertKind, AlertState, Autopilot, Mechanism, Monitor, Severity
from nfi_monitor.detect.spike import QUIET, SpikeDetector
from nfi_monitor.replay import replay
from nfi_monitor.replay.snapshots import Snapshot
from nfi_monitor.types import Thresholds
from tests.benchmarks.detection.experiments.plan import AVERTED_FOR
from tests.benchmarks.detection.experiments.trials import NoMonitor
from tests.benchmarks.detection.training import Training
from tests.benchmarks.remedies.matrix import (
    PILOTS,
    REMEDIES,
    Case,
    exchange_loss,
    held_out,
    loss_in_float64,
)

PLAIN = "nothing"
WHENS = ("at risk", "imminent", "0.5 τ before")
"""From which moment on; *at risk* of severity *warning* (the feature mean grows) where rows absorb."""
FOUND_WITHIN = 20
"""Steps."""
Record = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One thing to try; its record is kept under :attr:`name`."""

    case: Case
    seed: int
    remedy: str
    when: str  # "start", "live", "alarms" or "step time"

    @property
    def name(self) -> str:
        return f"{self.case.family.name}-{self.seed}-{self.when}-{self.remedy}"


def trials_of(case: Case, seed: int) -> list[Trial]:
    """The run as it is comes first: the others need its alarms."""
    starts = [remedy.name for remedy in case.remedies() if remedy.from_start]
    alarms = [remedy.name for remedy in case.remedies() if remedy.from_alarm]
    return [
        Trial(case, seed, PLAIN, "live"),
        *(Trial(case, seed, name, "start") for name in starts),
        *(Trial(case, seed, name, "live") for name in case.pilots()),
        *(Trial(case, seed, name, "alarms") for name in alarms),
    ]


# --- one training ------------------------------------------------------------------------------------


@dataclass
class Spikes:
    """Where slingshots begin, by the monitor's own rule, from the losses alone."""

    tau: float
    starts: list[int] = field(default_factory=list)
    detector: SpikeDetector = field(default_factory=SpikeDetector)

    def saw(self, step: int, loss: float) -> bool:
        """Whether one begins here. A loss that is not finite is one, and the last."""
        was = self.detector.state
        now = self.detector.update(step, loss, self.tau, Thresholds())
        if not math.isfinite(loss) or (now != QUIET and was == QUIET):
            self.starts.append(self.detector.start if math.isfinite(loss) else step)
            return True
        return False


def tau_of(training: Training) -> float:
    return 1.0 / (1.0 - training.optimizer.param_groups[0]["betas"][1])


def outcome(case: Case, seed: int, training: Training, starts: Iterable[int]) -> Record:
    """What is left at the end: loss (float64) on the rows trained on, accuracy on others, weight norm."""
    training.model.eval()
    with torch.no_grad():
        losses = [
            float(loss_in_float64(training, batch)) for batch in training.micro_batches(case.family.steps)
        ]
        inputs, target = held_out(case.family, seed)
        logits = training.model(inputs)
        said = (logits.squeeze(1) > 0).long() if logits.shape[-1] == 1 else logits.argmax(-1)
        norm = math.sqrt(sum(float(p.double().square().sum()) for p in training.model.parameters()))
    return {
        "slingshots": list(starts),
        "loss": _number(statistics.fmean(losses)),
        "accuracy": float((said == target).double().mean()),
        "weight_norm": _number(norm),
    }


def from_start(trial: Trial) -> Record:
    training = trial.case.family.build(trial.seed, trial.case.family.arm)
    spikes, unmonitored = Spikes(tau_of(training)), NoMonitor()
    REMEDIES[trial.remedy].apply(training, spikes.tau)
    for step in range(1, trial.case.family.steps + 1):
        training.step(step, cast(Monitor, unmonitored))
        loss = unmonitored.loss()
        spikes.saw(step, loss)
        if not math.isfinite(loss):
            break
    return outcome(trial.case, trial.seed, training, spikes.starts)


# --- under a monitor ----------------------------------------------------------------------------------


class _Loss(NoMonitor):
    """Hands everything on to the monitor, and keeps the step's loss."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__()
        self._monitor = monitor

    def observe_loss(self, loss: torch.Tensor) -> None:
        super().observe_loss(loss)
        self._monitor.observe_loss(loss)


def live(trial: Trial) -> Record:
    """As a user has it: the monitor's defaults, and the Autopilot where the trial names one."""
    case = trial.case
    training = case.family.build(trial.seed, case.family.arm)
    spikes = Spikes(tau_of(training))
    told: list[tuple[int, Alert]] = []
    pilot = None if trial.remedy == PLAIN else Autopilot(PILOTS[trial.remedy])
    if pilot is not None and "not routed" not in trial.remedy and case.remedies()[0].needs_classes:
        exchange_loss(training, pilot.loss)
    heard: Callable[[Alert], None] = pilot or (lambda alert: told.append((monitor.step, alert)))
    with Monitor(
        training.model, training.optimizer, console=False, on_alert=heard, **training.watch
    ) as monitor:
        seen = _Loss(monitor)
        for step in range(1, case.family.steps + 1):
            training.step(step, cast(Monitor, seen))
            spikes.saw(step, seen.loss())
    record = outcome(case, trial.seed, training, spikes.starts)
    record["mechanisms"] = [
        str(alert.mechanism) for alert in monitor.alerts if alert.kind is AlertKind.SLINGSHOT
    ]
    if pilot is not None:
        record["actions"] = [f"{action.step}: {action.what}" for action in pilot.actions]
        record["stopped"] = pilot.should_stop
    else:
        within = round(WARNED_WITHIN * spikes.tau)
        record["alarms"] = [
            _alarms(told, spikes.starts, index, within) for index in range(len(spikes.starts))
        ]
    return record


WARNED_WITHIN = 10.0
"""τ between the end of an alarm and a slingshot that it is an alarm of."""


def _alarms(
    told: list[tuple[int, Alert]], starts: list[int], index: int, within: int
) -> dict[str, int | None]:
    """When a slingshot's alarms were raised: the first since the one before that did not end long ago."""
    start, since = starts[index], starts[index - 1] if index else 0
    ended = {alert.id: alert.last_step for _, alert in told if alert.state is AlertState.RESOLVED}

    def first(kind: AlertKind) -> int | None:
        steps = [
            step
            for step, alert in told
            if alert.kind is kind
            and alert.state is AlertState.FIRING
            and since <= step < start <= ended.get(alert.id, start) + within
            and (kind is not AlertKind.AT_RISK or _grows(alert))
        ]
        return min(steps, default=None)

    return {"at risk": first(AlertKind.AT_RISK), "imminent": first(AlertKind.IMMINENT)}


def _grows(alert: Alert) -> bool:
    numeric = alert.mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION
    return not numeric or alert.severity.rank >= Severity.WARNING.rank


# --- from an alarm on ---------------------------------------------------------------------------------


def from_alarms(case: Case, seed: int, names: list[str], plain: Record) -> dict[str, Record]:
    """Go back to before the first slingshots of the run as it was, and on with each remedy.

    Averted: none until ``AVERTED_FOR`` τ after it came in the run as it was.  A slingshot without an alarm
    has no lead, and is on record as it was.  The run is made again without a monitor, and compared with it.
    """
    training = case.family.build(seed, case.family.arm)
    tau, starts = tau_of(training), plain["slingshots"][: case.slingshots]
    wanted: dict[tuple[int, str], int] = {}
    for index, start in enumerate(starts):
        moments = {**plain["alarms"][index], "0.5 τ before": max(start - round(tau / 2), 1)}
        wanted |= {(index, when): step for when, step in moments.items() if step is not None}
    extras = () if training.scheduler is None else (training.scheduler,)
    before = {index: max(start - max(round(2 * tau), 20), 1) for index, start in enumerate(starts)}
    kept: dict[int, Snapshot] = {}
    spikes, unmonitored = Spikes(tau), NoMonitor()
    losses: dict[int, float] = {}
    # A slingshot may be found some steps after the one that it is then said to have begun at.
    for step in range(1, max(starts, default=-FOUND_WITHIN) + FOUND_WITHIN + 1):
        training.step(step, cast(Monitor, unmonitored))
        losses[step] = unmonitored.loss()
        spikes.saw(step, losses[step])
        if step in wanted.values() or step in before.values():
            state = spikes.detector.state_dict()
            kept[step] = Snapshot.take(step, training.model, training.optimizer, extras, spike=state)
    if spikes.starts[: len(starts)] != starts:
        raise RuntimeError(
            f"{case.family.name}-{seed}: not the run that was monitored: {spikes.starts}, {starts}"
        )

    def follow(remedy: str, step: int, until: int) -> int | None:
        kept[step].restore(training.model, training.optimizer, extras)
        other = _copy(case, seed, training)  # a remedy may leave its hooks behind
        watch = Spikes(tau)
        watch.detector.load_state_dict(dict(kept[step].spike or {}))
        REMEDIES[remedy].apply(other, tau)
        for number in range(step + 1, until + 1):
            other.step(number, cast(Monitor, unmonitored))
            if watch.saw(number, unmonitored.loss()):
                return number
        return None

    records: dict[str, Record] = {}
    for name in names:
        events = []
        for index, start in enumerate(starts):
            until = start + round(AVERTED_FOR * tau)
            spiked = {
                when: follow(name, wanted[index, when], until) if (index, when) in wanted else start
                for when in WHENS
            }
            leads = {when: (start - step) / tau for (i, when), step in wanted.items() if i == index}
            events.append({"start": start, "spiked_at": spiked, "leads": leads})
        records[name] = {"events": events}
    records[REPLAYS] = {
        "mechanisms": [
            _replayed(training, kept[before[index]], start, losses, extras)
            for index, start in enumerate(starts)
        ]
    }
    return records


REPLAYS = "replays"


def _copy(case: Case, seed: int, training: Training) -> Training:
    """The same training at the same step, with hooks of its own."""
    fresh = case.family.build(seed, case.family.arm)
    fresh.model.load_state_dict(training.model.state_dict())
    fresh.optimizer.load_state_dict(training.optimizer.state_dict())
    if fresh.scheduler is not None and training.scheduler is not None:
        fresh.scheduler.load_state_dict(training.scheduler.state_dict())
    return fresh


def _replayed(
    training: Training,
    snapshot: Snapshot,
    start: int,
    losses: dict[int, float],
    extras: tuple[Any, ...],
) -> str:
    """What a replay says that the slingshot came from."""
    unmonitored, tau = NoMonitor(), tau_of(training)

    def step_fn(number: int) -> float:
        training.step(number, cast(Monitor, unmonitored))
        return unmonitored.loss()

    snapshot.restore(training.model, training.optimizer, extras)
    verdict = replay(
        snapshot,
        step_fn,
        steps=start + max(round(2 * tau), 20) - snapshot.step,
        model=training.model,
        optimizer=training.optimizer,
        head=training.watch.get("head"),
        stateful=extras,
        beta2=1.0 - 1.0 / tau,
        recorded=losses,
    )
    return str(verdict.mechanism)


# --- what it costs ------------------------------------------------------------------------------------


def step_time(case: Case, remedy: str, steps: int = 400) -> Record:
    """Remedied over plain: paired, interleaved steps, each second pair in the other order.

    The first step of a pair finds cold caches, and a neighbour's work in them: so the two orders are told
    apart, and the ratio is the geometric mean of their medians.
    """
    pair = [case.family.build(0, case.family.arm) for _ in range(2)]
    for training in pair:
        for step in range(1, 21):
            training.step(step, cast(Monitor, NoMonitor()))
    own = pair[1].loss
    REMEDIES[remedy].apply(pair[1], tau_of(pair[1]))
    if pair[1].loss is not own:  # exchanging it from outside takes a tenth of such a step
        exchange_loss(pair[0], F.cross_entropy)
    unmonitored = NoMonitor()
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for step in range(21, steps + 21):
        plain_first = step % 2 == 0
        seconds = []
        for training in pair if plain_first else pair[::-1]:
            started = time.perf_counter()
            training.step(step, cast(Monitor, unmonitored))
            seconds.append(time.perf_counter() - started)
        ratios[plain_first].append(seconds[1] / seconds[0] if plain_first else seconds[0] / seconds[1])
    first, second = (statistics.median(ratios[order][10:]) for order in (True, False))
    return {"ratio": math.sqrt(first * second), "low": min(first, second), "high": max(first, second)}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
