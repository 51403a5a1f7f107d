"""What sparse reading costs: a recorded training once more, under ``Monitor(every="auto")``."""

from __future__ import annotations

from typing import Any

import torch

from nfi_monitor import Monitor
from nfi_monitor.history import History
from nfi_monitor.types import AlertKind
from tests.benchmarks.detection import score
from tests.benchmarks.detection.experiments.trials import same
from tests.benchmarks.detection.families import Family
from tests.benchmarks.detection.generate import Run
from tests.benchmarks.detection.replay import replay

FAMILIES = (
    # The quick suite's spiking families, and one of each clock and kind of the full one.
    "division-23", "division-17", "addition-17", "multiplication-17", "narrow-high-lr", "decay",
    "minibatch-half", "transformer-13", "bfloat16-loss", "float16-loss", "digits", "parity-ce-95",
    "parity-hinge-95",
    "parity-hinge-99", "survives-float64-quick",
    "division-23-long", "division-23-beta-99", "transformer-17", "digits-long", "minibatch", "parity-ce-99",
    "survives-float64",
)  # fmt: skip
RULES = {"at risk": AlertKind.AT_RISK, "imminent": AlertKind.IMMINENT}


def compare(family: Family, seed: int, run: Run) -> dict[str, Any]:
    """``{"cadence": one record a rule, "differs_at"}``: every-step reading beside sparse reading."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        monitor = _train(family, seed, run.steps)
    finally:
        torch.set_num_threads(threads)
    steps, loss = run.columns["loss"]
    again = dict(zip(*(column.tolist() for column in monitor.history["loss"]), strict=True))
    for step, value in zip(steps.tolist(), loss.tolist(), strict=True):
        if not same(value, again[step]):
            return {"cadence": [], "differs_at": step}
    truth = score.truth_of(steps.tolist(), loss.tolist(), run.tau, quiet=family.quiet)
    alerts = {"every": replay(run).alerts, "auto": monitor.alerts}
    read = max(len(monitor.history[name][0]) for name in monitor.history if name != "loss")
    records = []
    for rule, kind in RULES.items():
        record: dict[str, Any] = {
            "family": family.name,
            "seed": seed,
            "rule": rule,
            "read_share": read / run.steps,
        }
        for cadence, said in alerts.items():
            found = score.judge(score.firing_steps(said, kind), truth)
            record[f"recall_{cadence}"] = [found.warned, found.slingshots]
            record[f"leads_{cadence}"] = [lead for _, lead in found.leads]
            record[f"false_{cadence}"] = [found.false_alarms, found.exposure]
        records.append(record)
    return {"cadence": records, "differs_at": None}


def _train(family: Family, seed: int, steps: int) -> Monitor:
    training = family.build(seed, family.arm)
    monitor = Monitor(training.model, training.optimizer, console=False, every="auto", **training.watch)
    monitor.history = History(max_rows=max(steps + 1, 4))  # every loss is compared with the recorded one
    with monitor:
        for number in range(1, steps + 1):
            training.step(number, monitor)
    return monitor
