"""What comes from outside the optimization: bad batches, corrupt gradients, jumps of the learning rate.

A kick depends on the number of the optimizer step alone, so a replay that repeats the step repeats the kick,
and a replay that uses an earlier step's data does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.detection import setups
from tests.benchmarks.detection.training import LogitChange, Training

LABELS, INPUTS, BOTH = "permuted labels", "scaled inputs", "permuted labels and scaled inputs"
SCALED, FLIPPED, GARBAGE = "scaled gradient", "flipped gradient", "garbage gradient"
RATE = "rate jump"
KINDS = {
    "bad batch": (LABELS, INPUTS, BOTH),
    "corrupt gradient": (SCALED, FLIPPED, GARBAGE),
    "rate jump": (RATE,),
}
"""Kind of a slingshot from outside → the kicks of that kind."""


@dataclass(frozen=True)
class Kick:
    """``what`` happens in the ``steps`` optimizer steps from ``first`` on.

    ``amount``: factor on the inputs, the gradients or the learning rate; of GARBAGE, its RMS over that of the
    gradients.  LABELS have none.
    """

    what: str
    first: int
    steps: int = 1
    amount: float = 1.0

    @property
    def kind(self) -> str:
        return next(kind for kind, names in KINDS.items() if self.what in names)

    @property
    def last(self) -> int:
        return self.first + self.steps - 1

    def __contains__(self, step: int) -> bool:
        return self.first <= step <= self.last

    def __str__(self) -> str:
        amount = "" if self.what == LABELS else f" × {self.amount:g}"
        return f"{self.what}{amount}, {self.steps} step{'s' * (self.steps > 1)}"


def kicked(seed: int, arm: LogitChange, *, of: str, kick: Kick, **options: Any) -> Training:
    """Build the training of ``setups.OF(seed, arm, **options)`` that is kicked."""
    training: Training = getattr(setups, of)(seed, arm, **options)
    add(training, kick)
    return training


def add(training: Training, kick: Kick) -> None:
    """Kick ``training``. It needs a scheduler that sets the rate anew after each step, and no other kick."""
    if training.disturb is not None or training.scheduler is None:
        raise ValueError("kick a training that has a scheduler and no kick")
    if kick.what in KINDS["bad batch"]:
        good = training.micro_batches

        def draw(step: int) -> Sequence[Any]:
            batches = good(step)
            return [_spoilt(kick, step, *batch) for batch in batches] if step in kick else batches

        training.micro_batches = draw
    elif kick.what == RATE:
        training.disturb = lambda training, number: _jump(training, kick, number)
    else:
        _corrupt(training, kick)


def _spoilt(kick: Kick, step: int, inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    inputs = inputs if kick.what == LABELS else kick.amount * inputs
    if kick.what == INPUTS:
        return inputs, target
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(step))
    return inputs, target[order]


def _jump(training: Training, kick: Kick, number: int) -> None:
    if number in kick:
        for group in training.optimizer.param_groups:
            group["lr"] *= kick.amount


def _corrupt(training: Training, kick: Kick) -> None:
    """Change the gradients between the backward pass and the step, as a faulty all-reduce would."""
    now = 0

    def see(training: Training, number: int) -> None:
        nonlocal now
        now = number

    def corrupt(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if now not in kick:
            return
        generator = torch.Generator().manual_seed(now)
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.grad is None:
                continue
            if kick.what == GARBAGE:
                noise = torch.randn(parameter.grad.shape, generator=generator)
                size = parameter.grad.square().mean().sqrt()
                parameter.grad.copy_(kick.amount * size * noise)
            else:
                parameter.grad.mul_(-kick.amount if kick.what == FLIPPED else kick.amount)

    training.disturb = see
    training.optimizer.register_step_pre_hook(corrupt)
