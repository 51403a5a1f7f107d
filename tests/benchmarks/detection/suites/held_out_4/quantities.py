"""Ordinary regressions in units of their own, of laws of motion, of functions; and small agents."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import of_output, trained
from tests.benchmarks.detection.suites.held_out_4.networks import of_rows
from tests.benchmarks.detection.suites.held_out_4.shared import generator_of
from tests.benchmarks.detection.training import LogitChange

# --- regressions -----------------------------------------------------------------------------------------


def prices(
    seed: int, arm: LogitChange, *, unit: float = 1.0, batch: int = 32, low: bool = False, **how: Any
) -> CheckedTraining:
    """What flats cost, in thousands times ``unit``, from ten noisy numbers. ``low``: autocast in bfloat16."""
    torch.manual_seed(seed)
    x = torch.randn(900, 10)
    y = 200 + 40 * x[:, :1] + 25 * (x[:, 1:2] * x[:, 2:3]) + 30 * x[:, 3:4].clamp_min(0)
    y = unit * (y + 10 * torch.randn(900, 1))
    usual = y.mean()
    model = of_rows("smooth_celu", 10, 48, 1)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            z = training.arm(training.model(given[0]))
        return (usual + 50 * unit * z.float() - given[1]).square().mean()

    return trained(model, loss, epochs(x, y, size=batch, seed=seed), arm, part=part_of(x, y), **how)


def springs(seed: int, arm: LogitChange, *, batch: int = 48, **how: Any) -> CheckedTraining:
    """An energy whose derivatives are the motion of a pendulum (Greydanus et al. 2019)."""
    torch.manual_seed(seed)
    x = torch.randn(900, 2) * torch.tensor([1.2, 1.0])
    y = torch.stack([x[:, 1], -x[:, 0].sin()], 1) + 0.05 * torch.randn(900, 2)
    model = nn.Sequential(nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        rows, wanted = given
        with torch.enable_grad():
            rows = rows.detach().requires_grad_(True)
            energy = training.model(rows).sum()
            (slope,) = torch.autograd.grad(energy, rows, create_graph=True)
        return (torch.stack([slope[:, 1], -slope[:, 0]], 1) - wanted).square().mean()

    draw = epochs(x, y, size=batch, seed=seed)
    return trained(model, loss, draw, arm, part=part_of(x, y), watch={"head": False}, **how)


class Operator(nn.Module):
    """(Function at 16 places, place) → its integral up to there, as a product (Lu et al. 2021)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width))
        self.trunk = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        values, place = given
        return (self.branch(values) * self.trunk(place)).sum(1, keepdim=True) + self.shift


def operators(seed: int, arm: LogitChange, *, batch: int = 64, **how: Any) -> CheckedTraining:
    torch.manual_seed(seed)
    wave = torch.randn(1200, 3)
    speed = math.pi * torch.arange(1, 4)
    places = torch.linspace(0, 1, 16)
    values = torch.einsum("nk,kp->np", wave, (speed[:, None] * places).sin())
    place = torch.rand(1200, 1)
    y = (wave * (1 - (speed * place).cos()) / speed).sum(1, keepdim=True)
    plain = epochs(values, place, y, size=batch, seed=seed)

    def draw(step: int) -> Any:
        ((some, their, wanted),) = plain(step)
        return [((some, their), wanted)]

    part = (values[:256], place[:256]), y[:256]
    watch = {"head": False}
    return trained(Operator(), of_output(F.mse_loss), draw, arm, part=part, watch=watch, **how)


# --- agents ------------------------------------------------------------------------------------------------

LENGTH = 12
"""Places of a corridor; the right end pays, and so does the left end, less."""


def _walked(place: Tensor, action: Tensor, slip: Tensor) -> tuple[Tensor, Tensor]:
    """(Next place, pay); one step in ten goes the other way."""
    way = torch.where(slip < 0.1, 1 - action, action)
    after = (place + 2 * way - 1).clamp(0, LENGTH - 1)
    return after, (after == LENGTH - 1).float() + 0.2 * (after == 0).float()


def _agent(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(LENGTH, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, outputs)
    )


def soft_agent(
    seed: int, arm: LogitChange, *, batch: int = 32, heat: float = 0.1, share: float = 0.01, **how: Any
) -> CheckedTraining:
    """Soft Q-learning (Haarnoja et al. 2017) in the corridor, with a target that follows slowly."""
    torch.manual_seed(seed)
    model = _agent(2)
    slow = copy.deepcopy(model).requires_grad_(False)

    def draw(step: int) -> Any:
        generator = generator_of(seed, step)
        place = torch.randint(0, LENGTH, (batch,), generator=generator)
        action = torch.randint(0, 2, (batch,), generator=generator)
        after, paid = _walked(place, action, torch.rand(batch, generator=generator))
        with torch.no_grad():
            worth = heat * (slow(F.one_hot(after, LENGTH).float()) / heat).logsumexp(1)
        return [(F.one_hot(place, LENGTH).float(), action, paid + 0.9 * worth)]

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        seen, action, worth = given
        return F.mse_loss(training.model(seen).gather(1, action[:, None]).squeeze(1), worth)

    @torch.no_grad()
    def follow(training: Any, number: int) -> None:
        for its, mine in zip(slow.parameters(), model.parameters(), strict=True):
            its.lerp_(mine, share)

    return trained(model, loss, draw, arm, after_update=follow, watch={"head": False}, **how)


class Writer(nn.Module):
    """A GRU that writes eight signs, one after the other."""

    def __init__(self, signs: int = 5, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(signs + 1, width)
        self.layer, self.head = nn.GRU(width, width, batch_first=True), nn.Linear(width, signs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x))[0])


def groups(seed: int, arm: LogitChange, *, size: int = 8, passes: int = 4, **how: Any) -> CheckedTraining:
    """Words that are judged against others of their group (Shao et al. 2024): no sign twice in a row."""
    torch.manual_seed(seed)
    model = Writer()
    held: dict[str, Any] = {}

    @torch.no_grad()
    def write(step: int) -> None:
        model.eval()
        generator, words = generator_of(seed, step), torch.full((4 * size, 1), 5)
        for _ in range(8):
            odds = model(words)[:, -1].softmax(1)
            words = torch.cat([words, odds.multinomial(1, generator=generator)], 1)
        pay = (words[:, 2:] != words[:, 1:-1]).float().mean(1) + 0.5 * (words[:, 1:] == 3).float().mean(1)
        pay = pay.unflatten(0, (4, size))
        gain = ((pay - pay.mean(1, keepdim=True)) / (pay.std(1, keepdim=True) + 1e-4)).flatten()
        before = model(words[:, :-1]).log_softmax(-1).gather(2, words[:, 1:, None]).squeeze(2)
        model.train()
        held["rows"] = words, before, gain

    def draw(step: int) -> Any:
        if (step - 1) % passes == 0:
            write(step)
        return [held["rows"]]

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        words, before, gain = given
        odds = training.arm(training.model(words[:, :-1])).log_softmax(-1)
        own = odds.gather(2, words[:, 1:, None]).squeeze(2)
        ratio, gain = (own - before).exp(), gain[:, None]
        clipped = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
        return 0.02 * (odds.exp() * odds).sum(-1).mean() - clipped

    return trained(model, loss, draw, arm, watch={"head": "head"}, **how)
