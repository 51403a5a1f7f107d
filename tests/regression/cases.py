"""Define the trainings to record. Each case is a function ``case(out)`` that writes files into ``out``.

No case may depend on the clock.  So the interval between readings depends on τ only
(``overhead_budget=None``)."""

from __future__ import annotations

import importlib
import io
import json
import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Alert, Autopilot, Monitor
from tests.benchmarks.detection.families import suite
from tests.regression.dump import dump, event_sink, recorded, stop_the_clock
from tests.runs import batch, mlp
from tests.spiking import division

Case = Callable[[Path], None]
NO_CLOCK: dict[str, Any] = {"overhead_budget": None}


def _watched(
    out: Path, train: Callable[[Monitor], None], model: nn.Module, optimizer: Any, **options: Any
) -> None:
    """Train under a monitor with all its outputs, and write its output into ``out``."""
    seen: list[dict[str, Any]] = []
    holder: list[Monitor] = []

    def on_alert(alert: Alert) -> None:
        explained = str(holder[0].explain(alert)) if holder else ""
        seen.append({"alert": alert.to_json(), "explained": explained})

    console = _console()
    options.setdefault("on_alert", on_alert)
    monitor = Monitor(
        model, optimizer, console=console, run_dir=out / "run", sinks=[event_sink(out)], **NO_CLOCK, **options
    )
    holder.append(monitor)
    with monitor:
        train(monitor)
    dump(monitor, out, console=console, extra={"on_alert": seen})


def _console() -> Any:
    from rich.console import Console

    return Console(file=io.StringIO(), width=110, color_system=None)


def _family(name: str, out: Path, **options: Any) -> None:
    (family,) = suite("full", [name])
    training = family.build(family.seeds[0], family.arm)
    steps = min(family.steps, 2500)

    def train(monitor: Monitor) -> None:
        for number in range(1, steps + 1):
            training.step(number, monitor)

    _watched(out, train, training.model, training.optimizer, **{**training.watch, **options})


def _division(out: Path, steps: int = 1150, **options: Any) -> None:
    model, optimizer, step = division(0)

    def train(monitor: Monitor) -> None:
        for n in range(1, steps + 1):
            step(monitor, n)

    _watched(out, train, model, optimizer, **options)


def _probe(out: Path) -> None:
    inputs = torch.eye(26)[:8]
    _division(out, 700, every=1, probe=(inputs, torch.arange(8) % 13))


def _resumed(out: Path) -> None:
    """Stop a training three times; each time a new monitor continues it from JSON, in the same directory."""
    model, optimizer, step = division(0)
    state: str | None = None
    begin = 0
    for end in (150, 560, 640, 900):
        monitor = Monitor(
            model,
            optimizer,
            console=False,
            run_dir=out / "run",
            sinks=[event_sink(out, str(end))],
            **NO_CLOCK,
        )
        if state is not None:
            monitor.load_state_dict(json.loads(state))
        for n in range(begin + 1, end + 1):
            step(monitor, n)
        state, begin = json.dumps(monitor.state_dict()), end
        monitor.close()
    dump(monitor, out)


def _gone_back(out: Path) -> None:
    """Return to an earlier state of the run within one process, and continue from there."""
    import copy

    model, optimizer, step = division(0)
    monitor = Monitor(
        model, optimizer, console=False, run_dir=out / "run", sinks=[event_sink(out)], **NO_CLOCK
    )
    kept: Any = None
    with monitor:
        for n in range(1, 661):
            step(monitor, n)
            if n == 500:
                kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), monitor.state_dict()))
        model.load_state_dict(kept[0])
        optimizer.load_state_dict(kept[1])
        monitor.load_state_dict(kept[2])
        for n in range(501, 701):
            step(monitor, n)
    dump(monitor, out)


def _autopilot(out: Path, dry_run: bool = False) -> None:
    model, optimizer, _ = division(0)
    from tests.spiking import division_data

    inputs, targets = division_data(0)
    pilot = Autopilot(dry_run=dry_run)

    def train(monitor: Monitor) -> None:
        for _ in range(900):
            loss = pilot.loss(model(inputs), targets)
            monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if pilot.should_stop:
                break

    _watched(out, train, model, optimizer, on_alert=pilot)
    actions = [vars(action) | {} for action in pilot.actions]
    (out / "actions.json").write_text(json.dumps(actions, indent=1))


def _replayed(out: Path) -> None:
    model, optimizer, step = division(0)
    losses: dict[int, float] = {}

    def train(monitor: Monitor) -> None:
        for n in range(1, 1151):
            losses[n] = step(monitor, n)
            if any(alert.kind == "slingshot" for alert in monitor.alerts):
                break
        monitor.replay(lambda n: step(None, n))

    _watched(out, train, model, optimizer)


def _plain(
    out: Path,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    steps: int = 60,
    classes: int = 7,
    report_loss: bool = True,
    optimizer_of: Callable[[nn.Module], Any] = lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3),
    damage: Callable[[nn.Module, int], None] | None = None,
    change: Callable[[nn.Module], None] = lambda model: None,
    **options: Any,
) -> None:
    model = mlp(classes=classes)
    change(model)
    optimizer = optimizer_of(model)
    inputs, targets = batch(classes=classes)

    def train(monitor: Monitor) -> None:
        for n in range(1, steps + 1):
            if damage is not None:
                damage(model, n)
            loss = loss_of(model(inputs), targets)
            if report_loss:
                monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    _watched(out, train, model, optimizer, **options)


def _not_a_number(model: nn.Module, step: int) -> None:
    if step == 40:
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] = torch.nan


def _freeze_head(model: nn.Module) -> None:
    for parameter in list(model.children())[-1].parameters():
        parameter.requires_grad_(False)


def _lost_head(model: nn.Module) -> None:
    """Make a head whose hook never fires: the model computes its logits with the head's weight itself."""
    head = list(model.children())[-1]
    body = nn.Sequential(*list(model.children())[:-1])
    model.forward = lambda x: F.linear(body(x), head.weight, head.bias)  # type: ignore[method-assign]


def _tap(out: Path) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inputs, targets = batch()

    def train(monitor: Monitor) -> None:
        for _ in range(300):
            loss = F.cross_entropy(monitor.tap(model(inputs).bfloat16()), targets)
            monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    _watched(out, train, model, optimizer, head=False)


def _accumulated(out: Path) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = batch()

    def train(monitor: Monitor) -> None:
        for _ in range(40):
            for half in (slice(0, 10), slice(10, 24)):
                loss = F.cross_entropy(model(inputs[half]), targets[half])
                monitor.observe_loss(loss)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    _watched(out, train, model, optimizer)


def two_ranks_worker(rank: int, world: int, out: Path) -> None:
    """Train one rank of :func:`_two_ranks`: a division under DDP, with minibatches of its own."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    from tests.spiking import division_data

    torch.manual_seed(0)
    inputs, targets = division_data(0)
    sizes = [26, 64, 64, 64]
    layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
    model = DistributedDataParallel(nn.Sequential(*layers, nn.Linear(64, 13)))
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    mine = slice(rank, None, world)
    where = out / f"rank{rank}"
    where.mkdir(parents=True, exist_ok=True)
    console = _console()
    run_dir = out / "rank0" / "run"
    monitor = Monitor(
        model, optimizer, console=console, run_dir=run_dir, sinks=[event_sink(where)], **NO_CLOCK
    )
    with monitor:
        for _ in range(800):
            loss = F.cross_entropy(model(inputs[mine]), targets[mine])
            monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    dump(monitor, where, console=console)
    dist.destroy_process_group()


def _two_ranks(out: Path) -> None:
    import torch.multiprocessing as mp

    mp.spawn(_spawned, args=(2, out), nprocs=2)
    (out / "store").unlink(missing_ok=True)


def _spawned(rank: int, world: int, out: Path) -> None:
    stop_the_clock()
    two_ranks_worker(rank, world, out)


def _example(name: str, arguments: list[str], out: Path) -> None:
    """Run an example as a user does. The output of the example's monitor is compared."""
    os.environ["COLUMNS"] = "110"
    given = [argument.format(out=out) for argument in arguments]
    importlib.import_module(f"examples.{name}").main(given)


CASES: dict[str, Case] = {
    "division": _division,
    "division-every-1": partial(_division, steps=800, every=1),
    "division-probe": _probe,
    "division-sparse": partial(_division, steps=800, every=7),
    "resumed": _resumed,
    "gone-back": _gone_back,
    "autopilot": _autopilot,
    "autopilot-dry": partial(_autopilot, dry_run=True),
    "replayed": _replayed,
    **{
        name: partial(_family, name)
        for name in (
            "parity-hinge-95",
            "parity-ce-95",
            "transformer-13",
            "bfloat16-loss",
            "high-lr-early",
            "lr-kick",
            "bad-batch",
            "minibatch-half",
            "gpt",
            "z-loss",
            "soft-capped",
            "absorbed-layer-norm",
            "accumulation",
            "decay",
            "warm-restarts",
            "survives-float64-quick",
        )
    },
    "tap": _tap,
    "accumulated": _accumulated,
    "no-loss": partial(_plain, report_loss=False),
    "regression": partial(_plain, loss_of=lambda z, y: F.mse_loss(z.squeeze(-1), y.float()), classes=1),
    "mse-of-classes": partial(_plain, loss_of=lambda z, y: F.mse_loss(z, F.one_hot(y, 7).float())),
    "smoothed": partial(_plain, loss_of=lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1)),
    "ignored": partial(
        _plain, loss_of=lambda z, y: F.cross_entropy(z, torch.full_like(y, -100), reduction="sum")
    ),
    "negative-loss": partial(_plain, loss_of=lambda z, y: F.cross_entropy(z, y) - 1.0),
    "sgd": partial(_plain, optimizer_of=lambda m: torch.optim.SGD(m.parameters(), lr=0.1)),
    "frozen-head": partial(
        _plain,
        change=_freeze_head,
        optimizer_of=lambda m: torch.optim.Adam([p for p in m.parameters() if p.requires_grad]),
    ),
    "lost-head": partial(_plain, change=_lost_head, steps=200),
    "diverges": partial(_plain, optimizer_of=lambda m: torch.optim.SGD(m.parameters(), lr=1e4), steps=40),
    "not-a-number": partial(_plain, damage=_not_a_number),
    "two-ranks": _two_ranks,
    "example-01": partial(_example, "01_plain_loop", ["--steps", "400", "--run-dir", "{out}/run"]),
    "example-03": partial(_example, "03_sparse_parity", ["--steps", "1500", "--run-dir", "{out}/run"]),
    "example-06": partial(_example, "06_tensorboard", ["--out", "{out}/runs"]),
    "example-08": partial(_example, "08_autopilot", ["--steps", "600", "--out", "{out}/runs"]),
}
"""Name → case. Examples choose their own options, so ``stop_the_clock`` is called for them (see __main__)."""


def recordings(directory: Path) -> dict[str, Case]:
    """Return a case for each run that ``python -m tests.benchmarks.detection`` recorded in ``directory``."""
    return {
        f"recorded-{path.stem.rpartition('-')[0]}": partial(recorded, path)
        for path in sorted(directory.glob("*.json"))
    }
