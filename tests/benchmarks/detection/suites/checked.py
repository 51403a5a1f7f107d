"""A training that also knows the loss of a fixed part of its training set; what ordinary loops do besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor import Monitor
from tests.benchmarks.detection.training import LossOf, Training

PART = 256
"""Rows of the fixed part."""


class _Unwatched:
    """Stands in for the monitor while the loss of the fixed part is computed."""

    def tap(self, logits: Tensor) -> Tensor:
        return logits


@dataclass
class CheckedTraining(Training):
    """A training with the loss of ``part`` in eval mode every ``check_every`` steps."""

    part: Any = None
    """A micro-batch, as ``loss`` takes it. None: the loss of each step is all there is."""
    check_every: int = 5
    part_loss: LossOf | None = None
    """What is computed of the part, if not ``loss``."""
    before_update: Callable[[nn.Module], None] | None = None
    """Called between backward and the optimizer's step: clipping, a filter."""
    after_update: Callable[[CheckedTraining, int], None] | None = None
    """Called after the optimizer's step: the other player's step, a target network."""

    def step(self, number: int, monitor: Monitor) -> None:
        if self.disturb is not None:
            self.disturb(self, number)
        batches = self.micro_batches(number)
        for batch in batches:
            loss = self.loss(self, batch, monitor)
            monitor.observe_loss(loss)
            (loss / len(batches) if len(batches) > 1 else loss).backward()
        if self.before_update is not None:
            self.before_update(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.after_update is not None:
            self.after_update(self, number)

    def check(self, number: int) -> float | None:
        """Loss of the part before step ``number``; None where it is not looked at.

        In eval mode and without gradient, so that the monitor's hooks keep out of it, and with the random
        state put back: the run is the same with and without.
        """
        if self.part is None or number % self.check_every:
            return None
        modules = [module for module in self.model.modules() if module.training]
        state = torch.get_rng_state()
        self.model.eval()
        try:
            with torch.no_grad():
                watcher: Any = _Unwatched()
                return float((self.part_loss or self.loss)(self, self.part, watcher))
        finally:
            torch.set_rng_state(state)
            for module in modules:
                module.training = True


def clipped(limit: float) -> Callable[[nn.Module], None]:
    """Clip the total norm of the gradients, as the language-model recipes do."""

    def clip(model: nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)

    return clip


def epochs(*tensors: Tensor, size: int, seed: int) -> Callable[[int], Sequence[tuple[Tensor, ...]]]:
    """Minibatches of shuffled epochs, each row once an epoch; a short last batch is left out."""
    rows = len(tensors[0])
    count = max(rows // size, 1)
    state: dict[str, Any] = {"epoch": -1, "order": None}

    def draw(step: int) -> Sequence[tuple[Tensor, ...]]:
        epoch, place = divmod(step - 1, count)
        if epoch != state["epoch"]:
            generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
            state["epoch"], state["order"] = epoch, torch.randperm(rows, generator=generator)
        chosen = state["order"][place * size : (place + 1) * size]
        return [tuple(tensor[chosen] for tensor in tensors)]

    return draw


def part_of(*tensors: Tensor, rows: int = PART) -> tuple[Tensor, ...]:
    """The fixed part: the first rows. Data sets here are shuffled."""
    return tuple(tensor[:rows] for tensor in tensors)


Schedule = Callable[[int], float]
"""Optimizer step from 0 → factor on the learning rate."""


def cosine(total: int, warm: int = 0, last: float = 0.0) -> Schedule:
    """Linear warm-up, then half a cosine down to ``last``."""

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        share = min((step - warm) / max(total - warm, 1), 1.0)
        return last + (1 - last) * 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * share))))

    return factor


def restarts(every: int, growing: float = 1.0) -> Schedule:
    """Cosine warm restarts (Loshchilov and Hutter 2017), each period ``growing`` times the one before."""

    def factor(step: int) -> float:
        length = float(every)
        left = float(step)
        while left >= length:
            left -= length
            length *= growing
        return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * left / length))))

    return factor


def one_cycle(total: int, up: float = 0.3) -> Schedule:
    """Up in a line, down in a line (Smith 2018)."""
    peak = max(int(up * total), 1)
    return lambda step: max(0.04, (step + 1) / peak if step < peak else (total - step) / (total - peak))


def scheduled(
    optimizer: torch.optim.Optimizer, schedule: Schedule | None
) -> torch.optim.lr_scheduler.LRScheduler | None:
    return None if schedule is None else torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
