"""Ordinary trainings of policies on a walk in a corridor; the loss has no floor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites.checked import CheckedTraining, clipped
from tests.benchmarks.detection.training import LogitChange

PLACES, WALKERS, LENGTH = 9, 16, 12


class ActorCritic(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(PLACES + 1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.policy = nn.Linear(width, 3)
        self.value = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x)
        return self.policy(x), self.value(x).squeeze(-1)


class Corridor:
    """Walkers go left, stay or go right, slip one time in ten, and are paid at the far end."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def walk(self, model: ActorCritic) -> dict[str, Tensor]:
        place = torch.randint(0, PLACES, (WALKERS,), generator=self.generator)
        goal = torch.randint(0, 2, (WALKERS,), generator=self.generator)
        seen, did, odds, paid, worth = [], [], [], [], []
        for _ in range(LENGTH):
            state = torch.cat([F.one_hot(place, PLACES), goal[:, None]], 1).float()
            with torch.no_grad():
                logits, value = model(state)
            chances = logits.softmax(-1)
            action = torch.multinomial(chances, 1, generator=self.generator).squeeze(1)
            slip = torch.rand(WALKERS, generator=self.generator) < 0.1
            place = (place + torch.where(slip, 0, action - 1)).clamp(0, PLACES - 1)
            seen.append(state)
            did.append(action)
            odds.append(chances.gather(1, action[:, None]).squeeze(1).log())
            paid.append((place == goal * (PLACES - 1)).float() - 0.01)
            worth.append(value)
        returns, total = [], torch.zeros(WALKERS)
        for reward in reversed(paid):
            total = reward + 0.95 * total
            returns.append(total)
        rewards = torch.stack(returns[::-1]).flatten()
        values = torch.stack(worth).flatten()
        gain = rewards - values
        return {
            "state": torch.cat(seen), "action": torch.cat(did), "odds": torch.cat(odds), "return": rewards,
            "gain": (gain - gain.mean()) / (gain.std() + 1e-8),
        }  # fmt: skip


def ppo_loss(training: Any, batch: Any, monitor: Any) -> Tensor:
    """Clipped surrogate + value − entropy."""
    logits, value = training.model(batch["state"])
    odds = logits.log_softmax(-1)
    own = odds.gather(1, batch["action"][:, None]).squeeze(1)
    ratio = (own - batch["odds"]).exp()
    gain = batch["gain"]
    surrogate = torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
    entropy = -(odds.exp() * odds).sum(-1).mean()
    return 0.5 * F.mse_loss(value, batch["return"]) - surrogate - 0.01 * entropy


def policy_gradient(training: Any, batch: Any, monitor: Any) -> Tensor:
    """REINFORCE with a learned baseline."""
    logits, value = training.model(batch["state"])
    own = logits.log_softmax(-1).gather(1, batch["action"][:, None]).squeeze(1)
    return 0.5 * F.mse_loss(value, batch["return"]) - (own * batch["gain"]).mean()


def policy(
    seed: int, arm: LogitChange, *, epochs: int = 4, decay: float = 0.01, lr: float = 1e-3
) -> CheckedTraining:
    """PPO with ``epochs`` steps on each walk; one step each is REINFORCE."""
    torch.manual_seed(seed)
    model = ActorCritic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    world = Corridor(seed)
    held: dict[str, Any] = {}

    def draw(step: int) -> Any:
        if (step - 1) % epochs == 0:
            model.eval()  # acting is no training: a monitor has no rows to see in it
            held["walk"] = world.walk(model)
            model.train()
        return [held["walk"]]

    return CheckedTraining(
        model,
        optimizer,
        ppo_loss if epochs > 1 else policy_gradient,
        draw,
        None,
        arm,
        before_update=clipped(0.5),
        watch={"head": "policy"},
    )


def temporal_difference(
    seed: int, arm: LogitChange, *, decay: float = 0.01, lr: float = 1e-3, every: int = 100
) -> CheckedTraining:
    """Q-learning from a buffer of walks, with a target network renewed every so many steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(PLACES, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    target = nn.Sequential(nn.Linear(PLACES, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    target.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)

    def draw(step: int) -> Any:
        generator = torch.Generator().manual_seed(7_919 * (seed + 1) + step)
        place = torch.randint(0, PLACES, (32,), generator=generator)
        action = torch.randint(0, 3, (32,), generator=generator)
        after = (place + action - 1).clamp(0, PLACES - 1)
        state, following = (F.one_hot(item, PLACES).float() for item in (place, after))
        with torch.no_grad():
            worth = (after == PLACES - 1).float() + 0.9 * target(following).max(1).values
        return [(state, action, worth)]

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        state, action, worth = batch
        return F.smooth_l1_loss(training.model(state).gather(1, action[:, None]).squeeze(1), worth)

    def renew(training: Any, number: int) -> None:
        if number % every == 0:
            target.load_state_dict(training.model.state_dict())

    return CheckedTraining(model, optimizer, loss, draw, None, arm, after_update=renew)
