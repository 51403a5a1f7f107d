"""A training whose replay has to be exact: everything in it moves from step to step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import (
    Autopilot,
    Monitor,
    Snapshot,
)  # fmt: skip
from nfi_monitor.replay.run import (
    replay,
)
from tests.runs import batch, snapshot


class Run:
    """An MLP with dropout and batch norm, a schedule, and minibatches drawn from the random state.

    The loss it reports can be scripted: a replay needs a slingshot, and the arithmetic is real either way.
    """

    def __init__(self, spike_at: int | None = None, beta2: float = 0.9) -> None:
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        self.model = nn.Sequential(
            nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 7)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, betas=(0.9, beta2))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 300)
        self.inputs, self.targets = batch(rows=64)
        self.spike_at = spike_at
        self.losses: dict[int, float] = {}
        self.done = 0
        self.monitor: Monitor | None = None
        self.pilot: Autopilot | None = None

    def step(self, step: int) -> Tensor:
        rows = torch.randperm(64)[:16]
        self.optimizer.zero_grad()
        loss = (F.cross_entropy if self.pilot is None else self.pilot.loss)(
            self.model(self.inputs[rows]) + 0.1 * float(np.random.rand()), self.targets[rows]
        )
        said = loss.detach()
        if self.spike_at is not None:
            said = torch.tensor(1e-3 if step < self.spike_at else 5.0)
        if self.monitor is not None:
            self.monitor.observe_loss(said)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return said

    def go(self, to: int) -> None:
        while self.done < to:
            self.done += 1
            self.losses[self.done] = self.step(self.done).item()

    def take(self) -> Snapshot:
        return Snapshot.take(self.done, self.model, self.optimizer, [self.scheduler])

    def replay(self, taken: Snapshot, arms: Any = None, steps: int | None = None, **options: Any) -> Any:
        given = {"model": self.model, "optimizer": self.optimizer, "stateful": [self.scheduler]}
        return replay(taken, self.step, arms, steps, recorded=self.losses, **{**given, **options})

    def state(self) -> dict[str, Any]:
        hooks = [len(module._forward_hooks) for module in self.model.modules()]
        counts = (
            len(self.optimizer._optimizer_step_pre_hooks),
            len(self.optimizer._optimizer_step_post_hooks),
        )
        return {
            **snapshot(self.model, self.optimizer),
            "scheduler": dict(self.scheduler.state_dict()),
            "gradients": [p.grad for p in self.model.parameters()],
            "python": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),
            "training": [module.training for module in self.model.modules()],
            "hooks": (hooks, counts),
        }
