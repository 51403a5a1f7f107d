"""Ordinary trainings of agents: values and policies in small worlds; most of their losses have no floor."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import trained
from tests.benchmarks.detection.suites.held_out.shared import generator_of
from tests.benchmarks.detection.training import LogitChange

SIDE, MOVES = 5, torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])


def _moved(place: Tensor, action: Tensor) -> Tensor:
    return (place + MOVES[action]).clamp(0, SIDE - 1)


def _seen(place: Tensor, goal: Tensor) -> Tensor:
    """A board of two layers: where one is, where one wants to be."""
    at = [F.one_hot(item[:, 0] * SIDE + item[:, 1], SIDE * SIDE) for item in (place, goal)]
    return torch.stack(at, 1).reshape(-1, 2, SIDE, SIDE).float()


class Duel(nn.Module):
    """Convolution, then a value and advantages (Wang et al. 2016)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * SIDE * SIDE, width),
            nn.ReLU(),
        )
        self.value, self.advantage = nn.Linear(width, 1), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        gain = self.advantage(x)
        return self.value(x) + gain - gain.mean(1, keepdim=True)


def double_q(seed: int, arm: LogitChange, *, every: int = 250, **how: Any) -> CheckedTraining:
    """Double DQN (van Hasselt et al. 2016) with a buffer that it fills; the target is renewed in jumps."""
    torch.manual_seed(seed)
    model = Duel()
    target = copy.deepcopy(model).requires_grad_(False)
    state: dict[str, Any] = {
        "place": torch.zeros(8, 2).long(),
        "goal": torch.full((8, 2), SIDE - 1),
        "rows": [],
    }

    @torch.no_grad()
    def act(number: int, generator: torch.Generator) -> None:
        place, goal = state["place"], state["goal"]
        model.eval()
        best = model(_seen(place, goal)).argmax(1)
        model.train()
        odds = max(0.1, 1 - number / 2000)
        action = torch.where(
            torch.rand(8, generator=generator) < odds, torch.randint(0, 4, (8,), generator=generator), best
        )
        after = _moved(place, action)
        there = (after == goal).all(1)
        state["rows"].append((place, goal, action, after, there.float()))
        del state["rows"][:-300]
        new = torch.randint(0, SIDE, (2, 8, 2), generator=generator)
        state["place"] = torch.where(there[:, None], new[0], after)
        state["goal"] = torch.where(there[:, None], new[1], goal)

    def draw(step: int) -> Any:
        generator = generator_of(seed, step)
        act(step, generator)
        chosen = torch.randint(0, len(state["rows"]), (4,), generator=generator).tolist()
        place, goal, action, after, paid = (
            torch.cat(column) for column in zip(*(state["rows"][k] for k in chosen), strict=True)
        )
        with torch.no_grad():
            seen = _seen(after, goal)
            model.eval()
            best = model(seen).argmax(1, keepdim=True)
            model.train()
            worth = paid + 0.95 * (1 - paid) * target(seen).gather(1, best).squeeze(1)
        return [(_seen(place, goal), action, worth)]

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        seen, action, worth = batch
        return F.smooth_l1_loss(training.model(seen).gather(1, action[:, None]).squeeze(1), worth)

    def renew(training: Any, number: int) -> None:
        if number % every == 0:
            target.load_state_dict(model.state_dict())

    return trained(model, loss, draw, arm, after_update=renew, watch={"head": "advantage"}, **how)


class TwoCritics(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.critics = nn.ModuleList(
            nn.Sequential(
                nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([critic(x) for critic in self.critics], 1)


def twin_critics(seed: int, arm: LogitChange, *, share: float = 0.005, **how: Any) -> CheckedTraining:
    """The critics of TD3 (Fujimoto et al. 2018) on a cart; the actor learns beside them."""
    torch.manual_seed(seed)
    model = TwoCritics()
    actor = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1), nn.Tanh())
    later = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(actor).requires_grad_(False)
    of_actor = torch.optim.Adam(actor.parameters(), 1e-3)

    def draw(step: int) -> Any:
        generator = generator_of(seed, step)
        state = 2 * torch.rand(32, 2, generator=generator) - 1
        push = (actor(state).detach() + 0.3 * torch.randn(32, 1, generator=generator)).clamp(-1, 1)
        speed = (state[:, 1:] + 0.2 * push).clamp(-1, 1)
        after = torch.cat([(state[:, :1] + 0.2 * speed).clamp(-1, 1), speed], 1)
        with torch.no_grad():
            then = torch.cat([after, later[1](after)], 1)
            worth = 1 - after.abs().sum(1, keepdim=True) + 0.9 * later[0](then).min(1, keepdim=True).values
        return [(torch.cat([state, push], 1), worth, state)]

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        given, worth, _ = batch
        return (training.model(given) - worth).square().mean()

    def follow(training: Any, number: int) -> None:
        if number % 2 == 0:
            state = draw(number)[0][2]
            model.eval()
            (-model(torch.cat([state, actor(state)], 1))[:, 0].mean()).backward()
            model.train()
            of_actor.step()
            of_actor.zero_grad()
            training.optimizer.zero_grad()
        with torch.no_grad():
            for old, new in zip(later, (model, actor), strict=True):
                for its, mine in zip(old.parameters(), new.parameters(), strict=True):
                    its.lerp_(mine, share)

    return trained(model, loss, draw, arm, after_update=follow, watch={"head": False}, **how)


class Actor(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(2 * SIDE * SIDE, width), nn.ReLU())
        self.policy, self.value = nn.Linear(width, 4), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x)
        return self.policy(x), self.value(x).squeeze(1)


def actor_critic(
    seed: int, arm: LogitChange, *, walkers: int = 8, length: int = 5, **how: Any
) -> CheckedTraining:
    """A2C (Mnih et al. 2016): five moves of eight walkers, one update."""
    torch.manual_seed(seed)
    model = Actor()
    state: dict[str, Tensor] = {
        "place": torch.zeros(walkers, 2).long(), "goal": torch.full((walkers, 2), SIDE - 1)
    }  # fmt: skip

    @torch.no_grad()
    def draw(step: int) -> Any:
        generator, rows = generator_of(seed, step), []
        model.eval()
        for _ in range(length):
            place, goal = state["place"], state["goal"]
            seen = _seen(place, goal)
            action = torch.multinomial(model(seen)[0].softmax(-1), 1, generator=generator).squeeze(1)
            after = _moved(place, action)
            there = (after == goal).all(1)
            new = torch.randint(0, SIDE, (2, walkers, 2), generator=generator)
            state["place"] = torch.where(there[:, None], new[0], after)
            state["goal"] = torch.where(there[:, None], new[1], goal)
            rows.append((seen, action, there.float()))
        worth = model(_seen(state["place"], state["goal"]))[1]
        model.train()
        returns = []
        for _, _, paid in reversed(rows):
            worth = paid + 0.95 * (1 - paid) * worth
            returns.append(worth)
        seen, action = (torch.cat([row[k] for row in rows]) for k in range(2))
        return [(seen, action, torch.cat(returns[::-1]))]

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        seen, action, returns = batch
        logits, value = training.model(seen)
        odds = logits.log_softmax(-1)
        gain = (returns - value).detach()
        entropy = -(odds.exp() * odds).sum(-1).mean()
        own = odds.gather(1, action[:, None]).squeeze(1)
        return 0.5 * F.mse_loss(value, returns) - (own * gain).mean() - 0.01 * entropy

    return trained(model, loss, draw, arm, watch={"head": "policy"}, **how)


def judge(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """A reward model (Bradley and Terry 1952): which of two walks ends nearer; one answer in ten is wrong."""
    torch.manual_seed(seed)
    walks = torch.randint(0, 4, (1500, 2, 6))
    ends = MOVES[walks].sum(2).float()
    better = (ends - 2).norm(dim=-1).argmin(1)
    better = torch.where(torch.rand(1500) < 0.1, 1 - better, better)
    ordered = torch.where((better == 0)[:, None, None], walks, walks.flip(1))
    inner = nn.Sequential(nn.Embedding(4, 8), nn.Flatten(), nn.Linear(48, 32), nn.Mish(), nn.Linear(32, 1))

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        (pairs,) = given
        score = training.model(pairs.flatten(0, 1)).reshape(-1, 2)
        return -F.logsigmoid(score[:, 0] - score[:, 1]).mean()

    draw = epochs(ordered, size=batch, seed=seed)
    return trained(inner, loss, draw, arm, part=part_of(ordered), **how)
