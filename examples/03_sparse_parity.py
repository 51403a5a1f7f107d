"""Compare two slingshots with different causes: sparse parity under hinge and under cross-entropy loss.

W. Wu's setting (2024, "The slingshot helps with learning"): 40 random bits, the label is the parity of
the first 3, one hidden ReLU layer of width 128, 1,000 training rows in one batch, AdamW lr 1e-2.

Under ``--loss hinge`` every row with a margin above 1 has gradient exactly 0.  So the second moment decays,
while weight decay makes the weights smaller.  When the first row falls below the margin, its gradient is far
larger than the second moment expects.  Precision does not matter: the slingshots also come with
``--loss-dtype float64``.

Under ``--loss cross_entropy`` the gradient never vanishes, but late in training its correct-class entry
is rounded to 0.  The slingshot comes once, after about 15,000 to 19,000 steps.  With ``--loss-dtype float64``
it does not come.

    python examples/03_sparse_parity.py --loss hinge
    python examples/03_sparse_parity.py --loss cross_entropy
    python examples/03_sparse_parity.py --loss cross_entropy --loss-dtype float64
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from nfi_monitor import AlertKind, Monitor
from nfi_monitor.report.live import LivePanel

BITS, RELEVANT, TRAIN_ROWS, TEST_ROWS, WIDTH = 40, 3, 1_000, 10_000, 128


def parity(rows: int) -> tuple[Tensor, Tensor]:
    """Return ``(bits [rows, BITS] as 0.0/1.0, label [rows])``; the label is the XOR of RELEVANT bits."""
    bits = torch.randint(0, 2, (rows, BITS))
    return bits.float(), bits[:, :RELEVANT].sum(1) % 2


def hinge(output: Tensor, label: Tensor) -> Tensor:
    """Return max(0, 1 − y·ŷ), y = ±1. Beyond the margin, the loss and its gradient are exactly 0."""
    return F.relu(1 - (2 * label - 1) * output.squeeze(1)).mean()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Learn sparse parity until it slingshots, and see which mechanism the monitor names."
    )
    parser.add_argument("--loss", choices=["hinge", "cross_entropy"], default="hinge")
    parser.add_argument(
        "--loss-dtype",
        choices=["float32", "float64"],
        default="float32",
        help="precision from the head's output to the loss (default %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=20_000, help="optimizer steps (default %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate (default %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=1e-2, help="AdamW's (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, help="write readings and alerts here (default: nowhere)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)  # at this size a second thread costs more time than it saves
    torch.manual_seed(args.seed)
    bits, label = parity(TRAIN_ROWS)
    test_bits, test_label = parity(TEST_ROWS)

    columns = 1 if args.loss == "hinge" else 2
    loss_of = hinge if args.loss == "hinge" else F.cross_entropy
    model = nn.Sequential(nn.Linear(BITS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, columns))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)

    console = Console()
    monitor = Monitor(model, optimizer, run_dir=args.run_dir, console=console)
    title = f"sparse parity, {args.loss}, loss in {args.loss_dtype}"
    with monitor, LivePanel(monitor, args.steps, console=console, title=title) as panel:
        for _ in range(args.steps):
            output = model(bits)
            if args.loss_dtype == "float64":
                output = output.double()
            loss = loss_of(output, label)
            monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            panel.advance()

    with torch.no_grad():
        output = model(test_bits)
        guess = output.squeeze(1) > 0 if columns == 1 else output.argmax(1)
        accuracy = (guess == test_label).double().mean().item()
    slingshots = [alert for alert in monitor.alerts if alert.kind is AlertKind.SLINGSHOT]
    console.print(monitor.summary())
    console.print(
        f"{len(slingshots)} slingshots in {args.steps} steps"
        + "".join(f"\n  step {alert.first_step}: {alert.mechanism}" for alert in slingshots)
        + f"\ntest accuracy {accuracy:.1%}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
