"""What the set-ups of all held-out halves share: losses of the output, optimizers, schedules, trainings.

A change of this module makes the runs of all of them anew (generate.py), unless ``same_runs.json`` says that
it changed no run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites import checked
from tests.benchmarks.detection.suites.checked import CheckedTraining, Schedule, clipped, scheduled
from tests.benchmarks.detection.training import LogitChange, LossOf

Draw = Callable[[int], Any]
"""Optimizer step from 1 → its micro-batches."""

# --- losses, rows ----------------------------------------------------------------------------------------


def of_output(function: Callable[..., Tensor]) -> LossOf:
    """Return a loss of the model's output; a micro-batch is (input, what else ``function`` takes)."""

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        return function(training.arm(training.model(batch[0])), *batch[1:])

    return loss


def each_place(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy at every place of a sequence [B, T, K]; -100 is no target."""
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-100)


def generators(factor: int) -> Callable[[int, int], torch.Generator]:
    """Return a function that makes a generator from (seed, step) alone; each half has its own ``factor``."""
    return lambda seed, step: torch.Generator().manual_seed(factor * (seed + 1) + step)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-6)


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


_ADAMS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "amsgrad": lambda parameters, **how: torch.optim.AdamW(parameters, amsgrad=True, **how),
}
"""Optimizers that take β1 and β2."""
_OTHERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda parameters, **how: torch.optim.SGD(parameters, momentum=0.9, **how),
    "nesterov": lambda parameters, **how: torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **how),
    "centred": lambda parameters, **how: torch.optim.RMSprop(parameters, momentum=0.9, centered=True, **how),
    "lion": Lion,
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "asgd": torch.optim.ASGD,
    "muon": torch.optim.Muon,
}


def optimizer(
    parameters: Iterable[nn.Parameter], kind: str, lr: float, beta2: float, decay: float, **more: Any
) -> torch.optim.Optimizer:
    """Return the optimizer named ``kind``; its other options are PyTorch's defaults, or ``more``."""
    if kind in _ADAMS:
        return _ADAMS[kind](parameters, lr=lr, betas=(0.9, beta2), weight_decay=decay, **more)
    return _OTHERS[kind](parameters, lr=lr, weight_decay=decay, **more)


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


def triangles(half: int, lowest: float = 0.1) -> Schedule:
    """Up in a line for ``half`` steps and down again, over and over (Smith 2017)."""

    def factor(step: int) -> float:
        place = step % (2 * half)
        return lowest + (1 - lowest) * (1 - abs(place - half) / half)

    return factor


def milestones(*steps: int) -> Schedule:
    """A tenth of the rate from each of these steps on."""
    return lambda step: 0.1 ** sum(step >= place for place in steps)


def growing(every: int, factor: float) -> Schedule:
    """The rate × ``factor`` every so many steps, as a test of growing rates does."""
    return lambda step: factor ** (step // every)


_SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "stable": stable, "inverse_root": inverse_root, "polynomial": polynomial, "triangles": triangles,
    "milestones": milestones, "growing": growing, "cosine": checked.cosine, "restarts": checked.restarts,
    "one_cycle": checked.one_cycle,
}  # fmt: skip


# --- models of transformers ----------------------------------------------------------------------------


VOCABULARY = 128
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
USUAL = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
"""The size of a tiny language model, as most configurations name it."""


def of_transformers(kind: str, options: dict[str, Any]) -> nn.Module:
    """Return a new model of the class ``kind`` of ``transformers``."""
    import transformers

    transformers.logging.set_verbosity_error()
    model = getattr(transformers, kind)
    return model(model.config_class(**options))  # type: ignore[no-any-return]


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
    options: dict[str, Any] | None = None,
    **more: Any,
) -> CheckedTraining:
    """Return the training of a model by AdamW as PyTorch makes it, unless something is changed.

    ``schedule``: the name of one of the functions above or in checked.py, and its arguments. ``options``:
    the optimizer's. ``more`` goes to CheckedTraining.
    """
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = optimizer(wanted, kind, lr, beta2, decay, **(options or {}))
    factor = None if schedule is None else _SCHEDULES[schedule[0]](*schedule[1:])
    if clip is not None:
        more["before_update"] = clipped(clip)
    return CheckedTraining(
        model, step, loss, draw, scheduled(step, factor), arm, part=part, check_every=check_every, **more
    )
