"""Ordinary trainings of agents on a pole, a chain and a drift; most of their losses have no floor."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import of_output, trained
from tests.benchmarks.detection.suites.held_out_2.shared import generator_of
from tests.benchmarks.detection.training import LogitChange


def _pushed(state: Tensor, force: Tensor) -> Tensor:
    """One tick of a pole that is to be held upright: (angle, speed)."""
    angle, speed = state.unbind(-1)
    speed = 0.98 * speed + 0.1 * angle.sin() + 0.15 * force
    return torch.stack([(angle + 0.2 * speed).clamp(-1.5, 1.5), speed.clamp(-2, 2)], -1)


def _worth(state: Tensor) -> Tensor:
    return 1 - state[..., 0].abs() - 0.1 * state[..., 1].abs()


def shares(seed: int, arm: LogitChange, *, every: int = 100, **how: Any) -> CheckedTraining:
    """A distribution of values in 21 shares, moved by the Bellman equation (Bellemare et al. 2017)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3 * 21))
    target = copy.deepcopy(model).requires_grad_(False)
    places = torch.linspace(-10, 10, 21)

    def draw(step: int) -> Any:
        generator = generator_of(seed, step)
        state = torch.randn(48, 2, generator=generator)
        action = torch.randint(0, 3, (48,), generator=generator)
        after = _pushed(state, action - 1.0)
        with torch.no_grad():
            odds = target(after).unflatten(1, (3, 21)).softmax(-1)
            best = (odds * places).sum(-1).argmax(1)
            odds = odds[torch.arange(48), best]
            moved = (_worth(after)[:, None] + 0.9 * places).clamp(-10, 10)
            near = F.relu(1 - (moved[:, :, None] - places).abs())  # the places are 1 apart
            wanted = (odds[:, :, None] * near).sum(1)
        return [(state, action, wanted)]

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        state, action, wanted = given
        z = training.model(state).unflatten(1, (3, 21))[torch.arange(len(action)), action]
        return F.cross_entropy(z, wanted)

    def renew(training: Any, number: int) -> None:
        if number % every == 0:
            target.load_state_dict(model.state_dict())

    return trained(model, loss, draw, arm, after_update=renew, watch={"head": False}, **how)


class Pusher(nn.Module):
    """A Gaussian policy and a value, on one trunk."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.mean, self.value = nn.Linear(width, 1), nn.Linear(width, 1)
        self.log_spread = nn.Parameter(torch.zeros(1))

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(state)
        return self.mean(x).squeeze(-1), self.value(x).squeeze(-1)

    def odds(self, state: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
        mean, value = self(state)
        return torch.distributions.Normal(mean, self.log_spread.exp()).log_prob(push), value


def balancing(
    seed: int, arm: LogitChange, *, walkers: int = 16, length: int = 16, passes: int = 8, **how: Any
) -> CheckedTraining:
    """PPO (Schulman et al. 2017) with a Gaussian policy: eight passes of minibatches over each walk."""
    torch.manual_seed(seed)
    model = Pusher()
    held: dict[str, Any] = {"state": 0.3 * torch.randn(walkers, 2)}

    @torch.no_grad()
    def walk(step: int) -> None:
        generator, rows, state = generator_of(seed, step), [], held["state"]
        model.eval()
        for _ in range(length):
            mean, value = model(state)
            push = mean + model.log_spread.exp() * torch.randn(walkers, generator=generator)
            after = _pushed(state, push.clamp(-1, 1))
            rows.append((state, push, model.odds(state, push)[0], value, _worth(after)))
            lost = after[:, 0].abs() > 1.4
            state = torch.where(lost[:, None], 0.3 * torch.randn(walkers, 2, generator=generator), after)
        worth = model(state)[1]
        model.train()
        returns = []
        for *_, paid in reversed(rows):
            worth = paid + 0.95 * worth
            returns.append(worth)
        columns = [torch.cat(column) for column in zip(*rows, strict=True)]
        gain = torch.cat(returns[::-1]) - columns[3]
        held.update(state=state, rows=(*columns[:3], (gain - gain.mean()) / (gain.std() + 1e-6),
                                       torch.cat(returns[::-1])))  # fmt: skip

    def draw(step: int) -> Any:
        if (step - 1) % passes == 0:
            walk(step)
        chosen = torch.randperm(walkers * length, generator=generator_of(seed + 1, step))[:64]
        return [tuple(column[chosen] for column in held["rows"])]

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        state, push, before, gain, returns = given
        odds, value = training.model.odds(state, push)
        ratio = (odds - before).exp()
        clipped = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
        return 0.5 * F.mse_loss(value, returns) - clipped - 0.001 * training.model.log_spread.sum()

    return trained(model, loss, draw, arm, watch={"head": "mean"}, **how)


def imitating(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """What a hand-written rule does, from noisy demonstrations: one of three pushes."""
    torch.manual_seed(seed)
    state = torch.randn(2000, 2)
    wanted = -2 * state[:, 0] - state[:, 1] + 0.3 * torch.randn(2000)
    y = torch.bucketize(wanted, torch.tensor([-0.5, 0.5]))
    x = torch.cat([state, state[:, :1].sin(), state[:, :1] * state[:, 1:]], 1)
    model = nn.Sequential(nn.Linear(4, 64), nn.LayerNorm(64), nn.CELU(), nn.Linear(64, 64), nn.CELU(),
                          nn.Linear(64, 3))  # fmt: skip
    draw, loss = epochs(x, y, size=batch, seed=seed), of_output(F.cross_entropy)
    return trained(model, loss, draw, arm, part=part_of(x, y), **how)


class Dreaming(nn.Module):
    """A model of the world: the next state, five ticks on end, as changes of the state."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(3, width), nn.Softplus(), nn.Linear(width, width), nn.Softplus(), nn.Linear(width, 2)
        )

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        state, pushes = given
        states = []
        for push in pushes.T:
            state = state + self.inner(torch.cat([state, push[:, None]], 1))
            states.append(state)
        return torch.stack(states, 1)


def dreaming(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """Five ticks ahead, each prediction fed back."""
    torch.manual_seed(seed)
    state, pushes = torch.randn(1500, 2), 2 * torch.rand(1500, 5) - 1
    after, states = state, []
    for push in pushes.T:
        after = _pushed(after, push)
        states.append(after)
    target = torch.stack(states, 1) + 0.02 * torch.randn(1500, 5, 2)
    plain = epochs(state, pushes, target, size=batch, seed=seed)

    def draw(step: int) -> Any:
        ((rows, their, wanted),) = plain(step)
        return [((rows, their), wanted)]

    part = ((state[:256], pushes[:256]), target[:256])
    return trained(Dreaming(), of_output(F.mse_loss), draw, arm, part=part, watch={"head": False}, **how)
