"""Ordinary trainings without labels: variational, adversarial, contrastive, scores, densities."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import of_output, trained
from tests.benchmarks.detection.suites.held_out_4.shared import generator_of
from tests.benchmarks.detection.training import LogitChange

# --- variational -------------------------------------------------------------------------------------------


class Categories(nn.Module):
    """Picture → eight questions of five answers → picture (Jang et al. 2017)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.ask = nn.Sequential(nn.Linear(64, width), nn.SELU(), nn.Linear(width, 40))
        self.draw = nn.Sequential(nn.Linear(40, width), nn.SELU(), nn.Linear(width, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.ask(x).unflatten(1, (8, 5))
        chosen = F.gumbel_softmax(z, tau=0.7) if self.training else z.softmax(-1)
        return self.draw(chosen.flatten(1)), z.log_softmax(-1)


def categories(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """A discrete variational autoencoder of digits: nats a pixel."""
    torch.manual_seed(seed)
    (x, _) = data.digits(1200, seed=seed)
    plain = epochs(x, size=batch, seed=seed)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        z, odds = training.model(given[0])
        apart = (odds.exp() * (odds + math.log(5))).sum((1, 2)).mean()
        return F.binary_cross_entropy_with_logits(z, given[0]) + apart / 64

    draw = lambda step: plain(step)  # noqa: E731
    return trained(Categories(), loss, draw, arm, part=(x[:256],), watch={"head": "draw.2"}, **how)


# --- adversarial -------------------------------------------------------------------------------------------


def rivals(
    seed: int, arm: LogitChange, *, of: str, batch: int = 48, lr: float = 5e-4, **how: Any
) -> CheckedTraining:
    """A GAN of squared errors (Mao et al. 2017) on a spiral; watched is the ``judge`` or the ``painter``."""
    torch.manual_seed(seed)
    painter = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2))
    judge = nn.Sequential(
        nn.Linear(2, 40), nn.LeakyReLU(0.2), nn.Linear(40, 40), nn.LeakyReLU(0.2), nn.Linear(40, 1)
    )
    watched, other = (judge, painter) if of == "judge" else (painter, judge)
    its = torch.optim.Adam(other.parameters(), lr, betas=(0.5, 0.999))

    def draw(step: int) -> Any:
        generator = generator_of(seed, step)
        way = torch.rand(batch, 1, generator=generator)
        spiral = way * torch.cat([(7 * way).cos(), (7 * way).sin()], 1)
        spiral = spiral + 0.03 * torch.randn(batch, 2, generator=generator)
        return [(spiral, torch.randn(batch, 4, generator=generator))]

    def loss_of(name: str, given: Any) -> Tensor:
        real, noise = given
        false = judge(painter(noise))
        if name == "painter":
            return (false - 1).square().mean()
        return 0.5 * ((judge(real) - 1).square().mean() + false.square().mean())

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        return loss_of(of, given)

    def follow(training: Any, number: int) -> None:
        given = draw(number + 10_000_000)[0]
        watched.eval()
        loss_of("painter" if of == "judge" else "judge", given).backward()
        watched.train()
        its.step()
        its.zero_grad()
        training.optimizer.zero_grad()

    return trained(watched, loss, draw, arm, after_update=follow, lr=lr, watch={"head": False}, **how)


# --- contrastive -------------------------------------------------------------------------------------------


class TwoSides(nn.Module):
    """Upper and lower half of a digit → vectors of one length."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.upper, self.lower = (
            nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Linear(width, 16)) for _ in range(2)
        )
        self.steep, self.shift = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-5.0))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        near = F.normalize(self.upper(a), dim=1) @ F.normalize(self.lower(b), dim=1).T
        return self.steep.exp() * near + self.shift


def each_pair(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """Which halves belong together, each pair by itself (Zhai et al. 2023)."""
    torch.manual_seed(seed)
    x, _ = data.digits(1400, seed=seed)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        z = training.arm(training.model(given[0]))
        sign = 2 * torch.eye(len(z)) - 1
        return -F.logsigmoid(sign * z).sum(1).mean()

    draw = epochs(x, size=batch, seed=seed)
    return trained(TwoSides(), loss, draw, arm, part=(x[:64],), watch={"head": False}, **how)


class Foretelling(nn.Module):
    """A GRU over rows of a picture; what it knows points at the next row among those of other pictures."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width))
        self.layer, self.point = nn.GRU(width, width, batch_first=True), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.each(x.unflatten(1, (8, 8)))
        told = self.point(self.layer(rows)[0][:, 2:-1])
        return torch.einsum("ntw,mtw->tnm", told, rows[:, 3:]) * rows.shape[-1] ** -0.5


def foretold(seed: int, arm: LogitChange, *, batch: int = 24, **how: Any) -> CheckedTraining:
    """Contrastive predictive coding (van den Oord et al. 2018)."""
    torch.manual_seed(seed)
    x, _ = data.digits(1400, seed=seed)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        z = training.arm(training.model(given[0]))
        own = torch.arange(z.shape[1]).expand(z.shape[0], -1)
        return F.cross_entropy(z.flatten(0, 1), own.flatten())

    draw = epochs(x, size=batch, seed=seed)
    return trained(Foretelling(), loss, draw, arm, part=(x[:64],), watch={"head": False}, **how)


# --- scores and densities ----------------------------------------------------------------------------------


def _grid(count: int, generator: torch.Generator) -> Tensor:
    """Points of four small clouds."""
    corner = torch.randint(0, 2, (count, 2), generator=generator) * 2.0 - 1
    return corner + 0.2 * torch.randn(count, 2, generator=generator)


def scores(seed: int, arm: LogitChange, *, batch: int = 64, **how: Any) -> CheckedTraining:
    """Which noise was added, at one of ten levels (Song and Ermon 2019)."""
    torch.manual_seed(seed)
    level = torch.logspace(0.3, -1.3, 10)
    model = nn.Sequential(nn.Linear(3, 48), nn.Softplus(), nn.Linear(48, 48), nn.Softplus(), nn.Linear(48, 2))

    def rows(count: int, number: int) -> tuple[Tensor, Tensor]:
        generator = generator_of(seed, number)
        size = level[torch.randint(0, 10, (count, 1), generator=generator)]
        noise = torch.randn(count, 2, generator=generator)
        return torch.cat([_grid(count, generator) + size * noise, size.log()], 1), noise

    draw = lambda step: [rows(batch, step)]  # noqa: E731
    return trained(model, of_output(F.mse_loss), draw, arm, part=rows(256, 0), watch={"head": False}, **how)


def against_noise(seed: int, arm: LogitChange, *, batch: int = 64, **how: Any) -> CheckedTraining:
    """A density that need not sum to 1: rows against noise (Gutmann and Hyvärinen 2010)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 40), nn.SiLU(), nn.Linear(40, 40), nn.SiLU(), nn.Linear(40, 1))

    def rows(count: int, number: int) -> tuple[Tensor, Tensor]:
        generator = generator_of(seed, number)
        noise = 1.5 * torch.randn(count, 2, generator=generator)
        return torch.cat([_grid(count, generator), noise]), torch.arange(2 * count) < count

    def loss(z: Tensor, real: Tensor, x: Tensor) -> Tensor:
        noise = -0.5 * (x / 1.5).square().sum(1) - math.log(2 * math.pi * 1.5**2)
        return F.binary_cross_entropy_with_logits(z.squeeze(1) - noise, real.float())

    def batch_of(count: int, number: int) -> Any:
        x, real = rows(count, number)
        return x, real, x

    draw = lambda step: [batch_of(batch, step)]  # noqa: E731
    return trained(model, of_output(loss), draw, arm, part=batch_of(256, 0), **how)


class Mixture(nn.Module):
    """Number → shares, means and widths of four normal distributions (Bishop 1994)."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.out = nn.Linear(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


def mixtures(seed: int, arm: LogitChange, *, batch: int = 64, **how: Any) -> CheckedTraining:
    """A curve told backwards, so that one number has several answers; the likelihood has no floor at 0."""
    torch.manual_seed(seed)
    y = 2 * torch.rand(1500, 1) - 1
    x = y + 0.4 * (7 * y).sin() + 0.08 * torch.randn(1500, 1)

    def loss(z: Tensor, wanted: Tensor) -> Tensor:
        share, mean, width = z.chunk(3, 1)
        each = torch.distributions.Normal(mean, 0.02 + F.softplus(width)).log_prob(wanted)
        return -(share.log_softmax(1) + each).logsumexp(1).mean()

    draw = epochs(x, y, size=batch, seed=seed)
    return trained(Mixture(), of_output(loss), draw, arm, part=part_of(x, y), watch={"head": False}, **how)
