"""Ordinary trainings that are no classification: regression, autoencoder, two players, two views."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data, losses, models
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.digits import optimizer, perceptron
from tests.benchmarks.detection.training import LogitChange


def squared(training: Any, batch: Any, monitor: Any) -> Tensor:
    inputs, target = batch
    return F.mse_loss(training.model(inputs), target)


def regression(
    seed: int,
    arm: LogitChange,
    *,
    rows: int = 1200,
    batch: int = 32,
    unit: float = 1.0,
    dropout: float = 0.0,
    huber: bool = False,
    **how: Any,
) -> CheckedTraining:
    """A digit's value and its amount of ink from its pixels, told in another ``unit``."""
    torch.manual_seed(seed)
    x, y = data.digits(rows, seed=seed)
    target = unit * torch.stack([y / 9.0, x.mean(1)], 1)
    model = perceptron(64, 64, 2, 2, dropout=dropout)
    step = optimizer(model, **how)

    def robust(training: Any, given: Any, monitor: Any) -> Tensor:
        return F.smooth_l1_loss(training.model(given[0]), given[1], beta=0.1 * unit)

    return CheckedTraining(
        model, step, robust if huber else squared, epochs(x, target, size=batch, seed=seed), None, arm,
        part=part_of(x, target),
    )  # fmt: skip


def few_rows(seed: int, arm: LogitChange, *, unit: float = 1.0, **how: Any) -> CheckedTraining:
    """Sixteen noisy examples in two minibatches that pull in opposite directions."""
    torch.manual_seed(seed)
    x = torch.randn(16, 20)
    target = unit * torch.randint(0, 4, (16, 1)).float()
    model = perceptron(20, 32, 2, 1, act=nn.GELU)
    step = optimizer(model, **how)
    return CheckedTraining(
        model, step, squared, epochs(x, target, size=8, seed=seed), None, arm, part=(x, target)
    )


def autoencoder(seed: int, arm: LogitChange, *, noise: float = 0.0, **how: Any) -> CheckedTraining:
    """Digits through 8 numbers and back; ``noise`` is added to what goes in."""
    torch.manual_seed(seed)
    x, _ = data.digits(1500, seed=seed)
    model = nn.Sequential(perceptron(64, 64, 1, 8, act=nn.SiLU), nn.SiLU(), perceptron(8, 64, 1, 64))
    step = optimizer(model, **how)
    clean = epochs(x, x, size=32, seed=seed)

    def draw(number: int) -> Any:
        generator = torch.Generator().manual_seed(number)
        (inputs, target) = clean(number)[0]
        return [(inputs + noise * torch.randn(inputs.shape, generator=generator), target)]

    return CheckedTraining(model, step, squared, draw, None, arm, part=part_of(x, x), watch={"head": "2.2"})


def discriminator(
    seed: int, arm: LogitChange, *, rate: float = 2e-3, batch: int = 64, beta1: float = 0.5
) -> CheckedTraining:
    """A GAN on eight points of a circle; the discriminator is watched, the generator learns after it."""
    torch.manual_seed(seed)
    made = perceptron(8, 64, 2, 2)
    model = nn.Sequential(
        nn.Linear(2, 96), nn.LeakyReLU(0.2), nn.Linear(96, 96), nn.LeakyReLU(0.2), nn.Linear(96, 1)
    )
    step = torch.optim.Adam(model.parameters(), rate, (beta1, 0.999))
    other = torch.optim.Adam(made.parameters(), 5e-4, (beta1, 0.999))
    bce = F.binary_cross_entropy_with_logits
    one, zero = torch.ones(batch, 1), torch.zeros(batch, 1)

    def draw(number: int) -> Any:
        generator = torch.Generator().manual_seed(7_919 * (seed + 1) + number)
        angle = torch.randint(0, 8, (batch,), generator=generator) * math.pi / 4
        real = 3 * torch.stack([angle.cos(), angle.sin()], 1)
        real = real + 0.05 * torch.randn(batch, 2, generator=generator)
        return [(real, torch.randn(batch, 8, generator=generator))]

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        real, seeds = given
        return bce(training.model(real), one) + bce(training.model(made(seeds).detach()), zero)

    def generator_step(training: Any, number: int) -> None:
        seeds = draw(number)[0][1]
        bce(training.model(made(seeds)), one).backward()
        other.step()
        other.zero_grad()
        training.optimizer.zero_grad()

    return CheckedTraining(model, step, loss, draw, None, arm, after_update=generator_step)


def two_views(
    seed: int, arm: LogitChange, *, batch: int = 32, rows: int = 1500, **how: Any
) -> CheckedTraining:
    """CLIP's loss on the upper and the lower half of a digit."""
    torch.manual_seed(seed)
    x, _ = data.digits(rows, seed=seed)
    model = models.TwoTowers(32, 64)
    step = optimizer(model, **how)
    return CheckedTraining(
        model,
        step,
        losses.contrastive,
        epochs(x[:, :32], x[:, 32:], size=batch, seed=seed),
        None,
        arm,
        part=(x[:batch, :32], x[:batch, 32:]),
        watch={"head": False},
    )
