"""The trainings that the tests of this folder watch: the same on the host and on the accelerator."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor
from tests.played.device import Accelerator
from tests.runs import batch, mlp
from tests.spiking import LR, WIDTH, P, division_data, onset


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """As torch chooses it on an accelerator: with ``foreach``, on the host, too, for the same bits."""
    return torch.optim.AdamW(
        model.parameters(), **{"lr": 1e-2, "betas": (0.9, 0.95), "foreach": True, **options}
    )


class Training:
    """A small full-batch training on ``device``. ``accelerator``: its time passes with each step."""

    def __init__(
        self,
        device: torch.device | str,
        accelerator: Accelerator,
        model: nn.Module | None = None,
        data: tuple[Tensor, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        self.model = (mlp() if model is None else model).to(device, dtype)
        self.optimizer = adam(self.model, **options)
        inputs, self.targets = (x.to(device) for x in (batch() if data is None else data))
        self.inputs = inputs.to(dtype)
        self.accelerator = accelerator
        self.losses: list[Tensor] = []
        accelerator.waits.clear()

    def monitored(self, **options: Any) -> Monitor:
        return Monitor(self.model, self.optimizer, **{"console": False, **options})

    def run(
        self,
        steps: int,
        monitor: Monitor | None = None,
        loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        parts: int = 1,
    ) -> None:
        """``parts``: micro-batches of a step."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            for inputs, targets in zip(self.inputs.chunk(parts), self.targets.chunk(parts), strict=True):
                loss = loss_of(self.model(inputs), targets) / parts
                if monitor is not None:
                    monitor.observe_loss(loss)
                loss.backward()
            self.losses.append(loss.detach())
            self.optimizer.step()
            self.accelerator.pass_step()


def division(device: torch.device | str, accelerator: Accelerator, seed: int) -> Training:
    """The cheapest real slingshot: a/b mod 13 (:mod:`tests.spiking`)."""
    torch.manual_seed(seed)
    sizes = [2 * P, WIDTH, WIDTH, WIDTH]
    layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, P))
    return Training(device, accelerator, model, division_data(seed), lr=LR, weight_decay=0.0)


@cache
def spiking_seed() -> tuple[int, int]:
    """A seed of :func:`division` whose slingshot comes early, and its step. Rounding makes it."""
    for seed in range(20):
        training = division("cpu", Accelerator(), seed)
        training.run(620)
        step = onset(loss.item() for loss in training.losses)
        if step is not None:
            return seed, step
    raise AssertionError("no seed spikes early")
