"""The cheapest real slingshot: modular division, small enough to be trained inside the test suite."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor.detect.judgement import Judgement
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.monitor import Monitor
from nfi_monitor.types import Alert, AlertKind, Reading

P, WIDTH, LR = 13, 64, 4e-3
"""Adam at β2 = .95 slingshots at about step 580 here, or, where it just does not, at 1,050."""


Step = Callable[[Monitor | None, int], float]
"""(monitor, number of the step from 1) → loss."""


def division_data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """One-hot pairs (a, b) [78, 2·13] and a/b mod 13: the half of all pairs that is trained on."""
    pairs = torch.tensor([(a, b) for a in range(P) for b in range(1, P)])
    pairs = pairs[
        torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[: len(pairs) // 2]
    ]
    targets = pairs[:, 0] * torch.tensor([pow(int(b), P - 2, P) for b in pairs[:, 1]]) % P
    return F.one_hot(pairs, P).flatten(1).float(), targets


def division(seed: int = 0) -> tuple[nn.Sequential, torch.optim.Adam, Step]:
    """Model, optimizer and ``step(monitor, n)``: one full-batch step of a/b mod 13 on half of all pairs.

    ``n`` counts from 1 and only says how warm the learning rate is (10 steps of warm-up).
    """
    torch.manual_seed(seed)
    inputs, targets = division_data(seed)
    sizes = [2 * P, WIDTH, WIDTH, WIDTH]
    layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, P))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.95))

    def step(monitor: Monitor | None, n: int) -> float:
        if n <= 10:
            for group in optimizer.param_groups:
                group["lr"] = LR * n / 10
        loss: Tensor = F.cross_entropy(model(inputs), targets)
        if monitor is not None:
            monitor.observe_loss(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, optimizer, step


@dataclass(frozen=True)
class Scene:
    """A run of :func:`division` that slingshots, and when."""

    seed: int
    onset: int
    """The step at which its loss leaves the floor."""

    @property
    def steps(self) -> int:
        """Until it is over."""
        return self.onset + 70

    @property
    def cuts(self) -> dict[str, int]:
        """Steps after which a checkpoint is kept."""
        return {"long before": 150, "in the build-up": self.onset - 30, "in the slingshot": self.onset + 10}

    def division(self) -> tuple[nn.Sequential, torch.optim.Adam, Step]:
        return division(self.seed)

    def data(self) -> tuple[Tensor, Tensor]:
        return division_data(self.seed)


CUTS = ("long before", "in the build-up", "in the slingshot")
"""The names of :attr:`Scene.cuts`, for tests that are made before there is a scene."""


def onset(losses: Iterable[float]) -> int | None:
    """The step, from 1, at which the loss leaves its floor; looks no further."""
    low = False
    for step, loss in enumerate(losses, 1):
        if low and loss > 0.1:
            return step
        low = low or loss < 1e-2
    return None


@cache
def scene() -> Scene:
    """The first seed whose slingshot comes early. Rounding makes it, so each processor has its own."""
    for seed in range(20):
        _, _, step = division(seed)
        begun = onset(step(None, n) for n in range(1, 621))
        if begun is not None and begun > 540:
            return Scene(seed, begun)
    raise AssertionError("of 20 seeds none slingshots at about step 580")


@dataclass(frozen=True)
class Recorded:
    """What a monitored run left behind: the closed monitor, and what its detector was fed, in order."""

    run_dir: Path
    monitor: Monitor
    readings: list[Reading]
    context: RunContext
    seen_by_callback: list[str]
    """``str(monitor.explain(alert))`` of every alert at the moment it was told."""
    checkpoints: dict[str, bytes]
    """Name of a cut → what ``torch.save`` made of model, optimizer and monitor after it."""
    model: nn.Sequential
    """As it was trained in the end."""

    def alert(self, kind: AlertKind) -> Alert:
        return next(alert for alert in self.monitor.alerts if alert.kind is kind)


def record(run_dir: Path) -> Recorded:
    model, optimizer, step = scene().division()
    readings: list[Reading] = []
    told: list[str] = []

    def on_alert(alert: Alert) -> None:
        told.append(str(monitor.explain(alert)))

    monitor = Monitor(model, optimizer, console=False, run_dir=run_dir, on_alert=on_alert)
    update = monitor._loop.detector.update

    def fed(reading: Reading) -> Judgement:
        readings.append(reading)
        return update(reading)

    monitor._loop.detector.update = fed  # type: ignore[method-assign]
    checkpoints = {}
    cuts = {n: cut for cut, n in scene().cuts.items()}
    for n in range(1, scene().steps + 1):
        step(monitor, n)
        if n in cuts:
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), monitor.state_dict()], file)
            checkpoints[cuts[n]] = file.getvalue()
    monitor.close()
    assert AlertKind.SLINGSHOT in {alert.kind for alert in monitor.alerts}, "this run is meant to slingshot"
    return Recorded(run_dir, monitor, readings, monitor._loop.detector.context, told, checkpoints, model)
