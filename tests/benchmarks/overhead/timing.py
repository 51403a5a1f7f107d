"""Paired, interleaved blocks of steps."""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from tests.benchmarks.overhead.cases import Case
from tests.benchmarks.overhead.trainings import NULL, FusedBare, TimedTraining, Watched, WeightGradient

BATCHES = 64  # drawn at random, used in turn: enough that nothing is memorised while the clock runs
WARM_UP_STEPS = 200  # the costs that the interval is fitted to are known then
WARM_UP_SECONDS = 10.0
LEAD_IN_STEPS = 2  # untimed, at the start of each block: the caches are this arm's own when the clock starts
BLOCK_STEPS = 32  # at τ = 1000 two readings in 32 steps
BLOCK_SECONDS = 8.0
SHORTEST_BLOCK = 16


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Result:
    case: str
    threads: int
    arm: str
    parameters: int
    bare_ms: float  # a bare step, wall, median over rounds
    wall: Spread  # ratio
    cpu: Spread  # ratio
    block: int
    rounds: int
    read: float | None  # share of the timed steps that were read; None: no monitor of ours
    own: float | None  # the monitor's own seconds over the other seconds of its blocks
    load: float | None = None  # of the machine at the end, this process among it


class _Clock:
    """Wall and CPU seconds of a block."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def __call__(self, arm: TimedTraining, steps: int) -> tuple[float, float]:
        return self.watched(arm, steps)[:2]

    def watched(self, arm: TimedTraining, steps: int) -> tuple[float, float, float, int]:
        """And, of this monitor, its own seconds and the steps that it read."""
        arm.run(LEAD_IN_STEPS)
        gc.collect()
        gc.disable()
        try:
            self._wait()
            own, read = arm.own()
            wall, cpu = time.perf_counter(), time.process_time()
            arm.run(steps)
            self._wait()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            own_after, read_after = arm.own()
            return wall, cpu, own_after - own, read_after - read
        finally:
            gc.enable()


def measure(
    name: str,
    case: Case,
    kinds: Sequence[type[TimedTraining]],
    *,
    rounds: int,
    device: str = "cpu",
    seed: int = 0,
    console: Console,
) -> Iterator[Result]:
    """Time each kind of arm on one case, against bare copies of it; one after the other."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    clock = _Clock(wait)
    torch.manual_seed(seed)
    data = [tuple(tensor.to(device) for tensor in case.batch()) for _ in range(BATCHES)]

    def made(kind: type[TimedTraining], stack: ExitStack, directory: Path) -> TimedTraining:
        torch.manual_seed(seed)
        arm = kind(case.build().to(device), data, directory, autocast=case.autocast)
        stack.callback(arm.close)
        begun = time.perf_counter()
        while arm.step < WARM_UP_STEPS and time.perf_counter() - begun < WARM_UP_SECONDS:
            arm.run(1)
        arm.settle()
        return arm

    for kind in (TimedTraining, *kinds):
        # Event files may still be written while the directory goes.
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True, prefix="overhead-") as directory,
            ExitStack() as stack,
        ):
            bare = made(FusedBare if kind is WeightGradient else TimedTraining, stack, Path(directory))
            arm = made(kind, stack, Path(directory))
            pace = clock(bare, 4)[0] / 4
            longest = max(round(BLOCK_SECONDS / pace), SHORTEST_BLOCK)
            block = min(max(BLOCK_STEPS, arm.interval if isinstance(arm, Watched) else 0), longest)
            label = NULL if kind is TimedTraining else kind.name
            yield _paired(name, label, bare, arm, clock, rounds, block, console)


def _paired(
    case: str,
    label: str,
    bare: TimedTraining,
    arm: TimedTraining,
    clock: _Clock,
    rounds: int,
    block: int,
    console: Console,
) -> Result:
    bares, walls, cpus = [clock(bare, block)], [], []
    spent = own = 0.0
    reads = 0
    for _ in track(range(rounds), description=f"{case}: {label}", console=console, transient=True):
        wall, cpu, own_wall, read = clock.watched(arm, block)
        bares.append(clock(bare, block))
        walls.append(wall / statistics.fmean(pair[0] for pair in bares[-2:]))
        cpus.append(cpu / statistics.fmean(pair[1] for pair in bares[-2:]))
        spent, own, reads = spent + wall, own + own_wall, reads + read
    ours = isinstance(arm, Watched)
    return Result(
        case=case,
        threads=torch.get_num_threads(),
        arm=label,
        parameters=sum(p.numel() for p in arm.model.parameters()),
        bare_ms=1e3 * statistics.median(pair[0] for pair in bares) / block,
        wall=Spread.of(walls),
        cpu=Spread.of(cpus),
        block=block,
        rounds=rounds,
        read=reads / (rounds * block) if ours else None,
        own=own / (spent - own) if ours else None,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )
