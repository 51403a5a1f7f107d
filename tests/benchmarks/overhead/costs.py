"""What does not show in a ratio of times: memory, the physical floor, growth with size, import time."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from nfi_monitor.capture.sampling import COORDINATES, COORDINATES_FULL, row_stride
from tests.benchmarks.overhead.cases import CASES, Case, Classifier, rows
from tests.benchmarks.overhead.trainings import EveryStep, TimedTraining

READINGS = 12


def bandwidth(mebibytes: int = 256, repeats: int = 7) -> float:
    """Bytes a second that one thread reads: the median of summing a large vector."""
    values = torch.ones(mebibytes << 18)
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - begun)
    return values.numel() * 4 / statistics.median(seconds)


def stride(case: Case) -> int:
    """A reading holds one row in so many."""
    _, targets = case.batch()
    return row_stride(len(targets), case.build().head.out_features)


def bytes_read(case: Case) -> int:
    """What a reading has to read at least: sampled rows of logits, their gradient and features once, sampled
    coordinates of gradient, weight before and after, and second moment once."""
    model = case.build()
    _, targets = case.batch()
    classes, features = model.head.weight.shape
    sampled = -(-len(targets) // row_stride(len(targets), classes))
    parameters = sum(p.numel() for p in model.parameters())
    coordinates = parameters if parameters <= COORDINATES_FULL else COORDINATES
    return 4 * (sampled * (2 * classes + features) + 4 * coordinates)


@dataclass(frozen=True)
class Reading:
    """Own milliseconds of a reading, and the least they could be."""

    case: str
    parameters: int
    classes: int
    milliseconds: float
    floor: float


def reading(name: str, case: Case, bytes_a_second: float, directory: Path) -> Reading:
    """Median over single steps, all of them read."""
    torch.manual_seed(0)
    arm = EveryStep(case.build(), [case.batch() for _ in range(4)], directory)
    try:
        arm.run(10)
        own = []
        for _ in range(READINGS):
            before = arm.own()[0]
            arm.run(1)
            own.append(arm.own()[0] - before)
    finally:
        arm.close()
    return Reading(
        case=name,
        parameters=sum(p.numel() for p in arm.model.parameters()),
        classes=arm.model.head.out_features,
        milliseconds=1e3 * statistics.median(own),
        floor=1e3 * bytes_read(case) / bytes_a_second,
    )


def by_size() -> dict[str, Case]:
    """One MLP, 1M to 50M parameters, the same head and batch."""
    widths = {"1M": 512, "4M": 1024, "15M": 2048, "50M": 3968}
    return {
        name: Case(
            f"MLP of width {width}",
            lambda width=width: Classifier(256, width, width, width, width, 256, 10),
            lambda: rows(8, 256, 10),
            0.0,
        )
        for name, width in widths.items()
    }


def by_vocabulary() -> dict[str, Case]:
    """One small body, 1k to 128k classes, the same 512 rows."""
    return {
        f"{classes // 1000}k": Case(
            f"{classes:,} classes",
            lambda classes=classes: Classifier(32, 32, classes),
            lambda classes=classes: rows(512, 32, classes),
            0.0,
        )
        for classes in (1_000, 4_000, 16_000, 50_000, 128_000)
    }


@dataclass(frozen=True)
class Peak:
    """MiB that tensors take at the worst moment of a step, and what a reading adds."""

    case: str
    bare: float
    watched: float

    @property
    def extra(self) -> float:
        return self.watched / self.bare - 1.0

    @property
    def over(self) -> float:
        """MiB beyond 64 KiB and 1%."""
        return self.watched - 1.01 * self.bare - 1 / 16


def peak(name: str, case: Case, directory: Path) -> Peak:
    """From torch's own record of every allocation, so that not a byte is missed.

    It begins before there is a model: what the monitor keeps from step to step counts, and torch tells of no
    block that is freed unless it saw it made.
    """

    def train(kind: type[TimedTraining]) -> None:
        torch.manual_seed(0)
        arm = kind(case.build(), [case.batch() for _ in range(2)], directory)
        try:
            arm.run(4)
        finally:
            arm.close()

    found = [_allocated(lambda kind=kind: train(kind)) for kind in (TimedTraining, EveryStep)]
    return Peak(name, found[0] / 2**20, found[1] / 2**20)


def _allocated(work: Callable[[], None]) -> int:
    """Bytes that tensors take at the highest point of ``work``, which makes them all."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    total = highest = 0
    events = record.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


def import_seconds(statement: str, above: str = "pass", repeats: int = 9) -> float:
    """Median of fresh interpreters, each above one that does ``above`` right before."""

    def once(code: str) -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - begun

    pairs = [(once(above), once(statement)) for _ in range(repeats)]
    return statistics.median(after - before for before, after in pairs)


def readings(cases: dict[str, Case], bytes_a_second: float) -> list[Reading]:
    with tempfile.TemporaryDirectory() as directory:
        return [reading(name, case, bytes_a_second, Path(directory)) for name, case in cases.items()]


def peaks(names: list[str]) -> list[Peak]:
    with tempfile.TemporaryDirectory() as directory:
        return [peak(name, CASES[name], Path(directory)) for name in names]
