"""What the monitor costs: paired timings, interleaved in one process.

    python -m tests.benchmarks.overhead
    python -m tests.benchmarks.overhead --models transformer --threads 2 --json overhead.json

Timing two runs one after the other measures the machine's mood: clocks, caches and neighbours drift by
more than the few per cent in question.  So all arms live side by side, as copies from the same seed that
see the same batches, and short blocks of their steps alternate: bare, arm, bare, arm, …, bare.  A ratio
divides an arm's block by the mean of the bare blocks right before and right after it, which cancels a
steady drift; the table shows the median over rounds and the quartiles.  The order of the arms changes from
round to round, and the garbage collector is off while the clock runs.

A block has 16 steps because a healthy run at β2 = 0.999 is read at every 16th, so that each block holds
exactly one reading; the column "steps read" says how many there were in fact.

The arm ``bare, again`` is a second copy without a monitor.  Its ratio should be 1; how far its quartiles
stand from 1 is what this machine can resolve, and no row of the table is known better than that.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from nfi_monitor import Monitor

BATCHES = 64  # drawn at random, used in turn: enough that nothing is memorised while the clock runs
WARM_UP_STEPS = 40
LEAD_IN_STEPS = 2  # untimed, at the start of each block: the caches are this arm's own when the clock starts
BARE, NULL = "bare", "bare, again"
# What each arm gives to Monitor besides console=False; run_dir=True stands for a fresh temporary directory.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "every=1": {"every": 1},
    "default + run_dir": {"run_dir": True},
}


class Transformer(nn.Module):
    """A small pre-norm language model, untied: vocabulary 1,000, 2 layers, 4 heads, width 96."""

    def __init__(self, vocabulary: int = 1000, length: int = 64, width: int = 96, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens) + self.positions
        return self.head(self.blocks(hidden, mask=self.mask, is_causal=True)).flatten(0, 1)


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rows(count: int, features: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, features), torch.randint(classes, (count,))


def tokens(count: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(vocabulary, (count, length + 1))
    return text[:, :-1].contiguous(), text[:, 1:].flatten()


@dataclass(frozen=True)
class Model:
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]


MODELS = {
    "mlp-small": Model(lambda: mlp(64, 128, 128, 10), lambda: rows(128, 64, 10)),
    "transformer": Model(Transformer, lambda: tokens(8, 64, 1000)),
    "mlp-large": Model(lambda: mlp(512, 1024, 1024, 1024, 10), lambda: rows(128, 512, 10)),
}


class Arm:
    """One copy of the model with its own AdamW and, unless bare, its own monitor."""

    def __init__(
        self, model: nn.Module, data: list[tuple[Tensor, Tensor]], arguments: dict[str, Any] | None
    ) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.monitor = (
            None if arguments is None else Monitor(model, self.optimizer, console=False, **arguments)
        )
        self.data = data
        self.step = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            inputs, targets = self.data[self.step % len(self.data)]
            loss = F.cross_entropy(self.model(inputs), targets)
            if self.monitor is not None:
                self.monitor.observe_loss(loss)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1

    def readings(self) -> int:
        return 0 if self.monitor is None else len(self.monitor.history["zero_sum_violation"][0])

    def seconds(self, steps: int, wait: Callable[[], None]) -> float:
        self.run(LEAD_IN_STEPS)
        gc.collect()
        gc.disable()
        try:
            wait()
            start = time.perf_counter()
            self.run(steps)
            wait()
            return time.perf_counter() - start
        finally:
            gc.enable()


@dataclass(frozen=True)
class Result:
    model: str
    parameters: int
    arm: str
    bare_ms_per_step: float  # median over rounds
    ratio: float  # median over rounds of this arm's block over the bare blocks around it
    ratio_q1: float
    ratio_q3: float
    steps_read: float  # share of the steps at which the monitor read: every="auto" reads more when it must
    phase: str | None  # at the end


def measure(name: str, rounds: int, block: int, device: str, seed: int, console: Console) -> list[Result]:
    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    torch.manual_seed(seed)
    data = [
        (inputs.to(device), targets.to(device))
        for inputs, targets in (MODELS[name].batch() for _ in range(BATCHES))
    ]
    with ExitStack() as stack:
        arms: dict[str, Arm] = {}
        for arm in (BARE, NULL, *MODES):
            arguments = None if arm in (BARE, NULL) else dict(MODES[arm])
            if arguments and arguments.get("run_dir"):
                directory = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                arguments["run_dir"] = Path(directory) / "run"
            torch.manual_seed(seed)
            arms[arm] = Arm(MODELS[name].build().to(device), data, arguments)
            if arms[arm].monitor is not None:
                stack.callback(arms[arm].monitor.close)
            arms[arm].run(WARM_UP_STEPS)

        bare = arms.pop(BARE)
        warm_up_readings = {arm: arms[arm].readings() for arm in arms}
        ratios: dict[str, list[float]] = {arm: [] for arm in arms}
        bare_blocks = [bare.seconds(block, wait)]
        order = list(arms)
        for number in track(range(rounds), description=f"{name:12}", console=console, transient=True):
            order = order[1:] + order[:1]
            for arm in order if number % 2 else reversed(order):
                mine = arms[arm].seconds(block, wait)
                bare_blocks.append(bare.seconds(block, wait))
                ratios[arm].append(mine / statistics.fmean(bare_blocks[-2:]))

        results = []
        for arm, values in ratios.items():
            quartiles = statistics.quantiles(values, n=4, method="inclusive") if rounds > 1 else values * 3
            monitor = arms[arm].monitor
            readings = arms[arm].readings() - warm_up_readings[arm]
            results.append(
                Result(
                    model=name,
                    parameters=sum(p.numel() for p in arms[arm].model.parameters()),
                    arm=arm,
                    bare_ms_per_step=1e3 * statistics.median(bare_blocks) / block,
                    ratio=quartiles[1],
                    ratio_q1=quartiles[0],
                    ratio_q3=quartiles[2],
                    steps_read=readings / (arms[arm].step - WARM_UP_STEPS),
                    phase=None if monitor is None else str(monitor.phase),
                )
            )
    return results


def table(results: list[Result], rounds: int, block: int, device: str) -> Table:
    where = f"{torch.get_num_threads()} thread(s)" if device == "cpu" else torch.cuda.get_device_name(device)
    title = f"a training step, monitored / bare ({where}, {rounds} rounds of {block} steps)"
    view = Table(title=title)
    for column in ("model", "arm", "ratio", "quartiles", "steps read"):
        view.add_column(column, no_wrap=True)
    for name in dict.fromkeys(result.model for result in results):
        arms = [result for result in results if result.model == name]
        facts = [name, f"{arms[0].parameters:,} parameters", f"bare {arms[0].bare_ms_per_step:.2f} ms a step"]
        for fact, result in zip_longest(facts, arms, fillvalue=""):
            quartiles = f"{result.ratio_q1:.3f}–{result.ratio_q3:.3f}"
            read = "–" if result.phase is None else f"{result.steps_read:.0%}"
            view.add_row(fact, result.arm, f"{result.ratio:.3f}×", quartiles, read)
        view.add_section()
    return view


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.overhead",
        description="Paired, interleaved timings of training with and without the monitor.",
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=11, help="blocks of each arm (default %(default)s)")
    parser.add_argument("--block", type=int, default=16, help="steps of a block (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.block < 1:
        parser.error("--rounds and --block must be at least 1")

    torch.set_num_threads(args.threads)
    console = Console()
    results = [
        result
        for name in args.models
        for result in measure(name, args.rounds, args.block, args.device, args.seed, console)
    ]
    console.print(table(results, args.rounds, args.block, args.device))
    if args.json is not None:
        record = {
            "torch": torch.__version__,
            "threads": args.threads,
            "device": args.device,
            "rounds": args.rounds,
            "block": args.block,
            "results": [asdict(result) for result in results],
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
