"""What simpler rules would have said: the precursors others use, on the very same readings.

    nfi-monitor demo --out runs/peers
    python -m tests.benchmarks.peers runs/peers/float32 runs/peers/float64

Each rule sees the readings in order and nothing else.  For every slingshot: how many steps before its start
the rule began to speak, in the time since the last slingshot was over (2 τ after its end); an alarm that was
still sounding from before does not count.  For a run without slingshots: how many alarms it gave.  An alarm
that pauses for less than a τ is one alarm.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, pstdev

from rich.console import Console
from rich.table import Table

from nfi_monitor.report.jsonl import RunRecord, read_run
from nfi_monitor.types import AlertKind

Series = Sequence[tuple[int, float]]
Rule = Callable[[RunRecord], Iterable[int]]
WINDOW = 100  # readings that a rolling rule looks back on


def series(record: RunRecord, name: str) -> list[tuple[int, float]]:
    steps, values = record.history[name]
    return list(zip(steps.tolist(), values.tolist(), strict=True))


def loss_over_rolling_mean(record: RunRecord) -> Iterable[int]:
    """Loss above 5 × the mean of its last 100 readings."""
    seen: deque[float] = deque(maxlen=WINDOW)
    for step, loss in series(record, "loss"):
        if len(seen) >= 20 and loss > 5 * fmean(seen):
            yield step
        seen.append(loss)


def z_score(name: str, limit: float) -> Rule:
    def rule(record: RunRecord) -> Iterable[int]:
        seen: deque[float] = deque(maxlen=WINDOW)
        for step, value in series(record, name):
            if len(seen) >= 20 and value - fmean(seen) > limit * max(pstdev(seen), 1e-30):
                yield step
            seen.append(value)

    return rule


def cusum_log_loss(record: RunRecord) -> Iterable[int]:
    """One-sided CUSUM of log loss, drift half a standard deviation, level 5 of them."""
    seen: deque[float] = deque(maxlen=WINDOW)
    total = 0.0
    for step, loss in series(record, "loss"):
        value = math.log(max(loss, 1e-30))
        if len(seen) >= 20:
            sigma = max(pstdev(seen), 1e-9)
            total = max(0.0, total + (value - fmean(seen)) / sigma - 0.5)
            if total > 5:
                total = 0.0
                yield step
        seen.append(value)


def rms_t(record: RunRecord) -> Iterable[int]:
    """RMS_t of any tensor above 2.3 (Wortsman et al. 2023)."""
    return (step for step, value in series(record, "rms_t_max") if value > 2.3)


def alert(kind: AlertKind) -> Rule:
    def rule(record: RunRecord) -> Iterable[int]:
        for item in record.alerts:
            if item.kind is kind:
                yield from range(item.first_step, item.last_step)

    return rule


RULES: dict[str, Rule] = {
    "nfi-monitor, at risk": alert(AlertKind.AT_RISK),
    "nfi-monitor, imminent": alert(AlertKind.IMMINENT),
    "RMS_t > 2.3, any tensor": rms_t,
    "loss > 5 × rolling mean": loss_over_rolling_mean,
    "loss, z > 6": z_score("loss", 6.0),
    "log loss, CUSUM": cusum_log_loss,
    "gradient norm, z > 3": z_score("gradient_norm", 3.0),
}


def judge(record: RunRecord, rule: Rule) -> tuple[list[int | None], int]:
    """(lead before each slingshot, alarms in all)."""
    tau = float(record.info["tau"])
    alarms = sorted(set(rule(record)))
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
    records = {path: read_run(path) for path in args.runs}
    table = Table(title="lead before each slingshot, in steps; without one, alarms given")
    table.add_column("rule", no_wrap=True)
    for path in records:
        table.add_column(path)
    for name, rule in RULES.items():
        cells = []
        for record in records.values():
            leads, alarms = judge(record, rule)
            told = ", ".join("none" if lead is None else str(lead) for lead in leads)
            cells.append(told or f"{alarms} alarms")
        table.add_row(name, *cells)
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
