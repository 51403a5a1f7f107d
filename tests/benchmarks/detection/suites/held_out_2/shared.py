"""What the set-ups of the second held-out half share: losses of the output, optimizers, trainings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites import checked
from tests.benchmarks.detection.suites.checked import CheckedTraining, clipped, scheduled
from tests.benchmarks.detection.training import LogitChange, LossOf

Draw = Callable[[int], Any]
"""Optimizer step from 1 → its micro-batches."""


def of_output(function: Callable[..., Tensor]) -> LossOf:
    """Return a loss of the model's output; a micro-batch is (input, what else ``function`` takes)."""

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        return function(training.arm(training.model(batch[0])), *batch[1:])

    return loss


def each_place(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy at every place of a sequence [B, T, K]; -100 is no target."""
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-100)


def generator_of(seed: int, step: int) -> torch.Generator:
    """Return a generator that depends on (seed, step) alone."""
    return torch.Generator().manual_seed(104_729 * (seed + 1) + step)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-6)


def optimizer(
    parameters: Iterable[nn.Parameter], kind: str, lr: float, beta2: float, decay: float
) -> torch.optim.Optimizer:
    """Return the optimizer named ``kind``; its other options are PyTorch's defaults."""
    adams: dict[str, Any] = {
        "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "nadam": torch.optim.NAdam,
        "radam": torch.optim.RAdam, "adamax": torch.optim.Adamax,
    }  # fmt: skip
    if kind in adams:
        return adams[kind](parameters, lr=lr, betas=(0.9, beta2), weight_decay=decay)  # type: ignore[no-any-return]
    if kind == "amsgrad":
        return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, beta2), weight_decay=decay, amsgrad=True)
    if kind == "momentum":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay)
    others: dict[str, Any] = {"adafactor": torch.optim.Adafactor, "adadelta": torch.optim.Adadelta}
    return others[kind](parameters, lr=lr, weight_decay=decay)  # type: ignore[no-any-return]


def trained(
    model: nn.Module,
    loss: LossOf,
    draw: Draw,
    arm: LogitChange,
    *,
    part: Any = None,
    kind: str = "adamw",
    lr: float = 1e-3,
    beta2: float = 0.999,
    decay: float = 0.01,
    schedule: tuple[Any, ...] | None = None,
    clip: float | None = None,
    check_every: int = 10,
    **more: Any,
) -> CheckedTraining:
    """Return the training of a model by AdamW as PyTorch makes it, unless something is changed.

    ``schedule``: a function of checked.py and its arguments. ``more`` goes to CheckedTraining.
    """
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = optimizer(wanted, kind, lr, beta2, decay)
    factor = None if schedule is None else getattr(checked, schedule[0])(*schedule[1:])
    if clip is not None:
        more["before_update"] = clipped(clip)
    return CheckedTraining(
        model, step, loss, draw, scheduled(step, factor), arm, part=part, check_every=check_every, **more
    )
