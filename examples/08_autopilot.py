"""Avert the demo's slingshots with the Autopilot: the same training once unchanged and once with it.

An MLP learns a/b mod 23 by heart, as in ``02_modular_division.py``.  Unchanged, its loss jumps by six orders
of magnitude after some 900 steps and again after some 1,400; on some processors only after some 1,400.  The
second run has the same seed and the same steps.  Its loss is ``autopilot.loss``, which is ``F.cross_entropy``
to the last bit until the monitor warns.

    python examples/08_autopilot.py                          # about 20 s on one core
    python examples/08_autopilot.py --loss-at imminent       # later, with a cool-down
    python examples/08_autopilot.py --dry-run                # only report what would be done

The monitor itself never changes a run.  The Autopilot does, because you pass it as ``on_alert``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nfi_monitor import AlertKind, Autopilot, Monitor
from nfi_monitor.remedies import Action, Policy
from nfi_monitor.report.figure import compare
from nfi_monitor.report.run_directory import read_run

P, WIDTH, DEPTH = 23, 128, 3


@dataclass(frozen=True)
class Flight:
    """The results of one of the two runs."""

    slingshots: list[int]  # first steps
    actions: list[Action]
    loss: float  # on the training rows, in float64, at the end
    accuracy: float  # on the other rows
    run_dir: Path


def division() -> tuple[Tensor, Tensor]:
    """Return ``(one-hot(a) ⊕ one-hot(b) [P(P−1), 2P], a/b mod P [P(P−1)])`` for every a and every b ≠ 0."""
    pairs = torch.tensor([(a, b) for a in range(P) for b in range(1, P)])
    inverse = torch.tensor([0, *(pow(b, -1, P) for b in range(1, P))])
    return F.one_hot(pairs, P).flatten(1).float(), pairs[:, 0] * inverse[pairs[:, 1]] % P


def train(autopilot: Autopilot | None, args: argparse.Namespace, run_dir: Path, console: Console) -> Flight:
    torch.manual_seed(args.seed)
    x, y = division()
    order = torch.randperm(len(y))
    seen, unseen = order[: len(y) // 2], order[len(y) // 2 :]
    sizes = [2 * P, *[WIDTH] * DEPTH]
    hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(WIDTH, P))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    loss_of = F.cross_entropy if autopilot is None else autopilot.loss

    with Monitor(model, optimizer, run_dir=run_dir, console=console, on_alert=autopilot) as monitor:
        for _ in range(args.steps):
            loss = loss_of(model(x[seen]), y[seen])
            monitor.observe_loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warm_up.step()
            if autopilot is not None and autopilot.should_stop:
                break

    with torch.no_grad():
        final = F.cross_entropy(model(x[seen]).double(), y[seen]).item()
        accuracy = (model(x[unseen]).argmax(1) == y[unseen]).double().mean().item()
    slingshots = [alert.first_step for alert in monitor.alerts if alert.kind is AlertKind.SLINGSHOT]
    return Flight(slingshots, [] if autopilot is None else autopilot.actions, final, accuracy, run_dir)


def table(flights: dict[str, Flight], args: argparse.Namespace) -> Table:
    view = Table(title=f"a/b mod {P}, seed {args.seed}, {args.steps:,} steps")
    for column in ("run", "slingshots, at step", "what was done, after step", "train loss", "test accuracy"):
        view.add_column(column)
    for name, flight in flights.items():
        view.add_row(
            name,
            ", ".join(map(str, flight.slingshots)) or "none",
            ", ".join(f"{action.what} {action.step}" for action in flight.actions) or "–",
            f"{flight.loss:.1e}",
            f"{flight.accuracy:.1%}",
        )
    return view


def conclusion(alone: Flight, flown: Flight, dry_run: bool) -> str:
    """Return the conclusion from both runs in one sentence."""
    if not alone.slingshots:
        return "The unchanged run has no slingshot, so there is nothing to avert: try more --steps."
    if dry_run:
        return "A dry run changes nothing: the same slingshots, and the actions that would have been taken."
    averted = len(alone.slingshots) - len(flown.slingshots)
    if flown.slingshots:
        return f"{averted} of {len(alone.slingshots)} slingshots averted."
    return "Same seed, same steps: the monitor warned, the Autopilot acted, and no slingshot came."


def figure(flights: dict[str, Flight], args: argparse.Namespace) -> str:
    """Draw both runs in one figure. Return its path, or why there is none."""
    runs = {name: read_run(flight.run_dir) for name, flight in flights.items()}
    title = f"a/b mod {P}, seed {args.seed}: the same run as it is and with the Autopilot"
    try:
        return str(compare(runs, args.out / "figure.png", title=title))
    except ImportError as missing:
        return f"none: {missing}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The demo's training as it is, and with the Autopilot.")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--loss-at",
        choices=["at_risk", "warning", "imminent"],
        default="warning",
        help="the alert at which the loss is replaced (default %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="change nothing, only report actions")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/autopilot"), help="figure and runs (default %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} holds runs already: pass another --out, or delete it")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)  # at this size a second thread costs more time than it saves
    console = Console()
    autopilot = Autopilot(Policy(loss_at=args.loss_at), dry_run=args.dry_run)
    flights = {
        "as it is": train(None, args, args.out / "alone", console),
        "Autopilot": train(autopilot, args, args.out / "autopilot", console),
    }
    console.print(table(flights, args))
    console.print(conclusion(*flights.values(), args.dry_run))
    # A path as it is: not wrapped, not coloured.
    console.out(f"figure  {figure(flights, args)}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
