"""One recorded run → what the monitor and its peers said of it, held against the truth.

An *imminent* alert is false unless a slingshot begins within 10 τ after it began, or 500 steps if that is
less, or while it fires.  A *slingshot* alert is false unless it begins in a slingshot of the truth.  A false
alert at a near miss (truth.py: the loss did rise, but to less than a slingshot's levels) is counted as false
and said beside it.  The share under warning counts the steps at which *at risk* fired with severity warning
or above, before and after a true slingshot alike.  The peers' alarms are those of score.py: an alarm that
pauses for less than 50 steps is one alarm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nfi_monitor.types import Alert, AlertKind, Change
from tests.benchmarks.detection import evaluate, generate, peers_installed, score
from tests.benchmarks.detection.families import Family
from tests.benchmarks.detection.generate import Run
from tests.benchmarks.detection.replay import replay
from tests.benchmarks.detection.score import Truth
from tests.benchmarks.detection.sparse import replay_sparsely
from tests.benchmarks.peers import PEERS


@dataclass(frozen=True)
class Said:
    """What the monitor said of a run that was read with one cadence."""

    read: int
    """Steps read in full."""
    imminent: int
    false_imminent: tuple[Alert, ...]
    false_slingshots: tuple[Alert, ...]
    called: int
    """True slingshots with an alert."""
    warned: int
    """Steps under *at risk* of severity warning or above."""
    alarmed: int
    """Steps under any alert of severity warning or above, or under *imminent* or *slingshot*."""
    others: tuple[Alert, ...] = ()
    """Remaining alerts."""
    near_imminent: int = 0
    """Of the false *imminent* alerts, those at a near miss."""
    near_slingshots: int = 0


@dataclass(frozen=True)
class Peer:
    """What a simpler rule said of a run."""

    alarms: int
    false: int
    sounding: int
    """Steps at which it sounded."""


@dataclass(frozen=True)
class Judged:
    family: str
    half: str
    seed: int
    steps: int
    truth: Truth
    every: Said
    auto: Said
    notes: tuple[str, ...] = ()
    peers: dict[str, Peer] = field(default_factory=dict)


def judge_file(family: Family, path: Path, *, peers: bool = True) -> Judged:
    return judge_run(family, generate.load(path), peers=peers)


def judge_run(family: Family, run: Run, *, peers: bool = True) -> Judged:
    # In an ordinary run every alarm without a slingshot is false, and 10 τ would excuse all of them.
    truth = replace(evaluate.truth_of_run(run, family), quiet=True, abrupt=True)
    full, sparse = replay(run), replay_sparsely(run)
    return Judged(
        run.family,
        family.half or "",
        run.seed,
        run.steps,
        truth,
        _said(full.alerts, full.changes, truth, run.steps),
        _said(sparse.alerts, sparse.changes, truth, len(sparse.read)),
        tuple(dict.fromkeys(run.info["notes"])),
        _peers(run, truth) if peers else {},
    )


def _said(
    alerts: Sequence[Alert], changes: Iterable[tuple[int, Change, Alert]], truth: Truth, read: int
) -> Said:
    imminent = [alert for alert in alerts if alert.kind is AlertKind.IMMINENT]
    slingshots = [alert for alert in alerts if alert.kind is AlertKind.SLINGSHOT]
    warned = set(score.warning_steps(alerts, changes))
    firing = {
        step
        for kind in (AlertKind.IMMINENT, AlertKind.SLINGSHOT)
        for step in score.firing_steps(alerts, kind)
    }
    wrong = tuple(alert for alert in imminent if not comes_true(alert, truth))
    none = tuple(
        alert for alert in slingshots if not any(score.calls(alert, event) for event in truth.slingshots)
    )
    near = replace(truth, slingshots=truth.near_misses)
    return Said(
        read,
        len(imminent),
        wrong,
        none,
        sum(any(score.calls(alert, event) for alert in slingshots) for event in truth.slingshots),
        len(warned),
        len(warned | firing),
        tuple(alert for alert in alerts if alert.kind not in (AlertKind.IMMINENT, AlertKind.SLINGSHOT)),
        sum(comes_true(alert, near) for alert in wrong),
        sum(any(score.calls(alert, event) for event in near.slingshots) for alert in none),
    )


def comes_true(alert: Alert, truth: Truth) -> bool:
    """Whether a slingshot begins within the horizon of an *imminent* alert, or while it fires."""
    until = max(alert.first_step + truth.horizon, alert.last_step + 1)
    return any(event.start <= until and event.end >= alert.first_step for event in truth.slingshots)


def _peers(run: Run, truth: Truth) -> dict[str, Peer]:
    column = evaluate.columns_of(run)
    sounded = {name: rule(column) for name, rule in PEERS.items()} | dict(peers_installed.sounded(column))
    found: dict[str, Peer] = {}
    for name, steps in sounded.items():
        alarms = score.alarms_of(steps.tolist(), truth)
        false = score.judge(steps.tolist(), truth).false_alarms
        found[name] = Peer(len(alarms), false, len(set(steps.tolist())))
    return found
