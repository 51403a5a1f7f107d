"""What the set-ups of the held-out half share: losses of the output, rows, optimizers, schedules."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites import checked
from tests.benchmarks.detection.suites.checked import CheckedTraining, Schedule, clipped, scheduled
from tests.benchmarks.detection.training import LogitChange, LossOf

Draw = Callable[[int], Any]
"""Optimizer step from 1 → its micro-batches."""


def of_output(function: Callable[..., Tensor]) -> LossOf:
    """Return a loss of the model's output; a micro-batch is (input, what else ``function`` takes)."""

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        return function(training.arm(training.model(batch[0])), *batch[1:])

    return loss


cross_entropy = of_output(F.cross_entropy)
everywhere = of_output(lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-100))
squares = of_output(F.mse_loss)
"""Mean squared error."""


def pinball(*quantiles: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Quantile loss (Koenker and Bassett 1978); the last dimension of the output is the quantiles."""
    levels = torch.tensor(quantiles)

    def function(z: Tensor, y: Tensor) -> Tensor:
        missing = y[..., None] - z
        return torch.maximum(levels * missing, (levels - 1) * missing).mean()

    return function


# --- rows ---------------------------------------------------------------------------------------


def generator_of(seed: int, step: int) -> torch.Generator:
    """Return a generator that depends on (seed, step) alone."""
    return torch.Generator().manual_seed(7_919 * (seed + 1) + step)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-6)


@cache
def code() -> Tensor:
    """Source text of some modules of the standard library, as bytes below 128."""
    import argparse
    import statistics
    import textwrap

    texts = "\n".join(inspect.getsource(module) for module in (argparse, statistics, textwrap))
    return torch.tensor([byte for byte in texts.encode("ascii", "ignore")])


def code_windows(rows: int, length: int, seed: int) -> Tensor:
    starts = torch.randint(0, len(code()) - length, (rows,), generator=generator_of(seed, 0))
    return code()[starts[:, None] + torch.arange(length)]


# --- optimizers and schedules --------------------------------------------------------------------------


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023)."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * momentum.lerp(parameter.grad, 1 - beta1).sign())
                momentum.lerp_(parameter.grad, 1 - beta2)


def optimizer(
    parameters: Iterable[nn.Parameter], kind: str, lr: float, beta2: float, decay: float
) -> torch.optim.Optimizer:
    """Return the optimizer named ``kind``; its other options are PyTorch's defaults."""
    adams: dict[str, Any] = {
        "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "radam": torch.optim.RAdam,
        "adamax": torch.optim.Adamax,
    }  # fmt: skip
    if kind in adams:
        return adams[kind](parameters, lr=lr, betas=(0.9, beta2), weight_decay=decay)  # type: ignore[no-any-return]
    if kind == "nesterov":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=decay)
    others: dict[str, Any] = {
        "lion": Lion, "adafactor": torch.optim.Adafactor, "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
    }  # fmt: skip
    return others[kind](parameters, lr=lr, weight_decay=decay)  # type: ignore[no-any-return]


def stable(total: int, warm: int, share: float = 0.2) -> Schedule:
    """Warm up, stay, and fall in a line to 0 over the last ``share`` (warm-up, stable, decay)."""
    fall = share * total
    return lambda step: min(1.0, (step + 1) / warm, max(total - step, 0) / fall)


def inverse_root(warm: int) -> Schedule:
    """Warm up in a line, then 1/√step (Vaswani et al. 2017)."""
    return lambda step: min((step + 1) / warm, math.sqrt(warm / (step + 1)))


def polynomial(total: int, power: float = 0.9) -> Schedule:
    """(1 − step/total)^power, as segmentation recipes have it."""
    return lambda step: max(1.0 - step / total, 0.0) ** power


def schedule_of(name: tuple[Any, ...] | None) -> Schedule | None:
    if name is None:
        return None
    own: dict[str, Any] = {"stable": stable, "inverse_root": inverse_root, "polynomial": polynomial}
    made = own.get(name[0]) or getattr(checked, name[0])
    return made(*name[1:])  # type: ignore[no-any-return]


# --- trainings -----------------------------------------------------------------------------------------


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

    ``schedule``: a function of checked.py or of this module, and its arguments. ``more`` goes to
    CheckedTraining.
    """
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = optimizer(wanted, kind, lr, beta2, decay)
    if clip is not None:
        more["before_update"] = clipped(clip)
    return CheckedTraining(
        model, step, loss, draw, scheduled(step, schedule_of(schedule)), arm, part=part,
        check_every=check_every, **more,
    )  # fmt: skip


def moving_average(model: nn.Module, share: float = 0.999) -> Callable[[Any, int], None]:
    """Return what keeps an exponential moving average of the weights after every step."""
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(share)
    )
    return lambda training, number: average.update_parameters(training.model)
