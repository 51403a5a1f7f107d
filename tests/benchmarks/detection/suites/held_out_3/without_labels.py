"""Ordinary trainings without labels, or with a reward: bandits, energies, choices, larger pictures, sound."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import Draw, of_output, trained
from tests.benchmarks.detection.suites.held_out_3.shared import generator_of
from tests.benchmarks.detection.training import LogitChange


def bandit(seed: int, arm: LogitChange, *, batch: int = 64, **how: Any) -> CheckedTraining:
    """One of eight arms for each visitor; the policy's gradient with a mean reward as baseline, and entropy.

    The loss has no floor: it is near 0 when arms are as good as expected.
    """
    torch.manual_seed(seed)
    taste = torch.randn(6, 8)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    held = {"usual": torch.zeros(())}

    def draw(step: int) -> Any:
        return [(torch.randn(batch, 6, generator=generator_of(seed, step)), step)]

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        x, step = given
        odds = training.arm(training.model(x)).log_softmax(1)
        generator = generator_of(seed + 1, step)
        action = odds.detach().exp().multinomial(1, generator=generator)
        pay = (x @ taste).gather(1, action) + 0.5 * torch.randn(len(x), 1, generator=generator)
        gain = pay - held["usual"]
        held["usual"] = held["usual"].lerp(pay.mean(), 0.01)
        entropy = -(odds.exp() * odds).sum(1).mean()
        return -(odds.gather(1, action) * gain).mean() - 0.02 * entropy

    return trained(model, loss, draw, arm, **how)


def expectiles(seed: int, arm: LogitChange, *, batch: int = 64, **how: Any) -> CheckedTraining:
    """The value of the better actions in recorded walks, by an expectile (Kostrikov et al. 2022)."""
    torch.manual_seed(seed)
    state, action = torch.randn(3000, 4), torch.randn(3000, 2)
    worth = -(action - state[:, :2].tanh()).square().sum(1, keepdim=True) + state[:, 2:3].sin()
    worth = worth + 0.2 * torch.randn(3000, 1)
    model = nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 1))

    def function(z: Tensor, y: Tensor) -> Tensor:
        missing = y - z
        return (torch.where(missing > 0, 0.8, 0.2) * missing.square()).mean()

    draw = epochs(state, worth, size=batch, seed=seed)
    return trained(model, of_output(function), draw, arm, part=part_of(state, worth), **how)


def energy(seed: int, arm: LogitChange, *, batch: int = 64, ticks: int = 8, **how: Any) -> CheckedTraining:
    """Real points should have less energy than points that slid down from noise (Du and Mordatch 2019)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1))
    slide = nn.Sequential(nn.Linear(2, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1))

    def draw(step: int) -> Any:
        generator = generator_of(seed, step)
        angle = 2 * math.pi * torch.rand(batch, generator=generator)
        real = torch.stack([angle.cos(), (2 * angle).sin()], 1)
        real = real + 0.05 * torch.randn(real.shape, generator=generator)
        made = 4 * torch.rand(batch, 2, generator=generator) - 2
        weights = {name: value.detach() for name, value in model.named_parameters()}
        for _ in range(ticks):
            made.requires_grad_()
            height = torch.func.functional_call(slide, weights, (made,)).sum()
            (uphill,) = torch.autograd.grad(height, made)
            made = made.detach() - 0.1 * uphill + 0.05 * torch.randn(made.shape, generator=generator)
        return [(real, made.clamp(-3, 3))]

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        real, made = given
        low, high = training.model(torch.cat([real, made])).split([len(real), len(made)])
        return low.mean() - high.mean() + 0.1 * (low.square().mean() + high.square().mean())

    return trained(model, loss, draw, arm, **how)


class Chosen(nn.Module):
    """A picture through eight choices of one in six, made softer or harder by ``heat`` (Jang et al. 2017)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 48))
        self.outer = nn.Sequential(nn.Linear(48, width), nn.ReLU(), nn.Linear(width, 64))
        self.heat = 1.0

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x).unflatten(1, (8, 6))
        if self.training:
            z = F.gumbel_softmax(z, self.heat, dim=-1)
        else:
            z = F.one_hot(z.argmax(-1), 6).to(x.dtype)
        return self.outer(z.flatten(1))


def choices(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    torch.manual_seed(seed)
    x = (data.digits(1500, seed=seed)[0] > 0.4).float()
    plain = epochs(x, size=batch, seed=seed)

    def cool(training: Any, number: int) -> None:
        training.model.heat = max(1.0 * 0.9997**number, 0.4)

    draw: Draw = lambda step: [(plain(step)[0][0],) * 2]  # noqa: E731
    loss = of_output(F.binary_cross_entropy_with_logits)
    part = (x[:256], x[:256])
    return trained(Chosen(), loss, draw, arm, part=part, after_update=cool, watch={"head": False}, **how)


# --- pictures and sound ------------------------------------------------------------------------------------


@cache
def photograph() -> Tensor:
    """scikit-learn's picture of a flower, grey, [H, W] from 0 to 1."""
    from sklearn.datasets import load_sample_image

    return torch.tensor(load_sample_image("flower.jpg")).float().mean(-1) / 255


class Enlarged(nn.Module):
    """Twice as high and wide: four channels become four pixels (Shi et al. 2016), added to the plain way."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.PReLU(), nn.Conv2d(width, width, 3, padding=1), nn.PReLU(),
            nn.Conv2d(width, 4, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + F.interpolate(x, scale_factor=2.0, mode="bilinear")


def enlarging(seed: int, arm: LogitChange, *, batch: int = 8, **how: Any) -> CheckedTraining:
    """Pieces of a photograph, from half their size; the mean absolute error, smoothed at 0."""
    torch.manual_seed(seed)
    whole = photograph()
    places = torch.stack([torch.randint(0, size - 16, (600,)) for size in whole.shape], 1).tolist()
    y = torch.stack([whole[a : a + 16, b : b + 16] for a, b in places])[:, None]
    x = F.avg_pool2d(y, 2)
    loss = of_output(lambda z, wanted: ((z - wanted).square() + 1e-6).sqrt().mean())
    draw = epochs(x, y, size=batch, seed=seed)
    return trained(Enlarged(), loss, draw, arm, part=part_of(x, y, rows=64), watch={"head": False}, **how)


class Cleaner(nn.Module):
    """Frames of sound, a mask for each (Luo and Mesgarani 2019), and sound again."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.frames = nn.Conv1d(1, width, 8, stride=4, bias=False)
        self.mask = nn.Sequential(
            nn.Conv1d(width, width, 3, padding=1), nn.PReLU(), nn.GroupNorm(1, width),
            nn.Conv1d(width, width, 3, padding=2, dilation=2), nn.PReLU(), nn.Conv1d(width, width, 1),
        )  # fmt: skip
        self.back = nn.ConvTranspose1d(width, 1, 8, stride=4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.frames(x[:, None])
        return self.back(F.relu(frames) * self.mask(frames).sigmoid()).squeeze(1)


def decibels(z: Tensor, y: Tensor) -> Tensor:
    """The scale-invariant ratio of noise to sound in decibels: below 0 when it is clean."""
    along = (z * y).sum(-1, keepdim=True) / y.square().sum(-1, keepdim=True) * y
    ratio = (z - along).square().sum(-1) / along.square().sum(-1).add(1e-6)
    return 10 * (ratio + 1e-6).log10().mean()


def cleaning(seed: int, arm: LogitChange, *, batch: int = 16, **how: Any) -> CheckedTraining:
    """Two notes and their overtones, in noise."""
    torch.manual_seed(seed)
    time = torch.arange(128) / 128 * 2 * math.pi
    speed = torch.randint(2, 12, (800, 2, 1)) * torch.tensor([1.0, 2.0])
    phase = 2 * math.pi * torch.rand(800, 2, 2, 1)
    y = ((speed[..., None] * time + phase).sin() * torch.tensor([1.0, 0.5])[:, None]).sum((1, 2))
    x = y + 0.7 * torch.randn(800, 128)
    draw = epochs(x, y, size=batch, seed=seed)
    part = part_of(x, y, rows=64)
    return trained(Cleaner(), of_output(decibels), draw, arm, part=part, watch={"head": False}, **how)


class Together(nn.Module):
    """A vector and a number for each byte, as what comes first and as what comes near."""

    def __init__(self, count: int = 96, width: int = 12) -> None:
        super().__init__()
        self.first, self.near = (nn.Embedding(count, width) for _ in range(2))
        self.shift, self.other = (nn.Embedding(count, 1) for _ in range(2))
        for table in (self.first, self.near):
            nn.init.normal_(table.weight, std=0.2)

    def forward(self, pairs: Tensor) -> Tensor:
        a, b = pairs.unbind(1)
        return (self.first(a) * self.near(b)).sum(1) + (self.shift(a) + self.other(b)).squeeze(1)


def beside(seed: int, arm: LogitChange, *, batch: int = 128, **how: Any) -> CheckedTraining:
    """How often bytes of the manual stand near each other, by weighted squares (Pennington et al. 2014)."""
    torch.manual_seed(seed)
    text = (data.text()[:60_000] - 32).clamp(0, 95)
    counts = torch.zeros(96, 96)
    for far in range(1, 4):
        counts.index_put_((text[:-far], text[far:]), torch.tensor(1.0 / far), accumulate=True)
    pairs = counts.nonzero()
    pairs = pairs[torch.randperm(len(pairs))]
    number = counts[pairs[:, 0], pairs[:, 1]]
    weight = (number / 50).pow(0.75).clamp_max(1)
    loss = of_output(lambda z, y, w: (w * (z - y).square()).mean())
    columns = pairs, number.log(), weight
    draw = epochs(*columns, size=batch, seed=seed)
    return trained(Together(), loss, draw, arm, part=part_of(*columns), watch={"head": False}, **how)
