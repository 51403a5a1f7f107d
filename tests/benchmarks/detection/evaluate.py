"""One recorded run → the scores of the monitor and of all its peers, through the same functions.

What a run came to is kept beside it: only a change of the detector or of the scoring makes that again.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from nfi_monitor.types import AlertKind
from tests.benchmarks.detection import generate, peers_installed, score
from tests.benchmarks.detection.families import Family
from tests.benchmarks.detection.generate import Column, Run, load
from tests.benchmarks.detection.replay import replay
from tests.benchmarks.detection.sparse import replay_sparsely
from tests.benchmarks.detection.told import Told, told
from tests.benchmarks.peers import PEERS

AT_RISK, AT_RISK_WARNING, IMMINENT = "at risk", "at risk, warning", "imminent"
EVERY, AUTO = "every step", "auto"
"""The cadences: each step read, and those that ``every="auto"`` reads."""
_KINDS = (AT_RISK, AT_RISK_WARNING, IMMINENT)


def at(name: str, cadence: str) -> str:
    """Return the name of a rule of the monitor at a cadence."""
    return name if cadence == EVERY else f"{name}, {cadence}"


MONITOR = tuple(at(name, cadence) for cadence in (EVERY, AUTO) for name in _KINDS)
RULES = (*MONITOR, *PEERS)
"""What every run is scored by; packages that are installed come after them."""


class Named(NamedTuple):
    """What the monitor said one slingshot came from."""

    family: str
    seed: int
    step: int  # where it starts
    mechanism: str  # "none": it gave no slingshot alert


@dataclass(frozen=True)
class Result:
    """What one run, or several added up, came to."""

    runs: int = 1
    steps: int = 0
    scores: dict[str, score.Score] = field(default_factory=dict)
    under: dict[str, int] = field(default_factory=dict)
    """Rule → steps at which it sounded."""
    told: dict[str, Told] = field(default_factory=dict)
    """Cadence → the monitor's alerts, counted."""
    named: tuple[Named, ...] = ()
    forecasts: dict[int, score.Forecasts] = field(default_factory=dict)
    numbers_too_late: int = 0  # slingshots with a number in their last τ
    seconds: float = 0.0

    def __add__(self, other: Result) -> Result:
        return Result(
            self.runs + other.runs,
            self.steps + other.steps,
            _merge(self.scores, other.scores, score.Score()),
            _merge(self.under, other.under, 0),
            _merge(self.told, other.told, Told()),
            self.named + other.named,
            _merge(self.forecasts, other.forecasts, score.Forecasts()),
            self.numbers_too_late + other.numbers_too_late,
            self.seconds + other.seconds,
        )

    @property
    def mechanisms(self) -> Counter[str]:
        return Counter(item.mechanism for item in self.named)


Key = TypeVar("Key")
Sum = TypeVar("Sum", bound=Any)


def _merge(one: Mapping[Key, Sum], two: Mapping[Key, Sum], nothing: Sum) -> dict[Key, Sum]:
    return {key: one.get(key, nothing) + two.get(key, nothing) for key in dict.fromkeys([*one, *two])}


def total(results: Iterable[Result]) -> Result:
    return sum(results, start=Result(runs=0))


def evaluate(run: Run, family: Family) -> Result:
    """Replay the detector over a run at both cadences, and judge it and its peers."""
    truth = truth_of_run(run, family)
    return _both(of_monitor(run, truth), of_peers(run, truth))


def of_monitor(run: Run, truth: score.Truth) -> Result:
    """Judge the detector alone."""
    full, sparse = replay(run), replay_sparsely(run)
    sounded: dict[str, set[int]] = {}
    for cadence, alerts, changes in (
        (EVERY, full.alerts, full.changes),
        (AUTO, sparse.alerts, sparse.changes),
    ):
        sounded[at(AT_RISK, cadence)] = set(score.firing_steps(alerts, AlertKind.AT_RISK))
        sounded[at(AT_RISK_WARNING, cadence)] = set(score.warning_steps(alerts, changes))
        sounded[at(IMMINENT, cadence)] = set(score.firing_steps(alerts, AlertKind.IMMINENT))
    named = score.mechanisms(full.alerts, truth)
    return Result(
        steps=run.steps,
        scores={name: score.judge(steps, truth) for name, steps in sounded.items()},
        under={name: len(steps) for name, steps in sounded.items()},
        told={
            EVERY: told(full.alerts, full.changes, truth, run.steps),
            AUTO: told(sparse.alerts, sparse.changes, truth, len(sparse.read)),
        },
        named=tuple(Named(run.family, run.seed, step, name) for step, name in named.items()),
        forecasts=score.forecasts(full.forecasts, full.warned, truth),
        numbers_too_late=score.numbers_in_the_last_tau(full.forecasts, truth),
        seconds=float(run.info.get("seconds", 0.0)),
    )


def of_peers(run: Run, truth: score.Truth) -> Result:
    """Judge the simpler rules and the installed packages: no constant of ours matters."""
    column = columns_of(run)
    found = {name: rule(column) for name, rule in PEERS.items()} | dict(peers_installed.sounded(column))
    sounded = {name: set(steps.tolist()) for name, steps in found.items()}
    return Result(
        steps=run.steps,
        scores={name: score.judge(steps, truth) for name, steps in sounded.items()},
        under={name: len(steps) for name, steps in sounded.items()},
    )


def _both(monitor: Result, peers: Result) -> Result:
    return replace(monitor, scores=monitor.scores | peers.scores, under=monitor.under | peers.under)


def truth_of_run(run: Run, family: Family) -> score.Truth:
    """What happened, by the loss of the fixed part of the training set where the run has one."""
    steps, loss = run.columns.get(generate.TRUTH) or _loss(run)
    return score.truth_of(
        steps.tolist(),
        loss.tolist(),
        run.tau,
        quiet=family.quiet,
        abrupt=family.abrupt,
        nats=family.nats,
        floor=family.floor,
        last=run.steps,
    )


def columns_of(run: Run) -> Callable[[str], Column]:
    """A quantity's readings; the loss as the detector sees it."""
    nothing: Column = (np.empty(0, np.int64), np.empty(0, np.float64))
    return lambda name: _loss(run) if name == "loss" else run.columns.get(name, nothing)


def _loss(run: Run) -> Column:
    return run.columns.get("loss") or run.columns["head_loss"]


# --- kept scores -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """All that is known of one recorded run's worth."""

    family: str
    seed: int
    info: dict[str, Any]
    peers: Result
    monitor: Result | None = None
    """None: not scored yet with this detector."""

    @property
    def result(self) -> Result:
        return self.peers if self.monitor is None else _both(self.monitor, self.peers)


def evaluate_file(family: Family, path: Path, kept: Path | None = None) -> Scored:
    """Score a recorded run; what the directory ``kept`` holds is not made again."""
    file = None if kept is None else kept / f"{path.stem}.pickle"
    keys = _keys(family, path)
    scored = _read(file, keys)
    if scored is not None and scored.monitor is not None:
        return scored
    run = load(path)
    truth = truth_of_run(run, family)
    peers = of_peers(run, truth) if scored is None else scored.peers
    scored = Scored(run.family, run.seed, run.info, peers, of_monitor(run, truth))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        generate._atomically(file, lambda handle: pickle.dump((keys, scored), handle))
    return scored


@dataclass(frozen=True)
class Keys:
    """What kept scores depend on: both change with the readings, the scoring and what a slingshot is."""

    monitor: str
    peers: str


def _read(file: Path | None, keys: Keys) -> Scored | None:
    """What was kept of this version; None where there is nothing. Another detector leaves the peers'."""
    try:
        if file is None:
            return None
        with file.open("rb") as handle:
            found, scored = pickle.load(handle)
    except (OSError, EOFError, TypeError, ValueError, AttributeError, ImportError, pickle.UnpicklingError):
        return None
    if not isinstance(found, Keys) or not isinstance(scored, Scored) or found.peers != keys.peers:
        return None
    return scored if found.monitor == keys.monitor else replace(scored, monitor=None)


def _keys(family: Family, path: Path) -> Keys:
    here = Path(__file__).parent
    scoring = [generate._code(here / f"{name}.py") for name in ("evaluate", "score", "truth", "told")]
    stamp = path.with_suffix(".npz").stat()
    common = generate._hash(
        *scoring,
        repr((family.quiet, family.abrupt, family.nats, family.floor, np.__version__)),
        repr((path.name, stamp.st_size, stamp.st_mtime_ns)),
    )
    peers = [generate._code(here / "peers_installed.py"), generate._code(here.parent / "peers.py")]
    replays = [generate._code(here / f"{name}.py") for name in ("replay", "sparse")]
    return Keys(
        monitor=generate._hash(common, generate.detector_key(), *replays),
        peers=generate._hash(common, *peers, repr(peers_installed.installed())),
    )
