"""A very long run of a tiny model under a monitor that writes files: what grows, and what does not.

    python -m tests.safety.long_run --steps 1000000

Labels are drawn anew each step, so that nothing happens and the monitor is all there is to grow.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nfi_monitor import Monitor
from nfi_monitor.history import History
from nfi_monitor.report.run_directory.writer import RunDirectory
from nfi_monitor.report.tensorboard.sink import TensorBoardSink

WINDOWS = 20
MIB = 1 << 20


@dataclass(frozen=True)
class Measured:
    """Lists have one number per window of the run."""

    steps: int
    readings: int
    seconds_per_step: list[float]  # of the processor
    before: int  # bytes of the process when it had trained for a while without a monitor
    resident: list[int]  # the same in each window
    blocks: list[int]  # of memory that Python objects hold
    traced: int  # bytes of Python objects that the last steps have left, by tracemalloc
    growing: int  # of them, those that the second half of these steps has left
    traced_steps: int
    files: dict[str, int]  # bytes of each file in the run directory

    @property
    def slower(self) -> float:
        """Time of a step in the last quarter of the run over that in the second."""
        quarter = WINDOWS // 4
        times = self.seconds_per_step
        return statistics.median(times[-quarter:]) / statistics.median(times[quarter : 2 * quarter])

    def __str__(self) -> str:
        def three(values: list[int], unit: float) -> str:
            first, half, last = (values[n] / unit for n in (0, WINDOWS // 2 - 1, -1))
            return f"{first:,.1f} after a twentieth, {half:,.1f} half way, {last:,.1f} at the end"

        lines = [
            f"{self.steps:,} optimizer steps, {self.readings:,} full readings kept in memory",
            f"step: {1e6 * self.seconds_per_step[WINDOWS // 2]:.0f} µs half way, "
            f"{1e6 * self.seconds_per_step[-1]:.0f} µs at the end; last quarter / second: {self.slower:.3f}",
            f"process, MiB (RSS): {self.before / MIB:,.1f} without a monitor, {three(self.resident, MIB)}",
            f"Python's blocks of memory, thousands: {three(self.blocks, 1000)}",
            f"left by the last {self.traced_steps:,} steps (tracemalloc): {self.traced / 1024:.0f} KiB, by "
            f"their second half {self.growing / 1024:.0f}",
            *(f"{name}: {size / MIB:.2f} MiB" for name, size in sorted(self.files.items())),
        ]
        return "\n".join(lines)


def resident() -> int:
    """Bytes of memory this process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def run(
    steps: int, directory: Path, *, history_rows: int | None = None, readings_bytes: int | None = None
) -> Measured:
    """Train so long; the two options are those of the monitor unless given."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.97))  # a seventh is read in full
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, 4, generator=generator)

    def train(count: int) -> None:
        for _ in range(count):
            loss = F.cross_entropy(model(inputs), torch.randint(0, 3, (8,), generator=generator))
            if monitor is not None:
                monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    monitor: Monitor | None = None
    train(200)
    before = resident()
    budget = {} if readings_bytes is None else {"readings_bytes": readings_bytes}
    sinks = [RunDirectory(directory, **budget), TensorBoardSink(directory)]
    monitor = Monitor(model, optimizer, console=False, sinks=sinks, overhead_budget=None)
    if history_rows is not None:
        monitor.history = History(history_rows)
    gc.collect()
    gc.freeze()  # what was there before need not be looked through twenty times
    seconds, memory, blocks = [], [], []
    for _ in range(WINDOWS):
        started = time.process_time()
        train(steps // WINDOWS)
        seconds.append((time.process_time() - started) / (steps // WINDOWS))
        gc.collect()
        memory.append(resident())
        blocks.append(sys.getallocatedblocks())
    # It makes a step ten times slower: the end of the run has to do.
    traced_steps = max(steps // 1000, 100)
    tracemalloc.start()
    left = []
    for _ in range(2):
        train(traced_steps // 2)
        gc.collect()
        left.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    gc.unfreeze()
    readings = len(monitor.history["gradient_norm"][0])
    monitor.close()
    assert not [note for note in monitor.notes if note.code.startswith("failed")], monitor.notes
    files = {
        "TensorBoard's files" if "tfevents" in path.name else path.name: path.stat().st_size
        for path in directory.iterdir()
    }
    return Measured(
        steps, readings, seconds, before, memory, blocks, left[1], left[1] - left[0], traced_steps, files
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(run(arguments.steps, Path(folder)))


if __name__ == "__main__":
    main()
