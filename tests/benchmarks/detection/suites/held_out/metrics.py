"""Ordinary trainings of representations: pairs, prototypes, angles, and views without labels."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import Draw, of_output, trained
from tests.benchmarks.detection.suites.held_out.shared import generator_of
from tests.benchmarks.detection.training import LogitChange


def encoder(outputs: int = 16, width: int = 48) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, width), nn.LayerNorm(width), nn.LeakyReLU(0.1),
        nn.Linear(width, width), nn.LeakyReLU(0.1), nn.Linear(width, outputs),
    )  # fmt: skip


def siamese(seed: int, arm: LogitChange, *, margin: float = 1.0, **how: Any) -> CheckedTraining:
    """Pairs of one class are drawn together, others pushed to a margin (Hadsell et al. 2006)."""
    torch.manual_seed(seed)
    x, y = data.digits(1500, seed=seed)

    def pairs(number: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = generator_of(seed, number)
        one, other = torch.randint(0, len(y), (2, rows), generator=generator)
        # Every second pair is of one class.
        odds = torch.rand(rows, len(y), generator=generator) * (y[one][:, None] == y[None])
        other = torch.where(torch.arange(rows) % 2 == 0, odds.argmax(1), other)
        return x[one], x[other], (y[one] == y[other]).float()

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        one, other, same = batch
        far = (training.model(one) - training.model(other)).square().sum(1).add(1e-8).sqrt()
        return (same * far.square() + (1 - same) * F.relu(margin - far).square()).mean()

    return trained(encoder(), loss, lambda step: [pairs(step, 24)], arm, part=pairs(0, 256), **how)


def prototypes(seed: int, arm: LogitChange, *, ways: int = 5, shots: int = 3, **how: Any) -> CheckedTraining:
    """Episodes: the nearest mean of a few examples names the class (Snell et al. 2017)."""
    torch.manual_seed(seed)
    x, y = data.digits(1500, seed=seed)
    rows_of = [(y == kind).nonzero().squeeze(1) for kind in range(10)]

    def episode(number: int) -> tuple[Tensor, Tensor]:
        generator = generator_of(seed, number)
        kinds = torch.randperm(10, generator=generator)[:ways].tolist()
        picked = [
            rows_of[kind][torch.randperm(len(rows_of[kind]), generator=generator)[: 2 * shots]]
            for kind in kinds
        ]
        return x[torch.stack(picked)], torch.arange(ways).repeat_interleave(shots)

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        rows, target = batch
        found = training.model(rows)
        means, asked = found[:, :shots].mean(1), found[:, shots:].flatten(0, 1)
        return F.cross_entropy(-torch.cdist(asked, means).square(), target)

    return trained(
        encoder(), loss, lambda step: [episode(step)], arm, part=episode(0), watch={"head": False}, **how
    )


class Angles(nn.Module):
    """Cosines between a row and each class's direction."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder(24)
        self.directions = nn.Parameter(torch.randn(10, 24))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.inner(x), dim=1) @ F.normalize(self.directions, dim=1).T


def angles(
    seed: int, arm: LogitChange, *, margin: float = 0.2, scale: float = 16.0, **how: Any
) -> CheckedTraining:
    """Softmax over scaled cosines with a margin on the right one (Wang et al. 2018)."""
    torch.manual_seed(seed)
    x, y = data.digits(1500, seed=seed)
    loss = of_output(lambda z, t: F.cross_entropy(scale * (z - margin * F.one_hot(t, 10)), t))
    draw = epochs(x, y, size=32, seed=seed)
    return trained(Angles(), loss, draw, arm, part=part_of(x, y), watch={"head": False}, **how)


def _two_views(x: Tensor, seed: int, size: int) -> Draw:
    """Two copies of a batch, each with its own noise and missing pixels."""
    plain = epochs(x, size=size, seed=seed)

    def draw(step: int) -> Any:
        (rows,), generator = plain(step)[0], generator_of(seed, step)
        views = [
            (rows + 0.1 * torch.randn(rows.shape, generator=generator))
            * (torch.rand(rows.shape, generator=generator) > 0.2)
            for _ in range(2)
        ]
        return [tuple(views)]

    return draw


def own_target(seed: int, arm: LogitChange, *, share: float = 0.99, **how: Any) -> CheckedTraining:
    """A network predicts what its own running average makes of another view (Grill et al. 2020)."""
    torch.manual_seed(seed)
    x, _ = data.digits(1500, seed=seed)
    inner = encoder(24)
    target = copy.deepcopy(inner).requires_grad_(False)
    model = nn.Sequential(inner, nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24)))

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        one, other = batch
        with torch.no_grad():
            wanted = target(other)
        return 2 - 2 * F.cosine_similarity(training.model(one), wanted).mean()

    @torch.no_grad()
    def follow(training: Any, number: int) -> None:
        for mine, its in zip(target.parameters(), inner.parameters(), strict=True):
            mine.lerp_(its, 1 - share)

    draw = _two_views(x, seed, 48)
    return trained(model, loss, draw, arm, after_update=follow, watch={"head": False}, **how)


def decorrelated(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    """Two views agree, each number varies, and no two of them vary together (Bardes et al. 2022)."""
    torch.manual_seed(seed)
    x, _ = data.digits(1500, seed=seed)

    def spread(z: Tensor) -> Tensor:
        z = z - z.mean(0)
        together = z.T @ z / (len(z) - 1)
        apart = together - torch.diag(together.diag())
        return F.relu(1 - (together.diag() + 1e-4).sqrt()).mean() + 0.04 * apart.square().sum() / z.shape[1]

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        one, other = (training.model(view) for view in batch)
        return F.mse_loss(one, other) + spread(one) + spread(other)

    draw = _two_views(x, seed, 48)
    return trained(encoder(), loss, draw, arm, part=draw(1)[0], watch={"head": False}, **how)
