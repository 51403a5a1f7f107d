"""A training as the proving ground sees it: something that makes one optimizer step at a time.

What distinguishes a run from its control is an *arm*: the same seed and the same steps, with one thing done
to the logits between the head and the loss.  The arm is a field of the training, not of its set-up, so that a
later experiment can switch it in the middle of a run (does the remedy still avert the slingshot?).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor import Monitor


@dataclass(frozen=True)
class LogitChange:
    """What is done to the logits before the loss reads them; by default nothing."""

    loss_dtype: str | None = None  # "float64", "bfloat16", ...: the precision from the logits to the loss
    project: bool = False  # subtract the mean over classes from each row's logit gradient

    def __call__(self, logits: Tensor) -> Tensor:
        if self.project:
            logits.register_hook(lambda grad: grad - grad.mean(-1, keepdim=True))
        return logits if self.loss_dtype is None else logits.to(getattr(torch, self.loss_dtype))


LossOf = Callable[["Training", Any, Monitor], Tensor]
"""(training, micro-batch, monitor) → loss; it passes the logits through ``training.arm``."""


@dataclass
class Training:
    """Everything one run needs. ``step`` is the whole training loop's body."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: LossOf
    micro_batches: Callable[[int], Sequence[Any]]
    """Micro-batches of an optimizer step (counted from 1)."""
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    arm: LogitChange = field(default_factory=LogitChange)
    disturb: Callable[[Training, int], None] | None = None
    """Called before each optimizer step: what comes from outside (a learning-rate kick)."""
    watch: Mapping[str, Any] = field(default_factory=dict)
    """What Monitor is given besides the model and the optimizer."""

    def step(self, number: int, monitor: Monitor) -> None:
        """Make optimizer step ``number`` (counted from 1) under ``monitor``."""
        if self.disturb is not None:
            self.disturb(self, number)
        batches = self.micro_batches(number)
        for batch in batches:
            loss = self.loss(self, batch, monitor)
            monitor.observe_loss(loss)
            (loss / len(batches) if len(batches) > 1 else loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()


def full_batch(*tensors: Tensor) -> Callable[[int], Sequence[tuple[Tensor, ...]]]:
    """The same rows every step."""
    return lambda step: [tensors]


def minibatches(
    *tensors: Tensor, size: int, seed: int, accumulate: int = 1
) -> Callable[[int], Sequence[tuple[Tensor, ...]]]:
    """Random rows without replacement within a step, ``accumulate`` micro-batches of ``size`` rows.

    Batches depend on (seed, step) alone: a run can be continued from any step.
    """
    rows = len(tensors[0])

    def draw(step: int) -> Sequence[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        order = torch.randperm(rows, generator=generator)[: size * accumulate]
        return [tuple(tensor[part] for tensor in tensors) for part in order.split(size)]

    return draw
