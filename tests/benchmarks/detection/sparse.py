"""What sparse reading would have seen of every recorded run: ``python -m tests.benchmarks.detection.sparse``.

    python -m tests.benchmarks.detection.sparse --suite full --cache runs/detection

``every="auto"`` reads few steps while nothing is going on. Training each run once more to see what that
costs takes as long as recording them (``experiments/cadence.py`` does it for some); here the recorded
readings are fed to the detector at the steps that the cadence asks for, and the loss alone in between.
What a reading has from the one of the step before is left out where that step was not read. The page is
SPARSE.md.
"""

from __future__ import annotations

import argparse
import datetime
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from nfi_monitor.detect.detector import Detector
from nfi_monitor.engine.schedule import next_read
from nfi_monitor.types import Alert, AlertKind, Change, Reading
from tests.benchmarks.detection import evaluate, generate, score
from tests.benchmarks.detection.families import EXTERNAL, NUMERIC, Family, suite
from tests.benchmarks.detection.generate import Run
from tests.benchmarks.detection.replay import readings, replay
from tests.benchmarks.detection.score import Score
from tests.benchmarks.detection.sheet import Sheet, leads, rate, share

PAGE = Path(__file__).with_name("SPARSE.md")
BETWEEN_NEIGHBOURS = ("secant_curvature", "gradient_alignment", "feature_displacement")
"""Measured against the step before."""


@dataclass(frozen=True)
class Sparse:
    """What the detector said of a run that is read sparsely."""

    alerts: list[Alert]
    read: list[int]
    """Steps that were read in full."""
    changes: list[tuple[int, Change, Alert]]
    """(step, what happened, the alert as it was then)."""


def replay_sparsely(run: Run, every: int | str = "auto") -> Sparse:
    """The alerts of a live monitor with this cadence and ``overhead_budget=None``, bit for bit: of one
    process on a CPU, where every loss is known at its step."""
    detector = Detector()
    contexts = [*run.contexts[1:], (math.inf, run.contexts[-1][1])]
    following, wanted, context = 0, 1, run.contexts[0][1]
    detector.context = context
    read: list[int] = []
    changes: list[tuple[int, Change, Alert]] = []
    for reading in readings(run):
        while reading.step >= contexts[following][0]:
            context = contexts[following][1]
            following += 1
        values = reading.values
        if reading.step >= wanted:
            if not read or read[-1] != reading.step - 1:
                values = {name: value for name, value in values.items() if name not in BETWEEN_NEIGHBOURS}
            read.append(reading.step)
            detector.context = context  # a monitor looks at the optimizer when it reads
        elif "loss" in values:
            values = {"loss": values["loss"]}
        else:
            continue
        verdict = detector.update(Reading(reading.step, values))
        changes += [(reading.step, change, alert) for change, alert in verdict.changes]
        wanted = next_read(reading.step, every, detector.attention, detector.context.tau)
    return Sparse(detector.alerts, read, changes)


@dataclass(frozen=True)
class Compared:
    """One run under both cadences, *imminent* scored."""

    family: Family
    every: Score
    sparse: Score
    steps: int
    read: int


def compare(family: Family, run: Run) -> Compared:
    truth = evaluate.truth_of_run(run, family)
    sparse = replay_sparsely(run)
    every, seldom = (
        score.judge(score.firing_steps(alerts, AlertKind.IMMINENT), truth)
        for alerts in (replay(run).alerts, sparse.alerts)
    )
    return Compared(family, every, seldom, run.steps, len(sparse.read))


def sheets(compared: Sequence[Compared]) -> Iterator[Sheet]:
    header = ["", "runs", "warned, every step", "warned, sparse", "lead in τ: median (10th pct), every step",
              "sparse", "false /10k, every step", "sparse", "steps read"]  # fmt: skip
    groups = {
        "numeric": [item for item in compared if item.family.mechanism == NUMERIC],
        "second moment, edge of stability": [
            item for item in compared if item.family.abrupt and item.family.mechanism != EXTERNAL
        ],
        "kicks from outside": [item for item in compared if item.family.mechanism == EXTERNAL],
        "quiet": [item for item in compared if item.family.quiet],
        "all": list(compared),
    }
    yield Sheet("By mechanism", "", header, [_row(name, items) for name, items in groups.items() if items])
    families = {item.family.name: item.family for item in compared}
    rows = []
    for name in families:
        items = [item for item in compared if item.family.name == name]
        if sum(item.every.warned for item in items) != sum(item.sparse.warned for item in items):
            rows.append(_row(name, items))
    yield Sheet("Families where it makes a difference", "" if rows else "None.", header, rows)


def _row(name: str, items: Sequence[Compared]) -> list[str]:
    every, sparse = (sum((pick(item) for item in items), Score()) for pick in (_every, _sparsely))
    warned = [share(one.warned, one.slingshots) for one in (every, sparse)]
    led = [leads(one) for one in (every, sparse)]
    false = [rate(one.false_alarms, one.exposure) for one in (every, sparse)]
    read = sum(item.read for item in items) / sum(item.steps for item in items)
    return [name, str(len(items)), *warned, *led, *false, f"{read:.0%}"]


def _every(item: Compared) -> Score:
    return item.every


def _sparsely(item: Compared) -> Score:
    return item.sparse


def recorded(families: Iterable[Family], cache: Path) -> list[tuple[Family, Path]]:
    paths = [(family, generate.path_of(family, seed, cache)) for family in families for seed in family.seeds]
    return [(family, path) for family, path in paths if generate.is_whole(path)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suite", choices=["quick", "full", "frozen"], default="quick")
    parser.add_argument("--families", nargs="+", metavar="NAME", help="these only, whatever the suite")
    parser.add_argument("--cache", type=Path, default=generate.CACHE)
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (default %(default)s)")
    args = parser.parse_args(argv)
    console = Console()
    try:
        runs = recorded(suite(args.suite, args.families), args.cache)
    except ValueError as error:
        parser.error(str(error))
    compared = []
    for family, path in track(runs, description="sparse reading", console=console):
        run = generate.load(path)
        if "loss" in run.columns:
            compared.append(compare(family, run))
    if not compared:
        console.print("No recorded runs. Make them: python -m tests.benchmarks.detection")
        return 1
    made = list(sheets(compared))
    for sheet in made:
        console.print(sheet.rich())
    args.out.write_text(page(compared, made), encoding="utf-8")
    console.out(f"written: {args.out}", highlight=False)
    return 0


def page(compared: Sequence[Compared], made: Iterable[Sheet]) -> str:
    steps = sum(item.steps for item in compared)
    versions = ", ".join(f"{name} {value}" for name, value in generate.versions().items())
    lines = [
        "# What sparse reading loses",
        "",
        "Written by `python -m tests.benchmarks.detection.sparse --suite full` on "
        f"{datetime.date.today().isoformat()}; do not edit. {versions}; detector code "
        f"{generate.detector_key()}.",
        "",
        f'{len(compared)} recorded runs, {steps:,} steps, read again as `every="auto"` with '
        "`overhead_budget=None` would read them; the alarm is *imminent*, with the default constants, scored "
        "as in RESULTS.md. The rule by which the loss alone calls for readings "
        "(`nfi_monitor/detect/loss_watch.py`) was chosen on the runs of seed 0 of `experiments/cadence.py`; "
        "the smallest loss that counts there on parity-hinge-decay. On accelerators and with many processes "
        "losses are known with the next reading only, and that rule helps little.",
        "",
    ]
    return "\n".join(lines) + "\n" + "\n".join(sheet.markdown() for sheet in made)


if __name__ == "__main__":
    raise SystemExit(main())
