"""Ordinary trainings of generative models: variational autoencoder, flow, diffusion, a critic."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, clipped, epochs, part_of
from tests.benchmarks.detection.training import LogitChange


class Variational(nn.Module):
    def __init__(self, latent: int = 4, width: int = 64) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, width), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(width, latent), nn.Linear(width, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.inner(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), mean, log_variance


def evidence(beta: float) -> Any:
    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        (x,) = batch
        shown, mean, log_variance = training.model(x)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
        return F.binary_cross_entropy_with_logits(shown, x, reduction="sum") / len(x) + beta * divergence

    return loss


def variational(
    seed: int, arm: LogitChange, *, beta: float = 1.0, lr: float = 1e-3, decay: float = 0.01
) -> CheckedTraining:
    torch.manual_seed(seed)
    x, _ = data.digits(1500, seed=seed)
    model = Variational()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    return CheckedTraining(
        model, optimizer, evidence(beta), epochs(x, size=32, seed=seed), None, arm, part=part_of(x),
        watch={"head": "decoder.2"},
    )  # fmt: skip


class Coupling(nn.Module):
    """A RealNVP of four coupling layers on two numbers; returns −log p."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, 2)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[:, :1], x[:, 1:]
        volume = torch.zeros(len(x))
        for net in self.nets:
            scale, shift = net(left).chunk(2, 1)
            scale = scale.tanh()
            left, right = right * scale.exp() + shift, left
            volume = volume + scale.squeeze(1)
        return 0.5 * (left.square() + right.square()).squeeze(1) + math.log(2 * math.pi) - volume


def density(training: Any, batch: Any, monitor: Any) -> Tensor:
    return training.model(batch[0]).mean()  # type: ignore[no-any-return]


def flow(seed: int, arm: LogitChange, *, narrow: float = 0.05, decay: float = 0.01) -> CheckedTraining:
    """The density of eight narrow points on a circle: its logarithm is above zero, the loss below."""
    torch.manual_seed(seed)
    angle = torch.randint(0, 8, (1500,)) * math.pi / 4
    x = torch.stack([angle.cos(), angle.sin()], 1) * 0.3 + narrow * torch.randn(1500, 2)
    model = Coupling()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=decay)
    return CheckedTraining(
        model, optimizer, density, epochs(x, size=64, seed=seed), None, arm, part=part_of(x),
        before_update=clipped(1.0), watch={"head": "nets.3.2"},
    )  # fmt: skip


class Denoiser(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.time = nn.Linear(1, width)
        self.first = nn.Linear(64, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 64)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = F.silu(self.first(x) + self.time(time))
        return self.last(hidden + F.silu(self.second(hidden)))


def diffusion(seed: int, arm: LogitChange, *, lr: float = 1e-3, decay: float = 0.01) -> CheckedTraining:
    """The noise in a digit is predicted (Ho et al. 2020)."""
    torch.manual_seed(seed)
    x, _ = data.digits(1500, seed=seed)
    plain = epochs(2 * x - 1, size=64, seed=seed)

    def noisy(clean: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(7_919 * (seed + 1) + number)
        time = torch.rand(len(clean), 1, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        share = (time * math.pi / 2).cos()
        return share * clean + (1 - share.square()).sqrt() * noise, time, noise

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        given, time, noise = batch
        return F.mse_loss(training.model(given, time), noise)

    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    return CheckedTraining(
        model, optimizer, loss, lambda step: [noisy(plain(step)[0][0], step)], None, arm,
        part=noisy(2 * x[:256] - 1, 0), watch={"head": "last"},
    )  # fmt: skip


def critic(seed: int, arm: LogitChange, *, penalty: float = 1.0) -> CheckedTraining:
    """A Wasserstein critic with gradient penalty on digits; the generator learns every fifth step."""
    torch.manual_seed(seed)
    x, _ = data.digits(1500, seed=seed)
    made = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
    model = nn.Sequential(
        nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, (0.0, 0.9))
    other = torch.optim.Adam(made.parameters(), 1e-3, (0.0, 0.9))
    plain = epochs(x, size=32, seed=seed)

    def draw(number: int) -> Any:
        generator = torch.Generator().manual_seed(7_919 * (seed + 1) + number)
        noise = torch.randn(32, 8, generator=generator)
        return [(plain(number)[0][0], noise, torch.rand(32, 1, generator=generator))]

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        real, noise, share = batch
        fake = made(noise).detach()
        between = (share * real + (1 - share) * fake).requires_grad_()
        slope = torch.autograd.grad(training.model(between).sum(), between, create_graph=True)[0]
        steep = (slope.norm(dim=1) - 1).square().mean()
        return training.model(fake).mean() - training.model(real).mean() + penalty * steep

    def generator_step(training: Any, number: int) -> None:
        if number % 5 == 0:
            (-training.model(made(draw(number)[0][1])).mean()).backward()
            other.step()
            other.zero_grad()
            training.optimizer.zero_grad()

    return CheckedTraining(model, optimizer, loss, draw, None, arm, after_update=generator_step)
