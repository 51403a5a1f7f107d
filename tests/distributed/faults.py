"""Faults by name in trainings of many processes: what runs on every rank.

Every function that runs on any of the ranks is made to raise on all of them, and on the last one alone.  All
faults of a mode of training go through one launch: the processes attach, train and detach once for each.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel as DDP

from nfi_monitor import Monitor
from nfi_monitor.ranks import processes
from nfi_monitor.ranks import team as teams
from tests.distributed.cases import adam, learn, parallel, part, sharded, whole
from tests.runs import differences
from tests.safety.faults import broken, during, traced
from tests.safety.outside import OUTSIDE
from tests.safety.scenes import SOON
from tests.spiking import division, division_data

STEPS = 8
PATIENCE = 4.0
"""Seconds that ranks wait for each other: enough for a busy machine, and few faults make them."""
Begin = Callable[[], None]
Wrap = Callable[[nn.Module], nn.Module]


class Ranks(NamedTuple):
    """A training on these ranks; ``leaves``: the last rank closes its monitor in the middle and trains on."""

    wrap: Wrap
    data: tuple[Tensor, Tensor]
    leaves: bool = False
    late: bool = False
    cut: bool = False

    def train(self, begin: Begin | None) -> tuple[Any, Monitor | None]:
        torch.manual_seed(0)
        model = self.wrap(division()[0])
        optimizer = adam(model)
        monitor = None
        if begin is not None:
            monitor = Monitor(
                model, optimizer, console=False, every="auto" if self.late else 2, thresholds=SOON
            )
            begin()
        with loss_parallel() if self.cut else nullcontext():
            learn(model, optimizer, *self.data, STEPS // 2, monitor)
            if monitor is not None and self.leaves and dist.get_rank() == dist.get_world_size() - 1:
                monitor.close()
            learn(model, optimizer, *self.data, STEPS // 2, monitor)
        if monitor is not None:
            monitor.close()
        return whole(model, optimizer), monitor


def ddp(rank: int, world: int) -> Ranks:
    return Ranks(DDP, part(rank, world))


def leaving(rank: int, world: int) -> Ranks:
    return Ranks(DDP, part(rank, world), leaves=True)


def late(rank: int, world: int) -> Ranks:
    processes.any_accelerator = lambda model: True  # in this process, until the case is over
    return Ranks(DDP, part(rank, world), late=True)


def fsdp(rank: int, world: int) -> Ranks:
    return Ranks(sharded((world,)), part(rank, world))


def vocabulary(rank: int, world: int) -> Ranks:
    inputs, targets = division_data()
    return Ranks(parallel(world, gathered=False), (inputs[:76], targets[:76]), cut=True)


Report = dict[str, dict[str, Any]]
"""Function, and where it was broken → what became of that training."""


def everything(rank: int, world: int) -> Report:
    """Each function in the first of the modes that runs it."""
    return tried(rank, world, ddp, leaving, fsdp, vocabulary, late)


everything.limit = 1800.0  # type: ignore[attr-defined]


def some(rank: int, world: int) -> Report:
    return tried(rank, world, ddp, every=50)


def tried(rank: int, world: int, *modes: Callable[[int, int], Ranks], every: int = 1) -> Report:
    teams.WAIT = teams.TIMEOUT = PATIENCE
    report: Report = {}
    known: set[str] = set(OUTSIDE)
    for mode in modes:
        ranks = mode(rank, world)
        bare, _ = ranks.train(None)
        (_, monitor), found = during(ranks.train, traced())
        usual = said(monitor)
        lists: list[list[str]] = [[] for _ in range(world)]
        dist.all_gather_object(lists, list(found))
        new = sorted(set().union(*lists) - known)
        known |= set(new)
        for place, name in enumerate(new[::every]):
            for where in ("all", "last") if every == 1 else (("all", "last")[place % 2],):
                here = where == "all" or rank == world - 1
                its = once(ranks, bare, usual, found.get(name) if here else None)
                report[f"{mode.__name__} {name} {where}"] = its
                if any(its["notes"]) or its["harmed"]:  # read where a launch ran out of time
                    print(f"{mode.__name__} {name} {where}: rank {rank}", its, flush=True)
                if its["harmed"]:
                    return report  # the ranks may be at different steps from here on
                dist.barrier()
    return report


def said(monitor: Monitor | None) -> list[tuple[str, str]]:
    """What failed, in a monitor's notes."""
    notes = [] if monitor is None else monitor.notes
    return [(n.code, n.message) for n in notes if n.code.startswith("failed_") or n.code == "ranks_apart"]


def once(
    ranks: Ranks, bare: Any, usual: list[tuple[str, str]], code: types.CodeType | None
) -> dict[str, Any]:
    started, raised, harmed, notes = time.monotonic(), [], "", []
    try:
        (state, monitor), raised = during(ranks.train, nullcontext([]) if code is None else broken(code))
        harmed = ", ".join(differences(bare, state)[:1])
        notes = [code for code, message in said(monitor) if (code, message) not in usual]
    except Exception as error:
        harmed = repr(error)
    seconds = time.monotonic() - started
    return {
        "raised": bool(raised),
        "harmed": harmed,
        "notes": notes,
        "seconds": seconds,
        "hung": seconds > 3 * PATIENCE,
    }
