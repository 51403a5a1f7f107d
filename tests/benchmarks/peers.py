"""What simpler rules would have said: the precursors others use, on the very same readings.

    nfi-monitor demo --out runs/peers
    python -m tests.benchmarks.peers runs/peers/float32 runs/peers/float64

Each rule sees the readings in order and nothing else.  For every slingshot: how many steps before its start
the rule began to speak, in the time since the last slingshot was over (2 τ after its end); an alarm that was
still sounding from before does not count.  For a run without slingshots: how many alarms it gave.  An alarm
that pauses for less than a τ is one alarm.

``python -m tests.benchmarks.detection`` scores the same rules on many trainings.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from nfi_monitor.report.run_directory.reader import RunRecord, read_run
from nfi_monitor.types import AlertKind

Floats = NDArray[np.float64]
Column = tuple[NDArray[np.int64], Floats]
Readings = Callable[[str], Column]
"""The name of a quantity → (optimizer steps, values)."""
Rule = Callable[[Readings], NDArray[np.int64]]
"""Readings → the optimizer steps at which the rule sounds, in order."""
WINDOW = 100  # readings that a rolling rule looks back on
FEWEST = 20  # readings before it says anything


def past(values: Floats, window: int = WINDOW) -> tuple[Floats, Floats]:
    """Mean and standard deviation of the ``window`` readings before each one; NaN for the first FEWEST."""
    mean, deviation = np.full(len(values), np.nan), np.full(len(values), np.nan)
    padded = np.concatenate([np.full(window, np.nan), values])
    for begin in range(FEWEST, len(values), 10_000):
        end = min(begin + 10_000, len(values))
        seen = np.lib.stride_tricks.sliding_window_view(padded[begin : end + window - 1], window)
        with np.errstate(invalid="ignore", over="ignore"):
            mean[begin:end], deviation[begin:end] = np.nanmean(seen, 1), np.nanstd(seen, 1)
    return mean, deviation


def loss_over_rolling_mean(readings: Readings) -> NDArray[np.int64]:
    """Loss above 5 × the mean of its last 100 readings."""
    steps, loss = readings("loss")
    return steps[loss > 5 * past(loss)[0]]


def z_score(name: str, limit: float) -> Rule:
    def rule(readings: Readings) -> NDArray[np.int64]:
        steps, values = readings(name)
        mean, deviation = past(values)
        return steps[values - mean > limit * np.maximum(deviation, 1e-30)]

    return rule


def cusum_log_loss(readings: Readings) -> NDArray[np.int64]:
    """One-sided CUSUM of log loss, drift half a standard deviation, level 5 of them."""
    steps, loss = readings("loss")
    values = np.log(np.maximum(loss, 1e-30))
    mean, deviation = past(values)
    surprises = (values - mean) / np.maximum(deviation, 1e-9) - 0.5
    total, sounded = 0.0, []
    for step, surprise in zip(steps.tolist(), surprises.tolist(), strict=True):
        total = max(0.0, total + surprise) if math.isfinite(surprise) else total
        if total > 5:
            total = 0.0
            sounded.append(step)
    return np.array(sounded, dtype=np.int64)


def rms_t(readings: Readings) -> NDArray[np.int64]:
    """RMS_t of any tensor above 2.3 (Wortsman et al. 2023)."""
    steps, values = readings("rms_t_max")
    return steps[values > 2.3]


def window_kill_switch(readings: Readings) -> NDArray[np.int64]:
    """Mean loss of the last 20 readings above twice the mean of the 100 before them: stop the run."""
    steps, loss = readings("loss")
    if len(loss) <= FEWEST:
        return steps[:0]
    recent = np.full(len(loss), np.nan)
    recent[FEWEST - 1 :] = np.lib.stride_tricks.sliding_window_view(loss, FEWEST).mean(1)
    before = np.full(len(loss), np.nan)
    before[FEWEST - 1 :] = past(loss)[0][: len(loss) - FEWEST + 1]
    return steps[recent > 2 * before]


PEERS: dict[str, Rule] = {
    "RMS_t > 2.3, any tensor": rms_t,
    "loss > 5 × rolling mean": loss_over_rolling_mean,
    "loss, z > 6": z_score("loss", 6.0),
    "log loss, CUSUM": cusum_log_loss,
    "gradient norm, z > 3": z_score("gradient_norm", 3.0),
    "kill switch, window of 20": window_kill_switch,
}
ALERTS: dict[str, AlertKind] = {
    "nfi-monitor, at risk": AlertKind.AT_RISK,
    "nfi-monitor, imminent": AlertKind.IMMINENT,
}


def sounded(record: RunRecord, name: str) -> Iterable[int]:
    """The optimizer steps at which a rule, or the monitor itself, sounded."""
    if name in PEERS:
        return map(int, PEERS[name](record.history.__getitem__))
    of_kind = (item for item in record.alerts if item.kind is ALERTS[name])
    return [step for item in of_kind for step in range(item.first_step, item.last_step)]


def judge(record: RunRecord, name: str) -> tuple[list[int | None], int]:
    """(lead before each slingshot, alarms in all)."""
    tau = float(record.info["tau"])
    alarms = sorted(set(sounded(record, name)))
    starts = [step for before, step in zip([-math.inf, *alarms], alarms, strict=False) if step - before > tau]
    leads: list[int | None] = []
    begin = 0
    for item in (alert for alert in record.alerts if alert.kind is AlertKind.SLINGSHOT):
        early = [step for step in starts if begin <= step < item.first_step]
        leads.append(item.first_step - early[0] if early else None)
        begin = item.last_step + round(2 * tau)
    return leads, len(starts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers", description=__doc__)
    parser.add_argument("runs", nargs="+", help="run directories")
    args = parser.parse_args(argv)
    records: dict[str, Any] = {path: read_run(path) for path in args.runs}
    table = Table(title="lead before each slingshot, in steps; without one, alarms given")
    table.add_column("rule", no_wrap=True)
    for path in records:
        table.add_column(path)
    for name in (*ALERTS, *PEERS):
        cells = []
        for record in records.values():
            leads, alarms = judge(record, name)
            told = ", ".join("none" if lead is None else str(lead) for lead in leads)
            cells.append(told or f"{alarms} alarms")
        table.add_row(name, *cells)
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
