"""Ordinary trainings of unusual networks of digits: spikes, equilibria, capsules, attacks, hints, domains."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import of_output, trained
from tests.benchmarks.detection.training import LogitChange


def _digits(seed: int, rows: int = 1500) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return data.digits(rows, seed=seed)


class Spike(torch.autograd.Function):
    """1 above the threshold, else 0; its gradient is that of a smooth step (Neftci et al. 2019)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad / (1 + 5 * x.abs()).square()


class Spiking(nn.Module):
    """Neurons that fill, leak and fire, eight ticks; the outputs' mean is what counts."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        given = self.inner(x)
        filled, fired = torch.zeros_like(given), torch.zeros_like(given)
        count = torch.zeros_like(given)
        for _ in range(8):
            filled = 0.8 * filled * (1 - fired) + given
            fired = Spike.apply(filled - 1)
            count = count + fired
        return self.out(count / 8)


class Settled(nn.Module):
    """One layer that is applied until little changes: twelve times (Bai et al. 2019)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.given, self.again = nn.Linear(64, width), nn.Linear(width, width, bias=False)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 10)
        nn.init.normal_(self.again.weight, std=0.3 * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        given = self.given(x)
        state = torch.zeros_like(given)
        for _ in range(12):
            state = 0.5 * state + 0.5 * (given + self.again(state)).tanh()
        return self.out(self.norm(state))


class Capsules(nn.Module):
    """Vectors vote for vectors of classes, whose lengths are the answer (Sabour et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.votes = nn.Parameter(0.1 * torch.randn(64, 10, 4, 6))

    @staticmethod
    def _squashed(x: Tensor) -> Tensor:
        size = x.square().sum(-1, keepdim=True)
        return x * size.add(1e-8).sqrt() / (1 + size)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts(x.unflatten(1, (1, 8, 8))).flatten(2).unflatten(1, (4, 4))
        parts = self._squashed(parts.permute(0, 1, 3, 2).flatten(1, 2))
        votes = torch.einsum("npi,pcio->npco", parts, self.votes)
        odds = torch.zeros(votes.shape[:3])
        for _ in range(2):
            found = self._squashed((odds.softmax(2)[..., None] * votes).sum(1))
            odds = odds + (votes.detach() * found[:, None].detach()).sum(-1)
        return found.square().sum(-1).add(1e-8).sqrt()


def lengths(z: Tensor, y: Tensor) -> Tensor:
    """The right class's length should be .9 or more, the others' .1 or less."""
    own = F.one_hot(y, z.shape[1])
    wrong = own * F.relu(0.9 - z).square() + 0.5 * (1 - own) * F.relu(z - 0.1).square()
    return wrong.sum(1).mean()


NETS: dict[str, tuple[type[nn.Module], Any]] = {
    "spiking": (Spiking, F.cross_entropy), "settled": (Settled, F.cross_entropy),
    "capsules": (Capsules, lengths),
}  # fmt: skip
"""Name → (network, its loss)."""


def recognised(seed: int, arm: LogitChange, *, net: str, batch: int = 32, **how: Any) -> CheckedTraining:
    x, y = _digits(seed)
    network, loss = NETS[net]
    draw = epochs(x, y, size=batch, seed=seed)
    watch = {"head": False} if net == "capsules" else {}
    return trained(network(), of_output(loss), draw, arm, part=part_of(x, y), watch=watch, **how)


def attacked(
    seed: int, arm: LogitChange, *, batch: int = 32, far: float = 0.1, **how: Any
) -> CheckedTraining:
    """Pixels are moved by up to .1 in the direction that hurts most (Goodfellow et al. 2015)."""
    x, y = _digits(seed)
    model = nn.Sequential(nn.Linear(64, 96), nn.CELU(), nn.Linear(96, 64), nn.CELU(), nn.Linear(64, 10))
    plain = epochs(x, y, size=batch, seed=seed)

    def draw(step: int) -> Any:
        ((rows, target),) = plain(step)
        asked = rows.clone().requires_grad_()
        # Not through ``model``, so that nothing but the step itself is watched.
        copy = torch.func.functional_call(twin, dict(model.named_parameters()), (asked,))
        (uphill,) = torch.autograd.grad(F.cross_entropy(copy, target), asked)
        return [((rows + far * uphill.sign()).clamp(0, 1), target)]

    twin = nn.Sequential(nn.Linear(64, 96), nn.CELU(), nn.Linear(96, 64), nn.CELU(), nn.Linear(64, 10))
    loss = of_output(F.cross_entropy)
    return trained(model, loss, draw, arm, part=part_of(x, y), **how)


def hinted(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """A thin network learns what a broad one's middle layer says (Romero et al. 2015); squared error."""
    x, y = _digits(seed)
    broad = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    step = torch.optim.AdamW(broad.parameters(), lr=3e-3)
    for _ in range(150):
        F.cross_entropy(broad(x), y).backward()
        step.step()
        step.zero_grad()
    with torch.no_grad():
        hint = broad[:2](x)
    model = nn.Sequential(
        nn.Linear(64, 16), nn.Hardswish(), nn.Linear(16, 16), nn.Hardswish(), nn.Linear(16, 128)
    )
    draw = epochs(x, hint, size=batch, seed=seed)
    return trained(model, of_output(F.mse_loss), draw, arm, part=part_of(x, hint), **how)


class Reversed(torch.autograd.Function):
    """A tenth of the gradient, its sign turned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -0.1 * grad


class TwoDomains(nn.Module):
    """A trunk whose features should tell the class and hide the domain (Ganin et al. 2016)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.label, self.domain = nn.Linear(width, 10), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x)
        return self.label(x), self.domain(Reversed.apply(x))


def domains(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """Digits, and noisy digits that have no labels; the two heads pull apart."""
    x, y = _digits(seed)
    known, others = x[:800], (x[800:1500] + 0.3 * torch.randn(700, 64)).clamp(0, 1)
    one, two = epochs(known, y[:800], size=batch, seed=seed), epochs(others, size=batch, seed=seed + 1)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        rows, target, theirs = given
        z, domain = training.model(torch.cat([rows, theirs]))
        whose = torch.arange(len(domain)).ge(len(rows)).long()
        return F.cross_entropy(training.arm(z[: len(rows)]), target) + F.cross_entropy(domain, whose)

    draw = lambda step: [(*one(step)[0], *two(step)[0])]  # noqa: E731
    part = (known[:256], y[:256], others[:256])
    return trained(TwoDomains(), loss, draw, arm, part=part, watch={"head": "label"}, **how)
