"""Stable-Baselines3: the monitor is attached to the policy by hand."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.configuration import Configuration, Table
from tests.zoo.session import Session


def _environment(continuous: bool) -> Any:
    import gymnasium
    import numpy as np

    class Line(gymnasium.Env[Any, Any]):
        """Walk on a line towards zero; ten steps an episode."""

        observation_space = gymnasium.spaces.Box(-10, 10, (2,), np.float32)
        action_space = (
            gymnasium.spaces.Box(-1, 1, (1,), np.float32) if continuous else gymnasium.spaces.Discrete(3)
        )

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.at, self.time = 3.0, 0
            return np.array([self.at, 0], np.float32), {}

        def step(self, action: Any) -> Any:
            self.time += 1
            self.at += float(action[0]) if continuous else float(action) - 1
            return np.array([self.at, self.time / 10], np.float32), -abs(self.at), False, self.time >= 10, {}

    return Line()


def _train(
    kind: str,
    head: str | None = None,
    *,
    continuous: bool = False,
    steps: int = 64,
    attach: Any = None,
    **options: Any,
) -> Any:
    def train(session: Session) -> nn.Module:
        import stable_baselines3

        agent = getattr(stable_baselines3, kind)(
            "MlpPolicy",
            _environment(continuous),
            policy_kwargs={"net_arch": [16, 16]},
            seed=0,
            device="cpu",
            **options,
        )
        model, optimizer = attach(agent) if attach else (agent.policy, agent.policy.optimizer)
        session.attach(model, optimizer, **({} if head is None else {"head": head}))
        agent.learn(steps)
        policy: nn.Module = agent.policy
        return policy

    return train


def _make() -> list[Configuration]:
    ppo = {"n_steps": 16, "batch_size": 8, "n_epochs": 1}
    policy: dict[str, Any] = {
        "soft": True,
        "scaled": True,
        "shift_invariant": True,
        "loss": False,  # it is computed and trained inside of learn()
        "true_notes": ("no_loss", "loss_between_readings"),
    }
    values: dict[str, Any] = {**policy, "classes": False, "loss": True}
    late = {"learning_starts": 16, "batch_size": 8}
    return [
        Configuration(
            "PPO", _train("PPO", **ppo), ("action_net", "action_net, value_net"), steps=8, **policy
        ),
        Configuration(
            "PPO, action_net named", _train("PPO", "action_net", **ppo), "action_net", steps=8, **policy
        ),
        Configuration(
            "A2C, action_net named", _train("A2C", "action_net", n_steps=8), "action_net", steps=8, **policy
        ),
        Configuration(
            "DQN (Q network)",
            _train("DQN", attach=lambda a: (a.q_net, a.policy.optimizer), **late),
            "q_net.4",
            steps=12,
            **values,
        ),
        Configuration(
            "SAC (critic)",
            _train("SAC", steps=24, continuous=True, attach=lambda a: (a.critic, a.critic.optimizer), **late),
            ("qf1.4", "qf0.4", None),
            steps=8,
            **values,
        ),
    ]


TABLE = Table("stable-baselines3", ("stable-baselines3",), _make)
