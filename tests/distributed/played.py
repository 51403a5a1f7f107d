"""Ranks on played accelerators (:mod:`tests.played.device`): cases for :mod:`tests.distributed.launch`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nfi_monitor import Monitor
from nfi_monitor.native import library
from nfi_monitor.ranks.exchange import LAG
from tests.distributed.cases import seen
from tests.played import device as played
from tests.runs import batch, mlp

STEPS = 70


class Trained:
    """Gradients are averaged by hand: gloo takes no tensors of such a device."""

    def __init__(self, place: torch.device | str, rank: int, world: int) -> None:
        self.world = world
        self.model = mlp().to(place)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=True)
        self.inputs, self.targets = (x.chunk(world)[rank].to(place) for x in batch())

    def step(self, monitor: Monitor | None = None) -> Counter[str]:
        """Return the kernels of the step, without those of averaging; nor is waited for that."""
        accelerator = played.accelerator
        with accelerator.counted() as kernels:
            loss = F.cross_entropy(self.model(self.inputs), self.targets)
            if monitor is not None:
                monitor.observe_loss(loss)
            loss.backward()
        waits = accelerator.waits.copy()
        for param in self.model.parameters():
            grad = param.grad.cpu()
            dist.all_reduce(grad)
            param.grad.copy_(grad / self.world)
        accelerator.waits = waits
        with accelerator.counted() as others:
            self.optimizer.step()
        self.optimizer.zero_grad()
        accelerator.pass_step()
        return kernels + others


def trained(place: torch.device | str, rank: int, world: int) -> dict[str, Any]:
    run = Trained(place, rank, world)
    run.step()
    bare = run.step().total()
    with Monitor(run.model, run.optimizer, console=False, every=1, group=dist.group.WORLD) as monitor:
        played.accelerator.waits.clear()
        kernels = [run.step(monitor).total() - bare for _ in range(STEPS)]
        waited = dict(played.accelerator.waits)
    return {**seen(monitor), "waits": waited, "kernels": max(kernels[LAG + 2 :])}


def late(rank: int, world: int) -> dict[str, Any]:
    """The same training on the host, and on an accelerator."""
    if played.MISSING:
        return {"missing": played.MISSING}
    device = played.register()
    with library.disabled():
        return {
            place: trained(place if place == "cpu" else device, rank, world) for place in ("cpu", "played")
        }
