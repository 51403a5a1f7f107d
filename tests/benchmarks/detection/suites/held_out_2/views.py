"""Ordinary trainings that make pictures or points, and of representations."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs
from tests.benchmarks.detection.suites.common import Draw, of_output, trained
from tests.benchmarks.detection.suites.held_out_2.shared import generator_of
from tests.benchmarks.detection.training import LogitChange


def judged_points(
    seed: int, arm: LogitChange, *, batch: int = 64, its_lr: float = 5e-4, **how: Any
) -> CheckedTraining:
    """A GAN of points on a grid; its judge has spectral norms and a hinge (Miyato et al. 2018)."""
    torch.manual_seed(seed)
    maker = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    normed = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(
        normed(nn.Linear(2, 32)), nn.LeakyReLU(0.2), normed(nn.Linear(32, 32)), nn.LeakyReLU(0.2),
        nn.Linear(32, 1),
    )  # fmt: skip
    its = torch.optim.Adam(maker.parameters(), its_lr, betas=(0.0, 0.9))

    def draw(step: int) -> Any:
        generator = generator_of(seed, step)
        real = torch.randint(-1, 2, (batch, 2), generator=generator) + 0.1 * torch.randn(
            batch, 2, generator=generator
        )
        noise = torch.randn(batch, 4, generator=generator)
        return [(real, maker(noise).detach(), noise)]

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        real, made, _ = given
        worth = training.model(torch.cat([real, made]))
        return F.relu(1 - worth[: len(real)]).mean() + F.relu(1 + worth[len(real) :]).mean()

    def make_better(training: Any, number: int) -> None:
        model.eval()
        (-model(maker(draw(number)[0][2])).mean()).backward()
        model.train()
        its.step()
        its.zero_grad()
        training.optimizer.zero_grad()

    return trained(model, loss, draw, arm, after_update=make_better, **how)


class Convolved(nn.Module):
    """A convolutional VAE of black and white pictures; ``forward`` → (logits, divergence per row)."""

    def __init__(self, code: int = 6) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.ELU(),
            nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ELU(), nn.Flatten(), nn.Linear(64, 2 * code),
        )  # fmt: skip
        self.outer = nn.Sequential(
            nn.Linear(code, 64), nn.ELU(), nn.Unflatten(1, (16, 2, 2)),
            nn.ConvTranspose2d(16, 12, 2, stride=2), nn.ELU(), nn.ConvTranspose2d(12, 1, 2, stride=2),
            nn.Flatten(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.inner(x).chunk(2, 1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        apart = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return self.outer(mean + (0.5 * log_variance).exp() * noise), apart


def warming(seed: int, arm: LogitChange, *, full: int = 2000, **how: Any) -> CheckedTraining:
    """The divergence counts from step 2,000 on in full, before in part (Bowman et al. 2016)."""
    torch.manual_seed(seed)
    x = (data.digits(1500, seed=seed)[0] > 0.4).float()
    plain = epochs(x, size=32, seed=seed)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        rows, share = given
        z, apart = training.model(rows)
        wrong = F.binary_cross_entropy_with_logits(z, rows, reduction="none").sum(1)
        return (wrong + share * apart).mean()

    draw = lambda step: [(plain(step)[0][0], min(step / full, 1.0))]  # noqa: E731
    return trained(Convolved(), loss, draw, arm, part=(x[:256], 1.0), watch={"head": False}, **how)


class Masked(nn.Linear):
    """A linear layer in which an output sees earlier inputs alone."""

    def __init__(self, inputs: Tensor, outputs: Tensor, *, strict: bool) -> None:
        super().__init__(len(inputs), len(outputs))
        seen = inputs < outputs[:, None] if strict else inputs <= outputs[:, None]
        self.register_buffer("seen", seen.float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.seen, self.bias)


def one_by_one(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    """The density of binary pictures, each pixel from those before it (Germain et al. 2015)."""
    torch.manual_seed(seed)
    x = (data.digits(1500, seed=seed)[0] > 0.4).float()
    order, hidden = torch.arange(64), torch.arange(96) % 63
    model = nn.Sequential(
        Masked(order, hidden, strict=False), nn.ReLU(), Masked(hidden, hidden, strict=False), nn.ReLU(),
        Masked(hidden, order, strict=True),
    )  # fmt: skip
    plain = epochs(x, size=32, seed=seed)
    draw: Draw = lambda step: [(plain(step)[0][0],) * 2]  # noqa: E731
    loss = of_output(F.binary_cross_entropy_with_logits)
    return trained(model, loss, draw, arm, part=(x[:256], x[:256]), **how)


class Velocity(nn.Module):
    """(Point, time) → velocity, the time as waves that scale each layer (Perez et al. 2018)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, width), nn.Linear(width, width)
        self.time = nn.Linear(8, 2 * width)
        self.proj_out = nn.Linear(width, 2)

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        x, time = given
        waves = time * 2.0 ** torch.arange(4)
        scale, shift = self.time(torch.cat([waves.sin(), waves.cos()], 1)).chunk(2, 1)
        return self.proj_out(F.silu(self.second(F.silu(self.first(x)) * (1 + scale) + shift)))


def straight(
    seed: int, arm: LogitChange, *, batch: int = 64, share: float = 0.99, **how: Any
) -> CheckedTraining:
    """Flow matching (Lipman et al. 2023): the velocity from noise to two moons; an average of the weights."""
    torch.manual_seed(seed)
    angle = 3.1416 * torch.rand(2000)
    moon = torch.stack([angle.cos(), angle.sin()], 1)
    moon[1000:] = torch.tensor([1.0, 0.5]) - moon[1000:]
    moon = (moon + 0.05 * torch.randn(2000, 2))[torch.randperm(2000)]
    plain = epochs(moon, size=batch, seed=seed)
    model = Velocity()
    average = copy.deepcopy(model).requires_grad_(False)

    def between(rows: Tensor, number: int) -> Any:
        generator = generator_of(seed, number)
        noise = torch.randn(rows.shape, generator=generator)
        time = torch.rand(len(rows), 1, generator=generator)
        return (time * rows + (1 - time) * noise, time), rows - noise

    @torch.no_grad()
    def follow(training: Any, number: int) -> None:
        for its, mine in zip(average.parameters(), model.parameters(), strict=True):
            its.lerp_(mine, 1 - share)

    draw: Draw = lambda step: [between(plain(step)[0][0], step)]  # noqa: E731
    loss = of_output(F.mse_loss)
    return trained(model, loss, draw, arm, part=between(moon[:256], 0), after_update=follow, **how)


def _encoder(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU(),
        nn.Linear(48, outputs),
    )  # fmt: skip


def _seen_twice(seed: int, size: int) -> tuple[Draw, tuple[Tensor, Tensor, Tensor]]:
    """Batches of (view, other view, class): pixels rolled by one, noise."""
    x, y = data.digits(1500, seed=seed)
    plain = epochs(x, y, size=size, seed=seed)

    def views(rows: Tensor, target: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = generator_of(seed, number)
        rolls = torch.randint(-1, 2, (2, 2), generator=generator).tolist()
        both = [
            (rows.reshape(-1, 8, 8).roll(roll, (1, 2)).flatten(1))
            + 0.1 * torch.randn(rows.shape, generator=generator)
            for roll in rolls
        ]
        return both[0], both[1], target

    return lambda step: [views(*plain(step)[0], step)], views(x[:128], y[:128], 0)


def cross_correlated(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    """The correlations between two views' numbers should be an identity (Zbontar et al. 2021)."""
    torch.manual_seed(seed)
    draw, part = _seen_twice(seed, 64)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        one, other, _ = given
        z = training.model(torch.cat([one, other]))
        a, b = ((half - half.mean(0)) / (half.std(0) + 1e-4) for half in z.split(len(one)))
        wrong = (a.T @ b / len(one) - torch.eye(z.shape[1])).square()
        return wrong.diag().sum() + 0.02 * (wrong.sum() - wrong.diag().sum())

    return trained(_encoder(16), loss, draw, arm, part=part, watch={"head": False}, **how)


def in_classes(seed: int, arm: LogitChange, *, heat: float = 0.2, **how: Any) -> CheckedTraining:
    """Rows of one class attract each other among all of the batch (Khosla et al. 2020)."""
    torch.manual_seed(seed)
    draw, part = _seen_twice(seed, 32)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        one, other, target = given
        z = F.normalize(training.model(torch.cat([one, other])), dim=1)
        target = target.repeat(2)
        itself = torch.eye(len(z), dtype=torch.bool)
        odds = (z @ z.T / heat).masked_fill(itself, -1e9).log_softmax(1)
        same = (target[:, None] == target) & ~itself
        return -((odds * same).sum(1) / same.sum(1)).mean()

    return trained(_encoder(16), loss, draw, arm, part=part, watch={"head": False}, **how)


def queued(seed: int, arm: LogitChange, *, batch: int = 24, heat: float = 0.1, **how: Any) -> CheckedTraining:
    """A row's other view against a queue of earlier ones, made by a slow copy (He et al. 2020).

    The queue moves on, so no loss of a fixed part is recorded.
    """
    torch.manual_seed(seed)
    draw, _ = _seen_twice(seed, batch)
    model = _encoder(16)
    slow = copy.deepcopy(model).requires_grad_(False)
    held = {"queue": F.normalize(torch.randn(192, 16), dim=1)}

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        one, other, _ = given
        asked = F.normalize(training.model(one), dim=1)
        with torch.no_grad():
            key = F.normalize(slow(other), dim=1)
        z = torch.cat([(asked * key).sum(1, keepdim=True), asked @ held["queue"].T], 1) / heat
        held["queue"] = torch.cat([key, held["queue"][: -len(key)]])
        return F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long))

    @torch.no_grad()
    def follow(training: Any, number: int) -> None:
        for its, mine in zip(slow.parameters(), model.parameters(), strict=True):
            its.lerp_(mine, 0.01)

    return trained(model, loss, draw, arm, after_update=follow, watch={"head": False}, **how)
