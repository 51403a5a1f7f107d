"""A recorded run → what is tried from which step. Numbers in, numbers out: no training, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nfi_monitor.types import Alert, AlertKind, Mechanism
from tests.benchmarks.detection import score
from tests.benchmarks.detection.families import EXTERNAL, NUMERIC, Family
from tests.benchmarks.detection.generate import Run
from tests.benchmarks.detection.replay import replay
from tests.benchmarks.detection.score import Event, Truth

AVERTED_FOR = 10.0
"""τ after the start of the original slingshot for which none may come: later is another story."""
BEFORE = 4.0, 40.0
"""Where a mechanism is replayed from: so many τ before the slingshot, or so many steps if that is more.
Float64 needs 1.25 τ to help: nearer than that every arm spikes and nothing is told apart."""
BEFORE_AT_MOST = 40.0, 800
"""τ and steps: a replay starts where *at risk* began, as a user's would, unless that is longer ago."""
MARGIN = 2.0, 20.0
"""τ, or steps if that is more, that an arm is followed beyond the slingshot: a spike may shift."""
TWIN_FOR = 10.0
"""τ for which a float64 twin is followed where no slingshot comes ..."""
TWIN_AT_MOST = 40.0
"""... and at most where one does: to its last step but one, because what leads there may begin late."""
LONG_TAU = 500.0
"""From this τ on (β2 = .998) one slingshot a run: a single one costs tens of thousands of steps."""

REMEDIES = {
    NUMERIC: ("float64 loss", "lr × 0.1 for 2τ, then float64", "lr × 0.1 for 2τ", "zero-sum projection"),
    EXTERNAL: (),  # nothing switched on before a kick from outside is its remedy
}
OTHER_REMEDIES = ("lr × 0.1 for 2τ", "lr × 0.1 for 300 steps")
"""Of spikes that are neither numeric nor external."""

ARMS = 10  # that a replay has, about: for the estimate of cost only


@dataclass(frozen=True)
class Stretch:
    """From the state after optimizer step ``step`` for so many ``steps``."""

    step: int
    steps: int

    @property
    def end(self) -> int:
        return self.step + self.steps


@dataclass(frozen=True)
class Trial:
    """All that is tried at one slingshot."""

    slingshot: Event
    named: str  # the monitor's mechanism; "none" where it raised no alert
    remedy: Stretch | None  # from the *imminent* alarm; None: there was no alarm, so nothing was averted
    replay: Stretch
    twin: Stretch | None  # from the *at risk* alarm; None: there was none, or not a numeric one

    def nearer(self, tau: float) -> Trial:
        """The same, replayed from no earlier than BEFORE."""
        first = max(self.replay.step, self.slingshot.start - _before(tau))
        return replace(self, replay=Stretch(first, self.replay.end - first))

    def stretches(self) -> Iterator[Stretch]:
        yield from (part for part in (self.remedy, self.replay, self.twin) if part is not None)


@dataclass(frozen=True)
class Plan:
    """What is tried on one run."""

    tau: float
    remedies: tuple[str, ...]
    trials: tuple[Trial, ...] = ()
    twins: tuple[Stretch, ...] = ()
    """Numeric *at risk* states that no slingshot followed."""

    @property
    def snapshots(self) -> list[int]:
        """Optimizer steps after which a snapshot is needed."""
        wanted = {part.step for trial in self.trials for part in trial.stretches()}
        return sorted(wanted | {twin.step for twin in self.twins})

    @property
    def cost(self) -> int:
        """Optimizer steps it takes at most, the way to the last snapshot included."""
        steps = max(self.snapshots, default=0)
        for trial in self.trials:
            steps += 0 if trial.remedy is None else len(self.remedies) * trial.remedy.steps
            steps += ARMS * trial.replay.steps + (0 if trial.twin is None else 2 * trial.twin.steps)
        return steps + sum(2 * twin.steps for twin in self.twins)


def plan_of(family: Family, run: Run, *, most: int = 3, affordable: float = math.inf) -> Plan:
    """The first ``most`` slingshots of a run and as many numeric *at risk* states without one.

    ``affordable`` is in optimizer steps.  (A VGG's step takes fifty times an MLP's.)  Where a plan would cost
    more, first the replay begins nearer to the slingshot, then all but the first of each kind are left out.
    """
    truth, alerts = _heard(family, run)
    remedies = () if family.quiet else REMEDIES.get(family.mechanism or "", OTHER_REMEDIES)
    plan = Plan(run.tau, remedies)
    if run.tau >= LONG_TAU:
        most = min(most, 1)
    # What should not spike has nothing to be averted; should it spike nevertheless, the score says so.
    trials = [] if family.quiet else trials_of(alerts, truth, numeric=family.mechanism == NUMERIC)
    for trial in trials[:most]:
        nearer = trial.nearer(run.tau)
        if not steady(run, trial.replay.step + 1, nearer.replay.step + 1):
            trial = nearer
        longer = [replace(plan, trials=(*plan.trials, one)) for one in (trial, nearer)]
        fits = [one for one in longer if one.cost <= affordable]
        if plan.trials and not fits:
            break
        plan = fits[0] if fits else longer[1]
    for twin in lone_twins(alerts, truth)[:most]:
        with_twin = replace(plan, twins=(*plan.twins, twin))
        if (plan.trials or plan.twins) and with_twin.cost > affordable:
            break
        plan = with_twin
    return plan


def material(family: Family, run: Run) -> tuple[Any, ...]:
    """All that a plan depends on besides the run and its budget, in plain types: the same, the same plan."""
    truth, alerts = _heard(family, run)
    numeric = Mechanism.NUMERICAL_FEATURE_INFLATION
    said = [
        (str(alert.kind), alert.first_step, alert.last_step, alert.mechanism is numeric) for alert in alerts
    ]
    return truth, said


def _heard(family: Family, run: Run) -> tuple[Truth, list[Alert]]:
    steps, loss = run.columns["loss"]
    truth = score.truth_of(steps.tolist(), loss.tolist(), run.tau, quiet=family.quiet)
    return truth, replay(run).alerts


def steady(run: Run, first: int, last: int) -> bool:
    """Whether the learning rate of two optimizer steps is the same, as far as it was recorded.

    A replay that begins in the warm-up holds a small learning rate in its arm *lr held*, and would find that
    the schedule is to blame for whatever comes after it.
    """
    steps, rates = run.columns.get("learning_rate", ((), ()))
    known = dict(zip(steps, rates, strict=True))
    return bool(known.get(first) == known.get(last))


def trials_of(alerts: Sequence[Alert], truth: Truth, *, numeric: bool) -> list[Trial]:
    """One trial a slingshot, in order."""
    tau = truth.tau
    named = score.mechanisms(alerts, truth)
    imminent = score.firing_steps(alerts, AlertKind.IMMINENT)
    at_risk = score.firing_steps(alerts, AlertKind.AT_RISK)
    trials = []
    for index, event in enumerate(truth.slingshots):
        alarm, risk = alarm_before(imminent, truth, index), alarm_before(at_risk, truth, index)
        after = round(event.start + AVERTED_FOR * tau)
        before = _before(tau)
        if risk is not None and event.start - risk <= min(BEFORE_AT_MOST[0] * tau, BEFORE_AT_MOST[1]):
            before = max(before, event.start - risk)
        # In the slingshot before there is nothing to continue from: this one would not be told from it.
        since = truth.slingshots[index - 1].end + 1 if index else 1
        first = min(max(event.start - before, since), event.start - 1)
        margin = round(max(MARGIN[0] * tau, MARGIN[1]))
        twin = None
        if numeric and risk is not None and is_numeric(alerts, risk):
            twin = _twin(risk, TWIN_AT_MOST * tau, event.start)
        trials.append(
            Trial(
                event,
                named.get(event.start, "none"),
                None if alarm is None else Stretch(alarm, after - alarm),
                Stretch(first, event.start + margin - first),
                twin,
            )
        )
    return trials


def alarm_before(sounded: Iterable[int], truth: Truth, index: int) -> int | None:
    """Where the alarm began by which a slingshot was warned of, as the score counts it; None without one.

    The score gives leads, in the order of the slingshots that were warned of: one more slingshot gives one
    more lead, or none.
    """
    sounded = list(sounded)
    leads = [
        score.judge(sounded, replace(truth, slingshots=truth.slingshots[:count])).leads
        for count in (index, index + 1)
    ]
    return None if len(leads[1]) == len(leads[0]) else truth.slingshots[index].start - leads[1][-1][0]


def lone_twins(alerts: Sequence[Alert], truth: Truth) -> list[Stretch]:
    """Numeric *at risk* alarms that no slingshot followed, within the horizon or while they sounded."""
    pause = truth.pause
    twins = []
    for alarm in score.alarms_of(score.firing_steps(alerts, AlertKind.AT_RISK), truth):
        following = [event.start for event in truth.slingshots if event.start > alarm.start]
        if any(start - alarm.start <= truth.horizon or start - alarm.end <= pause for start in following):
            continue
        twin = _twin(alarm.start, TWIN_FOR * truth.tau, min(following, default=None))
        if twin is not None and is_numeric(alerts, alarm.start):
            twins.append(twin)
    return twins


def is_numeric(alerts: Iterable[Alert], step: int) -> bool:
    """Whether the *at risk* alert that fired at ``step`` speaks of rounding."""
    return any(
        alert.kind is AlertKind.AT_RISK
        and alert.first_step <= step <= alert.last_step
        and alert.mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION
        for alert in alerts
    )


def _twin(step: int, longest: float, slingshot: int | None) -> Stretch | None:
    """Until the slingshot, or for so many steps; None where there is no room."""
    steps = round(longest)
    if slingshot is not None:
        steps = min(steps, slingshot - 1 - step)
    return Stretch(step, steps) if steps >= 1 else None


def _before(tau: float) -> int:
    return round(max(BEFORE[0] * tau, BEFORE[1]))


def averted(spiked_at: int | None, stretch: Stretch) -> bool:
    """No slingshot from the alarm to ``AVERTED_FOR`` τ after the original's start."""
    return spiked_at is None or spiked_at > stretch.end
