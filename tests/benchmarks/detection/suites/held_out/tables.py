"""Ordinary trainings on tables and lists: rare classes, quantiles, counts, survival, ranking, densities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import of_output, standardised, trained
from tests.benchmarks.detection.suites.held_out.shared import moving_average, pinball
from tests.benchmarks.detection.training import LogitChange

# --- networks ------------------------------------------------------------------------------------------


class Columns(nn.Module):
    """A token for each column, one attention layer, a class token (Gorishniy et al. 2021)."""

    def __init__(self, inputs: int, outputs: int, width: int = 16) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(inputs, width) * width**-0.5)
        self.shift = nn.Parameter(torch.randn(inputs, width) * width**-0.5)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.1, "gelu", batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[..., None] * self.scale + self.shift
        tokens = torch.cat([self.first.expand(len(x), -1, -1), tokens], 1)
        return self.head(self.layer(tokens)[:, 0])


class Splines(nn.Module):
    """Each input passes through radial bases before it is mixed linearly, in the manner of a KAN."""

    def __init__(self, inputs: int, outputs: int, bases: int = 6) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(-2, 2, bases))
        self.mix = nn.Linear(inputs * bases, outputs)
        self.base = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        bumps = torch.exp(-(1.5 * (x[..., None] - self.centres)).square())
        return self.mix(bumps.flatten(1)) + self.base(F.silu(x))


class Trees(nn.Module):
    """Soft decision trees of depth 3, each with the same split on a level (Popov et al. 2019)."""

    def __init__(self, inputs: int, outputs: int, trees: int = 12) -> None:
        super().__init__()
        self.splits = nn.Linear(inputs, 3 * trees)
        self.trees = trees
        self.leaves = nn.Linear(8 * trees, outputs)

    def forward(self, x: Tensor) -> Tensor:
        right = self.splits(x).sigmoid().reshape(len(x), self.trees, 3)
        paths = torch.ones(len(x), self.trees, 1)
        for level in range(3):
            odds = right[..., level : level + 1]
            paths = torch.cat([paths * odds, paths * (1 - odds)], -1)
        return self.leaves(paths.flatten(1))


class GatedNet(nn.Module):
    """LayerNorm and gated linear units with a residual path."""

    def __init__(self, inputs: int, outputs: int, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.gates = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for gate, norm in zip(self.gates, self.norms, strict=True):
            x = x + F.glu(gate(norm(x)))
        return self.head(x)


def scaled_units(inputs: int, outputs: int, width: int = 48) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.SELU(), nn.AlphaDropout(0.05),
        nn.Linear(width, width), nn.SELU(), nn.AlphaDropout(0.05), nn.Linear(width, outputs),
    )  # fmt: skip


NETS: dict[str, Callable[[int, int], nn.Module]] = {
    "columns": Columns, "trees": Trees, "gated": GatedNet, "scaled_units": scaled_units,
    "linear": nn.Linear,
    "splines": lambda inputs, outputs: nn.Sequential(Splines(inputs, 12), Splines(12, outputs)),
}  # fmt: skip

# --- losses --------------------------------------------------------------------------------------------


def survival(risk: Tensor, time: Tensor, seen: Tensor) -> Tensor:
    """Cox's partial likelihood: who of those still there has the event next."""
    order = time.argsort(descending=True)
    risk, seen = risk.squeeze(1)[order], seen[order]
    return -((risk - risk.logcumsumexp(0)) * seen).sum() / seen.sum().clamp_min(1)


def listwise(score: Tensor, worth: Tensor) -> Tensor:
    """ListNet: cross-entropy between the softmax of worths and of scores (Cao et al. 2007)."""
    return -(worth.softmax(-1) * score.squeeze(-1).log_softmax(-1)).sum(-1).mean()


def mixture(z: Tensor, y: Tensor) -> Tensor:
    """Negative log density of four Gaussians (Bishop 1994)."""
    share, mean, log_scale = z.chunk(3, -1)
    log_scale = log_scale.clamp(-4, 4)
    each = -0.5 * ((y - mean) / log_scale.exp()).square() - log_scale - 0.5 * math.log(2 * math.pi)
    return -(share.log_softmax(-1) + each).logsumexp(-1).mean()


def counts(z: Tensor, y: Tensor) -> Tensor:
    return F.poisson_nll_loss(z.squeeze(1), y)


def weighted_binary(z: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy in which the rare class weighs as much as the other."""
    return F.binary_cross_entropy_with_logits(z.squeeze(1), y, pos_weight=torch.tensor(99.0))


# --- data ----------------------------------------------------------------------------------------------


def shipped(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """A table of scikit-learn, shuffled; a target of a regression is standardised."""
    from sklearn import datasets

    found = getattr(datasets, f"load_{name}")()
    order = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target)
    return standardised(x)[order], (standardised(y.float()) if name == "diabetes" else y)[order]


def rare_rows(rows: int = 4000) -> tuple[Tensor, Tensor]:
    """One row in a hundred is of class 1; noise puts some on the wrong side."""
    x = torch.randn(rows, 8)
    score = x[:, 0] * x[:, 1] + x[:, 2].sin() + 0.5 * x[:, 3] + 0.3 * torch.randn(rows)
    return x, (score > score.quantile(0.99)).long()


def made(task: str, seed: int) -> tuple[tuple[Tensor, ...], int, Callable[..., Tensor]]:
    """Return (columns, outputs, loss) of a task."""
    if task in ("wine", "breast_cancer", "iris"):
        x, y = shipped(task, seed)
        return (x, y), int(y.max()) + 1, F.cross_entropy
    if task == "quantiles":
        return shipped("diabetes", seed), 3, pinball(0.1, 0.5, 0.9)
    if task.startswith("rare"):
        x, y = rare_rows()
        return (
            ((x, y.float()), 1, weighted_binary) if task == "rare_weighted" else ((x, y), 2, F.cross_entropy)
        )
    x = torch.randn(2000, 6)
    signal = x[:, 0] + x[:, 1] * x[:, 2]
    if task == "counts":
        return (x, torch.poisson((0.5 * signal).clamp_max(3).exp())), 1, counts
    if task == "survival":
        time = torch.empty(2000).exponential_() * (-signal).exp()
        end = torch.empty(2000).exponential_()
        return (x, torch.minimum(time, end), (time <= end).float()), 1, survival
    if task == "density":
        side = torch.where(torch.rand(2000) < 0.5, 1.0, -1.0)
        return (x, (side * signal + 0.2 * torch.randn(2000))[:, None]), 12, mixture
    raise ValueError(f"task {task!r}")


def table(
    seed: int, arm: LogitChange, *, task: str, net: str, batch: int = 32, averaged: bool = False, **how: Any
) -> CheckedTraining:
    """Train a network of :data:`NETS` on a table. ``averaged``: keep a moving average of the weights."""
    torch.manual_seed(seed)
    columns, outputs, loss = made(task, seed)
    model = NETS[net](columns[0].shape[1], outputs)
    after = moving_average(model) if averaged else None
    return trained(
        model, of_output(loss), epochs(*columns, size=batch, seed=seed), arm, part=part_of(*columns),
        after_update=after, **how,
    )  # fmt: skip


def ranking(seed: int, arm: LogitChange, *, batch: int = 16, **how: Any) -> CheckedTraining:
    """Lists of ten items are put in the order of their worth."""
    torch.manual_seed(seed)
    x = torch.randn(800, 10, 6)
    worth = 2 * (x[..., 0] * x[..., 1]).tanh() + x[..., 2] + 0.3 * torch.randn(800, 10)
    model = nn.Sequential(nn.Linear(6, 32), nn.Mish(), nn.Linear(32, 32), nn.Mish(), nn.Linear(32, 1))
    return trained(
        model,
        of_output(listwise),
        epochs(x, worth, size=batch, seed=seed),
        arm,
        part=part_of(x, worth),
        **how,
    )
