"""What runs on every rank: small trainings that return what they saw and what became of them."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel as DDP

from nfi_monitor import (
    Alert,
    AlertKind,
    AlertState,
    Autopilot,
    Change,
    Mechanism,
    Monitor,
    Phase,
    Severity,
)
from nfi_monitor.integrations.attach import Attachment
from nfi_monitor.ranks import processes
from nfi_monitor.ranks import team as teams
from nfi_monitor.remedies import Policy
from tests.runs import differences, snapshot
from tests.spiking import LR, P, division, division_data

SEED = 2
"""Slingshots at about step 580, or, where rounding is such that it just does not, at 1,050 or 1,600."""
LAST = 2000


def seen(monitor: Monitor) -> dict[str, Any]:
    """What a monitor has to say, in plain types."""
    return {
        "alerts": [alert.to_json() for alert in monitor.alerts],
        "phases": [(step, phase.value) for step, phase in monitor.phases],
        "history": {name: [column.tolist() for column in monitor.history[name]] for name in monitor.history},
        "notes": {note.code: note.message for note in monitor.notes},
        "step": monitor.step,
    }


WARM_UP = 10


def learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    steps: int,
    monitor: Monitor | None = None,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> None:
    """The plain loop of :mod:`tests.spiking`, ten steps of warm-up included."""
    for _ in range(steps):
        taken = max((float(state["step"]) for state in optimizer.state.values()), default=0.0)
        for group in optimizer.param_groups:
            group["lr"] = LR * min((taken + 1) / WARM_UP, 1.0)
        loss = loss_of(model(inputs), targets)
        if monitor is not None:
            monitor.observe_loss(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def ddp_slingshot(rank: int, world: int) -> dict[str, Any]:
    """The same spiking run that one process makes of as many micro-batches, from a step of its on."""
    return spiking(DDP, rank, world, kept("accumulated", RESUMED))


def ddp_slingshot_whole(rank: int, world: int) -> dict[str, Any]:
    return spiking(DDP, rank, world, every=1)


def ddp_slingshot_4(rank: int, world: int) -> dict[str, Any]:
    return spiking(DDP, rank, world)


def fsdp_slingshot(rank: int, world: int) -> dict[str, Any]:
    return spiking(sharded((world,)), rank, world)


def spiking(
    wrap: Callable[[nn.Module], nn.Module],
    rank: int,
    world: int,
    checkpoint: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Until a few steps after a slingshot has begun: all ranks see it at the same step."""
    inputs, targets = division_data(SEED)
    bare, _, _ = division(SEED)
    states = None if checkpoint is None else torch.load(checkpoint, weights_only=True)
    if states is not None:
        bare.load_state_dict(states[0])
    model = wrap(bare)
    optimizer = adam(model)
    with Monitor(model, optimizer, console=False, overhead_budget=None, **options) as monitor:
        if states is not None:
            optimizer.load_state_dict(states[1])
            monitor.load_state_dict(states[2])
        while not begun(monitor) and monitor.step < LAST:
            learn(model, optimizer, inputs[rank::world], targets[rank::world], 10, monitor)
    return {"seen": seen(monitor), "state": whole(bare, optimizer)}


def accumulated_whole(rank: int, world: int) -> dict[str, Any]:
    """Every step is read: without that, one process reads some steps more than two ranks do.

    It sees an unusual loss at once; ranks exchange the losses of unread steps with the next reading.
    """
    return accumulated(rank, world, every=1)


def accumulated(rank: int, world: int, **options: Any) -> dict[str, Any]:
    """One process, two micro-batches a step: what each of two ranks has."""
    inputs, targets = division_data(SEED)
    model, _, _ = division(SEED)
    optimizer = adam(model)
    with Monitor(model, optimizer, console=False, overhead_budget=None, **options) as monitor:
        while not begun(monitor) and monitor.step < LAST:
            for _ in range(10):
                for group in optimizer.param_groups:
                    group["lr"] = LR * min((monitor.step + 1) / WARM_UP, 1.0)
                for part in range(2):
                    loss = F.cross_entropy(model(inputs[part::2]), targets[part::2])
                    monitor.observe_loss(loss)
                    (loss / 2).backward()
                optimizer.step()
                optimizer.zero_grad()
            if not options:
                keep("accumulated", model, optimizer, monitor)
    return {"seen": seen(monitor), "state": whole(model, optimizer)}


RESUMED = 480
"""A step of :func:`accumulated` and :func:`one_head` from which other ranks go on: at risk by then, and
nothing imminent yet. What is before it costs much and is alike in all of them; slow cases run it, too."""


def kept(case: str, step: int) -> Path:
    return Path(os.environ["CASE_FOLDER"]).with_name(f"{case}.{step}.pt")


def keep(case: str, model: nn.Module, optimizer: torch.optim.Optimizer, monitor: Monitor) -> None:
    if monitor.step == RESUMED:
        torch.save([part.state_dict() for part in (model, optimizer, monitor)], kept(case, RESUMED))


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.95))


def begun(monitor: Monitor) -> bool:
    return any(alert.kind is AlertKind.SLINGSHOT for alert in monitor.alerts)


def compared(
    wrap: Callable[[nn.Module], nn.Module],
    data: tuple[Tensor, Tensor],
    steps: int = 20,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    prepare: Callable[[nn.Module, torch.optim.Optimizer], Any] = lambda model, optimizer: None,
    **options: Any,
) -> dict[str, Any]:
    """Train without and with the monitor: what it saw, and where the two differ in any bit."""
    states, out = [], {}
    for monitored in (False, True):
        torch.manual_seed(0)
        model = wrap(division()[0])
        optimizer = adam(model)
        if monitored:
            with Monitor(model, optimizer, console=False, **options) as monitor:
                learn(model, optimizer, *data, steps, monitor, loss_of)
            out = seen(monitor)
        else:
            learn(model, optimizer, *data, steps, None, loss_of)
        states.append(whole(model, optimizer))
    return {"seen": out, "differences": differences(*states), "state": states[1]}


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A snapshot in which sharded tensors are put together."""

    def full(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: full(one) for key, one in value.items()}
        return value.full_tensor() if isinstance(value, DTensor) else value

    return full(snapshot(model, optimizer))


def part(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of the first 76."""
    inputs, targets = division_data()
    return inputs[:76][rank::world], targets[:76][rank::world]


def ddp(rank: int, world: int) -> dict[str, Any]:
    return compared(DDP, part(rank, world), every=1)


def fsdp(rank: int, world: int) -> dict[str, Any]:
    return compared(sharded((world,)), part(rank, world), every=1)


def hsdp(rank: int, world: int) -> dict[str, Any]:
    return compared(sharded((2, world // 2)), part(rank, world), every=1)


def sharded(shape: tuple[int, ...]) -> Callable[[nn.Module], nn.Module]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])

    def wrap(model: nn.Module) -> nn.Module:
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return wrap


def fsdp1(rank: int, world: int) -> dict[str, Any]:
    """The older FullyShardedDataParallel, whose parameters are flat pieces."""

    def wrap(model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    return compared(wrap, part(rank, world), every=1)


def tensor_parallel(rank: int, world: int) -> dict[str, Any]:
    """The head cut along its classes, its logits put together again; every rank has all rows."""
    inputs, targets = division_data()
    return compared(parallel(world, gathered=True), (inputs[:76], targets[:76]), every=1)


def vocabulary_parallel(rank: int, world: int) -> dict[str, Any]:
    """The logits stay cut along the classes, and so does the loss."""
    inputs, targets = division_data()
    with loss_parallel():
        return compared(parallel(world, gathered=False), (inputs[:76], targets[:76]), every=1)


def vocabulary_parallel_4(rank: int, world: int) -> dict[str, Any]:
    """13 classes on four ranks: 4, 4, 4 and a single one."""
    inputs, targets = division_data()
    with loss_parallel():
        return compared(parallel(world, gathered=False), (inputs[:76], targets[:76]), 4, every=1)


def vocabulary_local(rank: int, world: int) -> dict[str, Any]:
    """Logits as plain tensors of some classes, for a loss of the user's own that knows it."""
    inputs, targets = division_data()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=True)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "6": head}

    def loss_of(logits: Tensor, wanted: Tensor) -> Tensor:
        return whole_loss(DTensor.from_local(logits, mesh, [Shard(-1)], shape=(76, P), stride=(P, 1)), wanted)

    def wrap(model: nn.Module) -> nn.Module:
        return parallelize_module(model, mesh, plan)

    seen_by_one = compared(wrap, (inputs[:76], targets[:76]), 6, loss_of, every=1, group=False)
    return compared(wrap, (inputs[:76], targets[:76]), 6, loss_of, every=1) | {"alone": seen_by_one}


def vocabulary_accumulated(rank: int, world: int) -> dict[str, Any]:
    """Two micro-batches a step, an ignored row in each, bfloat16 logits; what is saved goes on elsewhere."""
    inputs, targets = division_data()
    targets = targets.clone()
    targets[::20] = -100
    model = parallel(world, gathered=False)(division()[0]).bfloat16()
    optimizer = adam(model)
    states = []
    monitor = Monitor(model, optimizer, console=False, every=1)
    for step in range(6):
        for part in range(2):
            with loss_parallel():
                F.cross_entropy(model(inputs[part::2].bfloat16()), targets[part::2]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            states.append(monitor.state_dict())
            monitor.close()
            monitor = Monitor(model, optimizer, console=False, every=1)
            monitor.load_state_dict(states[0])
    states.append(monitor.state_dict())
    monitor.close()
    return {"seen": seen(monitor), "kinds": [state["loss_kind"] for state in states]}


def vocabulary_slingshot(rank: int, world: int) -> dict[str, Any]:
    """The last hundred steps before a slingshot, as ranks that share the head's classes."""
    return vocabulary_slung(world, RESUMED)


def vocabulary_slingshot_whole(rank: int, world: int) -> dict[str, Any]:
    return vocabulary_slung(world, 0)


def vocabulary_slung(world: int, resumed: int) -> dict[str, Any]:
    """Only the head is cut, and the loss is that of whole logits: the same run as :func:`one_head`'s."""
    inputs, targets = division_data(SEED)
    model, _, _ = division(SEED)
    alone = adam(model)
    state = None
    if resumed:
        of_model, of_optimizer, state = torch.load(kept("one_head", resumed), weights_only=True)
        model.load_state_dict(of_model)
        alone.load_state_dict(of_optimizer)
    before = [alone.state.get(param, {}) for param in model.parameters()]
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, {"6": head})
    optimizer = adam(model)
    for param, held in zip(model.parameters(), before, strict=True):
        if held:  # an empty state would look like one that has begun
            optimizer.state[param] = {
                name: distribute_tensor(value, mesh, param.placements)
                if isinstance(param, DTensor) and value.dim()
                else value
                for name, value in held.items()
            }
    return slung(model, optimizer, inputs, targets, whole_loss, state)


def one_head(rank: int, world: int) -> dict[str, Any]:
    """One process that multiplies with each half of the head's classes apart, as two ranks do."""
    inputs, targets = division_data(SEED)
    model, _, _ = division(SEED)
    model[6].__class__ = Halves
    return slung(model, adam(model), inputs, targets, F.cross_entropy, name="one_head")


class Halves(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        halves = zip(self.weight.chunk(2), self.bias.chunk(2), strict=True)
        return torch.cat([F.linear(features, weight, bias) for weight, bias in halves], -1)


def whole_loss(logits: DTensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.full_tensor(), targets)


def slung(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    state: dict[str, Any] | None = None,
    name: str = "",
) -> dict[str, Any]:
    with Monitor(model, optimizer, console=False, overhead_budget=None) as monitor:
        if state is not None:
            monitor.load_state_dict(state)
        while not begun(monitor) and monitor.step < LAST:
            learn(model, optimizer, inputs, targets, 10, monitor, loss_of)
            if name:
                keep(name, model, optimizer, monitor)
        absorbing = monitor.state_dict()["absorbing_classes"]
    return {"seen": seen(monitor), "state": whole(model, optimizer), "absorbing": absorbing}


def fsdp_vocabulary_parallel(rank: int, world: int) -> dict[str, Any]:
    """Two replicas of two ranks that share the head: rows by replica, classes by rank."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)

    def wrap(model: nn.Module) -> nn.Module:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "6": head}
        parallelize_module(model, mesh["tp"], plan)
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])

    with loss_parallel():
        return compared(wrap, part(mesh["dp"].get_local_rank(), 2), every=1)


def parallel(world: int, *, gathered: bool) -> Callable[[nn.Module], nn.Module]:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    head = ColwiseParallel(output_layouts=Replicate() if gathered else Shard(-1), use_local_output=gathered)

    def wrap(model: nn.Module) -> nn.Module:
        return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel(), "6": head})

    return wrap


# --- what may go wrong --------------------------------------------------------------------------------


def half(rank: int, world: int) -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
    model, optimizer, _ = division()
    return DDP(model), optimizer, *part(rank, world)


def warned(monitor: Monitor, kind: AlertKind, state: AlertState = AlertState.FIRING) -> None:
    """An alert of this rank's, made up."""
    mechanism, step = Mechanism.EDGE_OF_STABILITY, monitor.step
    change = Change.BEGIN if state is AlertState.FIRING else Change.END
    monitor._loop.judge.report(
        change, Alert(f"{kind}-1", kind, Severity.CRITICAL, state, Phase.IMMINENT, step, step, mechanism, 0.9)
    )


def rank_0_only(rank: int, world: int) -> dict[str, Any]:
    """Rank 0 alone is watched, and has an alert on which it would act."""
    teams.WAIT = 1.0
    model, optimizer, *data = half(rank, world)
    pilot, monitor, due = Autopilot(), None, None
    if rank == 0:
        options = {"save_on": "imminent", "stop_on": "imminent", "on_alert": pilot, "run_dir": None}
        attachment = Attachment(**options, console=False, every=1)
        monitor = attachment.open(model, optimizer, directory=Path())
    started = time.monotonic()
    learn(model, optimizer, *data, 10, monitor)
    if monitor is not None:
        warned(monitor, AlertKind.IMMINENT)
        due = attachment.act()
    learn(model, optimizer, *data, 10, monitor)
    if monitor is not None:
        monitor.close()
    return {
        "seen": monitor and seen(monitor), "seconds": time.monotonic() - started, "due": due,
        "actions": [action.what for action in pilot.actions], "state": whole(model, optimizer),
    }  # fmt: skip


def disagreed(rank: int, world: int) -> dict[str, Any]:
    """Monitors on one rank alone, or under other settings, and after each time one on all ranks."""
    teams.WAIT = 3.0
    model, optimizer, *data = half(rank, world)
    out: dict[str, Any] = {}

    def attach(name: str, steps: int = 3, **options: Any) -> None:
        monitor = Monitor(model, optimizer, console=False, **{"every": 1, **options})
        started = time.monotonic()
        learn(model, optimizer, *data, steps, monitor)
        out[name] = (time.monotonic() - started, [note.code for note in monitor.notes])
        monitor.close()

    def alone(name: str, steps: int) -> None:
        if rank == 0:
            attach(name, steps)
        else:
            learn(model, optimizer, *data, steps)

    alone("never stepped", 0)
    attach("after one that never stepped")
    alone("alone", 3)
    attach("after one alone")
    attach("other settings", every=1 + rank, head="2" if rank else None)
    attach("after other settings")
    attach("never stepped on both", 0)
    early = Monitor(model, optimizer, console=False, every=1) if rank == 0 else None
    learn(model, optimizer, *data, 3, early)
    late = Monitor(model, optimizer, console=False, every=1) if rank == 1 else None
    started = time.monotonic()
    learn(model, optimizer, *data, 3, early or late)
    out["late"] = (time.monotonic() - started, [note.code for note in (early or late).notes])
    (early or late).close()
    attach("after late")
    return out


def closed_on_rank_1(rank: int, world: int) -> dict[str, Any]:
    """Rank 1 closes its monitor after 10 steps and trains on; both had lowered the learning rate by then."""
    model, optimizer, *data = half(rank, world)
    pilot = Autopilot(Policy(hold=0.1, calm=0.1))
    monitor = Monitor(model, optimizer, console=False, every=2, on_alert=pilot)
    learn(model, optimizer, *data, 5, monitor)
    warned(monitor, AlertKind.IMMINENT)
    learn(model, optimizer, *data, 5, monitor)
    if rank == 1:
        monitor.close()
    started = time.monotonic()
    learn(model, optimizer, *data, 5, monitor)
    if rank == 0:
        warned(monitor, AlertKind.IMMINENT, AlertState.RESOLVED)
        warned(monitor, AlertKind.NON_FINITE)
    learn(model, optimizer, *data, 15, monitor)
    seconds = time.monotonic() - started
    monitor.close()
    return {
        "seen": seen(monitor), "seconds": seconds, "hooks": len(optimizer._optimizer_step_post_hooks),
        "actions": [action.what for action in pilot.actions], "stops": pilot.should_stop,
        "state": whole(model, optimizer),
    }  # fmt: skip


def closed_and_opened(rank: int, world: int) -> dict[str, Any]:
    """All ranks close their monitors and attach new ones before the next step."""
    model, optimizer, *data = half(rank, world)
    first = Monitor(model, optimizer, console=False, every=1)
    learn(model, optimizer, *data, 4, first)
    first.close()
    second = Monitor(model, optimizer, console=False, every=1)
    learn(model, optimizer, *data, 6, second)
    second.close()
    learn(model, optimizer, *data, 3)
    hooks = [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
    return {"first": seen(first), "second": seen(second), "hooks": hooks}


def late(rank: int, world: int) -> dict[str, Any]:
    """Numbers that are taken up some steps later, as on an accelerator; rank 1 leaves in the middle."""
    processes.any_accelerator = lambda model: True
    model, optimizer, *data = half(rank, world)
    monitor = Monitor(model, optimizer, console=False, every="auto")
    learn(model, optimizer, *data, 30, monitor)
    before = seen(monitor)
    if rank == 1:
        monitor.close()
    started = time.monotonic()
    learn(model, optimizer, *data, 20, monitor)
    seconds = time.monotonic() - started
    monitor.close()
    hooks = len(optimizer._optimizer_step_post_hooks)
    return {"before": before, "seen": seen(monitor), "seconds": seconds, "hooks": hooks}


def ended(rank: int, world: int) -> dict[str, Any]:
    """Runs that end between two readings: the last losses are judged when all ranks close their monitors."""
    out: dict[str, Any] = {}
    for name, is_late in (("now", False), ("late", True)):
        processes.any_accelerator = lambda model, late=is_late: late
        model, optimizer, *data = half(rank, world)
        monitor = Monitor(model, optimizer, console=False, every=16)
        learn(model, optimizer, *data, 40, monitor)
        started = time.monotonic()
        monitor.close()
        out[name] = seen(monitor)
        out[name]["seconds"] = time.monotonic() - started
        out[name]["hooks"] = len(optimizer._optimizer_step_post_hooks)
    return out


class HeadNotCalled(nn.Module):
    """Its loss takes the head's weight, as fused losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2 * P, 8), nn.Linear(8, P)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x), self.head.weight, self.head.bias)


def wrapped_later(rank: int, world: int) -> dict[str, Any]:
    """DDP wraps the model after the monitor is attached, and the head is never called as a module."""
    torch.manual_seed(0)
    model = HeadNotCalled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer, console=False, every=1)
    wrapper = DDP(model)
    inputs, targets = (part[rank::world] for part in division_data())
    with monitor:
        learn(wrapper, optimizer, inputs, targets, 6, monitor)
        hooks, acts = len(model._forward_hooks), monitor.port.may_act()
    return {"seen": seen(monitor), "acts": acts, "hooks": hooks}


class InnerLast(nn.Module):
    """Registers an inner layer after the one that makes the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.inner = nn.Linear(8, P), nn.Linear(2 * P, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(torch.relu(self.inner(x)))


def head_by_output(rank: int, world: int) -> dict[str, Any]:
    """The first output shows the head on every rank, before or after DDP wraps the model."""
    out: dict[str, Any] = {}
    inputs, targets = (part[rank::world] for part in division_data())
    for name, named, wrapped in (
        ("named", "logits", True),
        ("found", None, True),
        ("found, wrapped later", None, False),
    ):
        torch.manual_seed(0)
        model = InnerLast()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        wrapper = DDP(model) if wrapped else None
        monitor = Monitor(wrapper or model, optimizer, console=False, every=1, head=named)
        wrapper = wrapper or DDP(model)
        with monitor:
            learn(wrapper, optimizer, inputs, targets, 6, monitor)
            head = monitor.head
        out[name] = {"seen": seen(monitor), "head": None if head is None else head.name}
    return out


def exception_on_rank_1(rank: int, world: int) -> dict[str, Any]:
    """Rank 1's loop leaves the with block by an exception, and trains on without the monitor."""
    model, optimizer, *data = half(rank, world)
    monitor = Monitor(model, optimizer, console=False, every=1)
    try:
        with monitor:
            learn(model, optimizer, *data, 10, monitor)
            if rank == 1:
                raise KeyError("the user's own")
            learn(model, optimizer, *data, 10, monitor)
    except KeyError:
        learn(model, optimizer, *data, 10)
    return {"seen": seen(monitor), "state": whole(model, optimizer)}


def broken_on_rank_1(rank: int, world: int) -> dict[str, Any]:
    """The monitor's own code fails on one rank, at its rows first and in its optimizer later."""
    model, optimizer, *data = half(rank, world)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        learn(model, optimizer, *data, 5, monitor)
        if rank == 1:
            monitor._loop.rows.add = broken
        learn(model, optimizer, *data, 5, monitor)
        if rank == 1:
            monitor._loop.reader.after = broken
        learn(model, optimizer, *data, 5, monitor)
    return {"seen": seen(monitor), "state": whole(model, optimizer)}


def broken(*args: object) -> None:
    raise ArithmeticError("broken on purpose")


def dies(rank: int, world: int) -> dict[str, Any]:
    """Rank 1 is gone in the middle of a run: what the others hear, with and without the monitor."""
    model, optimizer, *data = half(rank, world)
    monitor = Monitor(model, optimizer, console=False, every=1)
    learn(model, optimizer, *data, 10, monitor)
    if rank == 1:
        os._exit(0)
    started = time.monotonic()
    try:
        learn(model, optimizer, *data, 10, monitor)
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    monitor.close()
    return {"seen": seen(monitor), "seconds": time.monotonic() - started, "error": error}


def dies_in_step(rank: int, world: int) -> dict[str, Any]:
    """Rank 1 dies between the training's collective and the monitor's."""
    model, optimizer, *data = half(rank, world)
    monitor = Monitor(model, optimizer, console=False, every=1)
    learn(model, optimizer, *data, 10, monitor)
    if rank == 1:
        optimizer.register_step_pre_hook(lambda *_: os._exit(0))
    started = time.monotonic()
    learn(model, optimizer, *data, 1, monitor)
    seconds = time.monotonic() - started
    monitor.close()
    return {"seen": seen(monitor), "seconds": seconds}


def skips_a_step(rank: int, world: int) -> dict[str, Any]:
    """Rank 1 leaves an optimizer step out: a mistake that DDP itself does not notice."""
    teams.TIMEOUT = 2.0
    model, optimizer, *data = half(rank, world)
    monitor = Monitor(model, optimizer, console=False, every=1)
    learn(model, optimizer, *data, 5, monitor)
    F.cross_entropy(model(data[0]), data[1]).backward()
    if rank != 1:
        optimizer.step()
    optimizer.zero_grad()
    learn(model, optimizer, *data, 5, monitor)
    monitor.close()
    return {"seen": seen(monitor)}


def uneven(rank: int, world: int) -> dict[str, Any]:
    """Rank 1 has a shorter batch, then one that is ignored as a whole."""
    model, optimizer, inputs, targets = half(rank, world)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        learn(model, optimizer, inputs, targets, 3, monitor)
        short = 5 if rank == 1 else len(inputs)
        learn(model, optimizer, inputs[:short], targets[:short], 1, monitor)
        nothing = torch.full_like(targets, -100) if rank == 1 else targets

        def loss_of(logits: Tensor, wanted: Tensor) -> Tensor:
            return F.cross_entropy(logits, wanted, reduction="sum")

        learn(model, optimizer, inputs, nothing, 1, monitor, loss_of)
    return {"seen": seen(monitor), "rows": short}


def joined(rank: int, world: int) -> dict[str, Any]:
    """DDP's join(): rank 1 runs out of batches early, and both go on to another epoch."""
    out = []
    for monitored in (False, True):
        model, optimizer, *data = half(rank, world)
        monitor = Monitor(model, optimizer, console=False, every=1) if monitored else None
        learn(model, optimizer, *data, 5, monitor)
        with model.join():
            learn(model, optimizer, *data, 6 - 2 * rank, monitor)
        learn(model, optimizer, *data, 5, monitor)
        out.append(whole(model, optimizer))
        if monitor is not None:
            monitor.close()
    return {"seen": seen(monitor), "differences": differences(*out)}


def several(rank: int, world: int) -> dict[str, Any]:
    """Two models, their monitors attached in another order on each rank."""
    pairs = []
    for width in (8, 12):
        torch.manual_seed(0)
        model = DDP(nn.Sequential(nn.Linear(2 * P, width), nn.ReLU(), nn.Linear(width, P)))
        pairs.append((model, torch.optim.Adam(model.parameters(), lr=LR)))
    monitors = {}
    for place in (0, 1) if rank == 0 else (1, 0):
        monitors[place] = Monitor(*pairs[place], console=False, every=1)
    for _ in range(3):
        for place, (model, optimizer) in enumerate(pairs):
            learn(model, optimizer, *part(rank, world), 2, monitors[place])
    for monitor in monitors.values():
        monitor.close()
    return {"seen": seen(monitors[0]), "other": seen(monitors[1])}


def sweep(rank: int, world: int) -> dict[str, Any]:
    """Runs of their own that torchrun merely started together: nobody waits for anybody."""
    out = {}
    itself = dist.new_group([rank], use_local_synchronization=True)
    for name, group in (("found", None), ("false", False), ("itself", itself)):
        model, optimizer, _ = division()
        stream = io.StringIO()
        monitor = Monitor(model, optimizer, console=Console(file=stream), every=1, group=group)
        learn(model, optimizer, *division_data(), 3 + rank, monitor)
        monitor.close()
        out[name] = {"seen": seen(monitor), "said": stream.getvalue(), "acts": monitor.port.may_act()}
    return out


def given_group(rank: int, world: int) -> dict[str, Any]:
    """Gradients averaged by hand, the monitor told who belongs together; and a bare model that DDP trains."""
    model, optimizer, _ = division()
    inputs, targets = part(rank, world)
    for name in ("plain", "unwrapped"):
        model, optimizer, _ = division()
        trained = model if name == "plain" else DDP(model)
        group = dist.group.WORLD if name == "plain" else None
        with Monitor(model, optimizer, console=False, every=1, group=group) as monitor:
            for _ in range(3):
                F.cross_entropy(trained(inputs), targets).backward()
                if name == "plain":
                    for param in model.parameters():
                        dist.all_reduce(param.grad)
                        param.grad /= world
                optimizer.step()
                optimizer.zero_grad()
        if name == "plain":
            first = seen(monitor)
    return {"seen": first, "other": seen(monitor)}
