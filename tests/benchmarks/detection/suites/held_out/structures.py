"""Ordinary trainings on points, graphs and differential equations."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import losses
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import of_output, trained
from tests.benchmarks.detection.suites.held_out.shared import cross_entropy, generator_of, squares
from tests.benchmarks.detection.training import LogitChange


class Cloud(nn.Module):
    """Points attend to each other; a learned question gathers them (Lee et al. 2019)."""

    def __init__(self, inputs: int, outputs: int, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.among = nn.MultiheadAttention(width, 2, batch_first=True)
        self.question = nn.Parameter(torch.randn(1, 1, width))
        self.gather = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = x + self.among(x, x, x, need_weights=False)[0]
        asked = self.question.expand(len(x), -1, -1)
        return self.head(self.gather(asked, x, x, need_weights=False)[0].squeeze(1))


def clouds(seed: int, arm: LogitChange, *, points: int = 12, batch: int = 16, **how: Any) -> CheckedTraining:
    """Which of four outlines noisy points lie on; the focal loss."""
    torch.manual_seed(seed)
    y = torch.randint(0, 4, (1500,))
    angle = 2 * math.pi * torch.rand(1500, points)
    stretch = torch.tensor([1.0, 0.5, 1.0, 0.3])[y][:, None]
    x = torch.stack([angle.cos(), stretch * angle.sin()], -1)
    square = x / x.abs().amax(-1, keepdim=True)
    x = torch.where((y == 2)[:, None, None], square, x) + 0.08 * torch.randn(1500, points, 2)
    draw = epochs(x, y, size=batch, seed=seed)
    return trained(Cloud(2, 4), losses.focal(2.0), draw, arm, part=part_of(x, y, rows=128), **how)


# --- graphs --------------------------------------------------------------------------------------------


class Messages(nn.Module):
    """Two rounds of gated messages on small graphs [B, N, N]; the sum over nodes goes to the head."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(1, width)
        self.send = nn.Linear(width, width)
        self.update = nn.GRUCell(width, width)
        self.head = nn.Linear(width, 1)

    def forward(self, edges: Tensor) -> Tensor:
        x = F.relu(self.first(edges.sum(-1, keepdim=True)))
        shape = x.shape
        for _ in range(2):
            heard = edges @ self.send(x)
            x = self.update(heard.flatten(0, 1), x.flatten(0, 1)).reshape(shape)
        return self.head(x.sum(1)).squeeze(1)


def triangles(seed: int, arm: LogitChange, *, nodes: int = 8, batch: int = 32, **how: Any) -> CheckedTraining:
    """How many triangles a random graph has."""
    torch.manual_seed(seed)
    edges = (torch.rand(1500, nodes, nodes) < 0.2 + 0.4 * torch.rand(1500, 1, 1)).float().triu(1)
    edges = edges + edges.transpose(1, 2)
    y = (edges @ edges @ edges).diagonal(dim1=1, dim2=2).sum(1) / 6
    draw = epochs(edges, y / y.std(), size=batch, seed=seed)
    return trained(Messages(), squares, draw, arm, part=part_of(edges, y / y.std()), **how)


class Links(nn.Module):
    """Means of neighbours, twice (Hamilton et al. 2017); pairs of nodes → log odds of a link."""

    def __init__(self, adjacency: Tensor, width: int = 24) -> None:
        super().__init__()
        self.register_buffer("share", adjacency / adjacency.sum(1, keepdim=True).clamp_min(1))
        self.nodes = nn.Embedding(len(adjacency), width)
        self.first, self.second = nn.Linear(2 * width, width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, pairs: Tensor) -> Tensor:
        x = self.nodes.weight
        x = self.dropout(F.elu(self.first(torch.cat([x, self.share @ x], 1))))
        x = self.second(torch.cat([x, self.share @ x], 1))
        return (x[pairs[:, 0]] * x[pairs[:, 1]]).sum(1)


def links(seed: int, arm: LogitChange, *, nodes: int = 120, batch: int = 64, **how: Any) -> CheckedTraining:
    """Links between nodes that are near each other, against pairs drawn anew each step."""
    torch.manual_seed(seed)
    places = torch.rand(nodes, 2)
    near = torch.cdist(places, places) < 0.15
    pairs = near.triu(1).nonzero()
    plain = epochs(pairs, size=batch, seed=seed)
    adjacency = near.float() - torch.eye(nodes)

    def drawn(real: Tensor, number: int) -> tuple[Tensor, Tensor]:
        other = torch.randint(0, nodes, real.shape, generator=generator_of(seed, number))
        both = torch.cat([real, other])
        return both, near[both[:, 0], both[:, 1]].float()

    loss = of_output(F.binary_cross_entropy_with_logits)
    draw = lambda step: [drawn(plain(step)[0][0], step)]  # noqa: E731
    return trained(
        Links(adjacency), loss, draw, arm, part=drawn(pairs[:128], 0), watch={"head": False}, **how
    )


# --- equations -----------------------------------------------------------------------------------------


class Flowing(nn.Module):
    """Rows flow along a learned field, eight Euler steps (Chen et al. 2018); then a head."""

    def __init__(self, inputs: int, outputs: int, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, 8)
        self.field = nn.Sequential(nn.Linear(9, width), nn.Tanh(), nn.Linear(width, 8))
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for k in range(8):
            time = torch.full((len(x), 1), k / 8)
            x = x + self.field(torch.cat([x, time], 1)) / 8
        return self.head(x)


def spirals(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """Which of three spirals a point is on."""
    torch.manual_seed(seed)
    y = torch.randint(0, 3, (1200,))
    way = torch.rand(1200)
    angle = 5 * way + 2 * math.pi * y / 3
    x = 2 * way[:, None] * torch.stack([angle.cos(), angle.sin()], 1) + 0.08 * torch.randn(1200, 2)
    draw = epochs(x, y, size=batch, seed=seed)
    return trained(Flowing(2, 3), cross_entropy, draw, arm, part=part_of(x, y), **how)


def heat(seed: int, arm: LogitChange, *, batch: int = 64, **how: Any) -> CheckedTraining:
    """A physics-informed network (Raissi et al. 2019): u_t = u_xx / 10 from u = sin πx, 0 at both ends."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def places(number: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        draws = torch.rand(rows, 4, generator=generator_of(seed, number))
        start = torch.stack([draws[:, 2], torch.zeros(rows)], 1)
        edge = torch.stack([(draws[:, 2] > 0.5).float(), draws[:, 3]], 1)
        return draws[:, :2], start, edge

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        inner, start, edge = batch
        inner = inner.detach().requires_grad_()
        with torch.enable_grad():
            slope = torch.autograd.grad(training.model(inner).sum(), inner, create_graph=True)[0]
            bend = torch.autograd.grad(slope[:, 0].sum(), inner, create_graph=True)[0][:, 0]
        wrong = (slope[:, 1] - 0.1 * bend).square().mean()
        begin = training.model(start).squeeze(1) - (math.pi * start[:, 0]).sin()
        return wrong + begin.square().mean() + training.model(edge).square().mean()

    draw = lambda step: [places(step, batch)]  # noqa: E731
    return trained(model, loss, draw, arm, part=places(0, 128), watch={"head": False}, **how)
