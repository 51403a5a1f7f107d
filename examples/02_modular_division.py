"""Warn before the slingshots of modular division a/b mod p: float32 against float64 (``nfi-monitor demo``).

An MLP learns a/b mod 23 by heart, full batch, with Adam at lr 1e-3, β = (0.9, 0.95), no weight decay.  Then
margins grow until float32 rounds the correct-class gradient of most rows to exactly 0.  The zero-sum over
classes breaks, the means inflate, and the second moment decays.  After some 900 and 1,400 steps the loss
jumps by six orders of magnitude.  The monitor has to warn long before.

The second arm is the control: the same seed and the same steps, with one difference, ``logits.double()``
before the loss.  Parameters and head stay float32.

    python examples/02_modular_division.py                   # about 20 s on one core
    python examples/02_modular_division.py --seed 3 --slingshots 4

Everything in the table at the end is read from the alerts and from the training itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nfi_monitor import Alert, AlertKind, AlertState, Mechanism, Monitor, Severity
from nfi_monitor.report.figure import compare
from nfi_monitor.report.live import LivePanel
from nfi_monitor.report.run_directory import read_run
from nfi_monitor.report.wording import kind_in_words, mechanism_name

WARM_UP = 10


@dataclass(frozen=True)
class TrainedRun:
    """The results of one run of the training."""

    name: str
    steps: int
    seconds: float
    accuracy: float  # on the test rows, at the end
    alerts: list[Alert]
    slingshots: list[dict[str, Any]]  # as the summary lists them: start, end, leads, mechanism
    run_dir: Path


def modular_division(p: int) -> tuple[Tensor, Tensor]:
    """Return ``(one-hot(a) ⊕ one-hot(b) [p(p−1), 2p], a/b mod p [p(p−1)])`` for every a and every b ≠ 0."""
    a, b = (grid.flatten() for grid in torch.meshgrid(torch.arange(p), torch.arange(1, p), indexing="ij"))
    inverse = torch.tensor([0, *(pow(k, -1, p) for k in range(1, p))])
    return torch.cat([F.one_hot(a, p), F.one_hot(b, p)], dim=1).float(), a * inverse[b] % p


def mlp(p: int, width: int, depth: int) -> nn.Sequential:
    sizes = [2 * p, *[width] * depth]
    hidden = [
        layer for inputs, outputs in pairwise(sizes) for layer in (nn.Linear(inputs, outputs), nn.ReLU())
    ]
    return nn.Sequential(*hidden, nn.Linear(width, p))


def train(
    args: argparse.Namespace, name: str, steps: int, stop_after: int | None, console: Console
) -> TrainedRun:
    """Train one arm: at most ``steps`` optimizer steps, or until ``stop_after`` slingshots have ended."""
    torch.manual_seed(args.seed)
    x, y = modular_division(args.p)
    order = torch.randperm(len(y))
    train_rows, test_rows = order[: len(y) // 2], order[len(y) // 2 :]
    x_train, y_train = x[train_rows], y[train_rows]

    model = mlp(args.p, args.width, args.depth)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, args.beta2), eps=1e-8)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    loss_dtype = getattr(torch, name)

    run_dir = args.out / name
    monitor = Monitor(model, optimizer, run_dir=run_dir, console=console)
    title = f"a/b mod {args.p}, seed {args.seed}, loss in {name}"
    panel = nullcontext() if args.no_live else LivePanel(monitor, steps, console=console, title=title)
    started = time.perf_counter()
    step = 0
    with monitor, panel as live:
        for step in range(1, steps + 1):
            logits = model(x_train)
            loss = F.cross_entropy(logits.to(loss_dtype), y_train)  # the only line in which the arms differ
            monitor.observe_loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warm_up.step()
            if live is not None:
                live.advance()
            if stop_after and step % 10 == 0 and ended(monitor.alerts) >= stop_after:
                break
    seconds = time.perf_counter() - started

    with torch.no_grad():
        accuracy = (model(x[test_rows]).argmax(1) == y[test_rows]).double().mean().item()
    return TrainedRun(name, step, seconds, accuracy, monitor.alerts, monitor.summary()["slingshots"], run_dir)


def ended(alerts: list[Alert]) -> int:
    """Return the number of slingshots that have begun and ended."""
    return sum(a.kind is AlertKind.SLINGSHOT and a.state is AlertState.RESOLVED for a in alerts)


def table(arms: list[TrainedRun], args: argparse.Namespace) -> Table:
    """Return the table of results, with one column for each arm."""
    view = Table(title=f"a/b mod {args.p}, MLP {args.depth}×{args.width}, β2 {args.beta2}, seed {args.seed}")
    view.add_column("arm")
    for arm in arms:
        view.add_column(f"loss in {arm.name}")

    def row(label: str, cell: Callable[[TrainedRun], str]) -> None:
        view.add_row(label, *(cell(arm) for arm in arms))

    def each(key: str) -> Callable[[TrainedRun], str]:
        return lambda arm: ", ".join(f"{event[key] or 'none'}" for event in arm.slingshots) or "–"

    row("optimizer steps", lambda arm: f"{arm.steps:,} in {arm.seconds:.1f} s")
    row("slingshots", lambda arm: f"{len(arm.slingshots)}")
    row("  started at step", each("start"))
    row("first warning", first_warning)
    row("lead in steps, at risk", each("at_risk_lead"))
    row("lead in steps, imminent", each("imminent_lead"))
    row("mechanism named", mechanisms)
    row("final test accuracy", lambda arm: f"{arm.accuracy:.1%} (chance {1 / args.p:.1%})")
    return view


def first_warning(arm: TrainedRun) -> str:
    warnings = [alert for alert in arm.alerts if alert.severity.rank >= Severity.WARNING.rank]
    first = min(warnings, key=lambda alert: alert.first_step, default=None)
    return f"{kind_in_words(first.kind)} @ step {first.first_step}" if first else "none"


def mechanisms(arm: TrainedRun) -> str:
    named = (mechanism_name(Mechanism(event["mechanism"])) for event in arm.slingshots)
    return ", ".join(dict.fromkeys(named)) or "–"


def conclusion(exposed: TrainedRun, control: TrainedRun) -> str:
    """Return the conclusion from both arms in one sentence."""
    if not exposed.slingshots:
        return f"No slingshot within {exposed.steps} steps, so nothing to compare: try more --steps."
    if control.slingshots:
        return "The slingshots survive a float64 loss: rounding alone did not make them."
    return "Same seed, same steps, float64 from the logits to the loss: no slingshot. Rounding made them."


def figure(arms: list[TrainedRun], args: argparse.Namespace) -> str:
    """Draw both arms in one figure from the run directories. Return its path, or why there is none."""
    runs = {arm.name: read_run(arm.run_dir) for arm in arms}
    title = f"a/b mod {args.p}, seed {args.seed}: the same run with the loss in float32 and in float64"
    try:
        return str(compare(runs, args.out / "figure.png", title=title))
    except ImportError as missing:
        return f"none: {missing}"


def fresh_directory(path: Path) -> Path:
    """Return ``path``, or the first of ``path-2``, ``path-3``, … that does not exist yet."""
    number = 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def prime(text: str) -> int:
    number = int(text)
    if number < 3 or any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        raise argparse.ArgumentTypeError(f"{text} is not an odd prime: division mod p needs one, try 23")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nfi-monitor demo",
        description="Train modular division through slingshots under the monitor, then the float64 control.",
    )
    parser.add_argument("--p", type=prime, default=23, help="the modulus, a prime (default %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="of a hidden layer (default %(default)s)")
    parser.add_argument("--depth", type=int, default=3, help="hidden layers (default %(default)s)")
    parser.add_argument("--beta2", type=float, default=0.95, help="Adam's β2 (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slingshots", type=int, default=2, help="stop after so many (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="or at this step (default %(default)s)")
    parser.add_argument("--out", type=Path, help="where figure and runs go (default runs/demo-SEED)")
    parser.add_argument("--no-live", action="store_true", help="alert lines only, no live panel")
    args = parser.parse_args(argv)
    for name in ("width", "depth", "slingshots", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    args.out = fresh_directory(args.out or Path("runs") / f"demo-{args.seed}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at this size a second thread costs more time than it saves
    try:
        console = Console()
        exposed = train(args, "float32", args.steps, args.slingshots, console)
        control = train(args, "float64", exposed.steps, None, console)
    finally:
        torch.set_num_threads(threads)

    arms = [exposed, control]
    console.print(table(arms, args))
    console.print(conclusion(exposed, control))
    # Paths as they are: not wrapped, not coloured, nothing in them read as markup.
    console.out(f"figure  {figure(arms, args)}", highlight=False)
    for arm in arms:
        console.out(f"run     {arm.run_dir}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
