"""One recorded run → the scores of the monitor and of all its peers, through the same functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nfi_monitor.types import AlertKind, Thresholds
from tests.benchmarks.detection import score
from tests.benchmarks.detection.families import Family
from tests.benchmarks.detection.generate import Column, Run, load
from tests.benchmarks.detection.replay import replay
from tests.benchmarks.peers import PEERS

AT_RISK, AT_RISK_WARNING, IMMINENT = "at risk", "at risk, warning", "imminent"
RULES = (AT_RISK, AT_RISK_WARNING, IMMINENT, *PEERS)


@dataclass(frozen=True)
class Result:
    """What one run, or several added up, came to."""

    runs: int = 1
    steps: int = 0
    scores: dict[str, score.Score] = field(default_factory=dict)
    named: Counter[str] = field(default_factory=Counter)
    forecasts: dict[int, score.Forecasts] = field(default_factory=dict)
    seconds: float = 0.0

    def __add__(self, other: Result) -> Result:
        return Result(
            self.runs + other.runs,
            self.steps + other.steps,
            {name: self.scores.get(name, score.Score()) + other.scores[name] for name in other.scores},
            self.named + other.named,
            {at: self.forecasts.get(at, score.Forecasts()) + other.forecasts[at] for at in other.forecasts},
            self.seconds + other.seconds,
        )


def total(results: Iterable[Result]) -> Result:
    return sum(results, start=Result(runs=0))


def evaluate(run: Run, *, quiet: bool, thresholds: Thresholds | None = None) -> Result:
    """Replay the detector over a run and judge it and its peers."""
    steps, loss = _loss(run)
    truth = score.truth_of(steps.tolist(), loss.tolist(), run.tau, quiet=quiet)
    said = replay(run, thresholds)
    sounded: dict[str, Sequence[int]] = {
        AT_RISK: score.firing_steps(said.alerts, AlertKind.AT_RISK),
        AT_RISK_WARNING: score.warning_steps(said.alerts, said.changes),
        IMMINENT: score.firing_steps(said.alerts, AlertKind.IMMINENT),
    }
    column = _columns(run)
    sounded |= {name: rule(column).tolist() for name, rule in PEERS.items()}
    return Result(
        steps=run.steps,
        scores={name: score.judge(sounded[name], truth) for name in RULES},
        named=score.confusion(said.alerts, truth),
        forecasts=score.forecasts(said.forecasts, said.warned, truth),
        seconds=float(run.info.get("seconds", 0.0)),
    )


def evaluate_file(family: Family, seed: int, path: Path) -> tuple[Family, int, Result, dict[str, Any]]:
    run = load(path)
    return family, seed, evaluate(run, quiet=family.quiet), run.info


def _columns(run: Run) -> Callable[[str], Column]:
    """A quantity's readings; the loss as the detector sees it."""
    nothing: Column = (np.empty(0, np.int64), np.empty(0, np.float64))
    return lambda name: _loss(run) if name == "loss" else run.columns.get(name, nothing)


def _loss(run: Run) -> Column:
    return run.columns.get("loss") or run.columns["head_loss"]
