"""Declare two quantities that the package does not have, train, and print what became of them as JSON.

A process of its own (:mod:`tests.test_quantities` starts it): the declarations are read at import.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from nfi_monitor import quantities
from nfi_monitor.quantities import Merge, PerRow, Quantity

HERE = "tests.new_quantities"
NEW = (
    Quantity(
        "largest_logit", "nat", "largest logit", "mean of max_k z_k", merge=Merge.ROW_SUMS,
        per_row=PerRow(f"{HERE}:largest_logit", over="counted"),
        chart="margins", curve="largest logit", extreme="max", live=True, tail=True,
    ),
    Quantity(
        "largest_move", "weight", "largest move", "max |Δw|",
        per_step=f"{HERE}:largest_move", chart="update RMS", curve="largest",
    ),
)  # fmt: skip


def largest_logit(rows) -> Tensor:
    return rows.logits.amax(-1)


def largest_move(step) -> Tensor:
    return step.moved.abs().amax()


def main(out: Path) -> None:
    quantities.QUANTITIES.update({quantity.name: quantity for quantity in NEW})
    quantities.READING_ORDER += NEW
    from nfi_monitor import Monitor
    from nfi_monitor.cli import main as command_line
    from nfi_monitor.report.live import LivePanel
    from nfi_monitor.report.tensorboard.tab_data import CHARTS
    from tests.measure.sharded.test_rows import absorbing, joined, quantities_of

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs, targets = torch.randn(8, 4), torch.randint(3, (8,))
    expected: dict[str, float] = {}
    with Monitor(model, optimizer, console=False, every=1, run_dir=out) as monitor:
        for _ in range(3):
            before = torch.cat([p.detach().flatten() for p in model.parameters()])
            tops = []
            for part in (slice(0, 3), slice(3, 8)):  # micro-batches
                logits = model(inputs[part])
                tops.append(logits.detach().amax(-1))
                F.cross_entropy(logits, targets[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
            after = torch.cat([p.detach().flatten() for p in model.parameters()])
            expected["largest_logit"] = float(torch.cat(tops).double().mean())
            expected["largest_move"] = float((after - before).abs().max())
    grad, z, _ = absorbing()
    last = json.loads((out / "readings.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    screen = Console(file=io.StringIO(), force_terminal=True, width=160, color_system=None)
    with LivePanel(monitor, 3, console=screen):
        pass
    found = {
        "expected": expected,
        "history": {name: monitor.history.last(name) for name in expected},
        "readings": {name: last["values"][name] for name in expected},
        "curves": {
            name: curve for chart in CHARTS for name, curve in chart.curves.items() if name in expected
        },
        "summary": [name for name in monitor.summary()["quantities"] if name in expected],
        "live": "largest logit" in screen.file.getvalue(),
        "of_shards": [name for name in quantities_of(joined(grad, z, 2)) if name in expected],
    }
    print(json.dumps(found))
    command_line(["tail", str(out), "-n", "1"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
