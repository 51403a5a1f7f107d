"""Ordinary trainings on graphs and points: attention to neighbours, molecules, energies, outlines."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import each_place, of_output, trained
from tests.benchmarks.detection.training import LogitChange, full_batch

# --- graphs ----------------------------------------------------------------------------------------------


class Attended(nn.Module):
    """Attention over neighbours, two heads (Veličković et al. 2018)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.maps = nn.Linear(inputs, 2 * outputs, bias=False)
        self.left, self.right = (nn.Parameter(0.1 * torch.randn(2, outputs)) for _ in range(2))

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        x = self.maps(x).unflatten(-1, (2, -1)).transpose(0, 1)
        odds = (x * self.left[:, None]).sum(-1)[..., None] + (x * self.right[:, None]).sum(-1)[:, None]
        odds = F.leaky_relu(odds, 0.2).masked_fill(links == 0, -1e9).softmax(-1)
        return (F.dropout(odds, 0.3, self.training) @ x).transpose(0, 1).flatten(1)


class Citations(nn.Module):
    """Two layers of :class:`Attended` on a fixed graph; gives the rows of the nodes asked for."""

    def __init__(self, links: Tensor, inputs: int, outputs: int, width: int = 12) -> None:
        super().__init__()
        self.register_buffer("links", links)
        self.first, self.second = Attended(inputs, width), Attended(2 * width, width)
        self.classes = nn.Linear(2 * width, outputs)

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        x, chosen = given
        x = F.elu(self.first(F.dropout(x, 0.5, self.training), self.links))
        return self.classes(F.elu(self.second(x, self.links)))[chosen]


def citations(seed: int, arm: LogitChange, *, nodes: int = 150, **how: Any) -> CheckedTraining:
    """Subjects of nodes that mostly link to their own kind; a third is labelled, all at each step."""
    torch.manual_seed(seed)
    y = torch.arange(nodes) % 5
    odds = torch.where(y[:, None] == y, 0.12, 0.02)
    links = (torch.rand(nodes, nodes) < odds).float().triu(1)
    links = links + links.T + torch.eye(nodes)
    x = (torch.randn(5, 40)[y] + 2.5 * torch.randn(nodes, 40)).sigmoid().round()
    chosen = torch.randperm(nodes)[: nodes // 3]
    batch = ((x, chosen), y[chosen])
    draw = full_batch(*batch)
    return trained(Citations(links, 40, 5), of_output(F.cross_entropy), draw, arm, part=batch, **how)


class Molecules(nn.Module):
    """Sums over neighbours (Xu et al. 2019) with BatchNorm; each layer's mean is given on."""

    def __init__(self, kinds: int, width: int = 24) -> None:
        super().__init__()
        self.kinds = nn.Embedding(kinds, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.out = nn.Linear(3 * width, 2)

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        links, kinds = given
        x = self.kinds(kinds)
        found = [x.mean(1)]
        for layer in self.layers:
            x = x + layer((x + links @ x).flatten(0, 1)).unflatten(0, x.shape[:2]).relu()
            found.append(x.mean(1))
        return self.out(torch.cat(found, -1))


def molecules(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """Whether two atoms of kind 0 are linked, of ten made-up ones; one label in ten is wrong."""
    torch.manual_seed(seed)
    links = (torch.rand(1200, 10, 10) < 0.15).float().triu(1)
    links = links + links.transpose(1, 2)
    kinds = torch.randint(0, 4, (1200, 10))
    first = (kinds == 0).float()
    y = ((links @ first[..., None]).squeeze(-1) * first).sum(1).clamp_max(1).long()
    y = torch.where(torch.rand(1200) < 0.1, 1 - y, y)
    plain = epochs(links, kinds, y, size=batch, seed=seed)

    def draw(step: int) -> Any:
        ((some, their, wanted),) = plain(step)
        return [((some, their), wanted)]

    part = ((links[:256], kinds[:256]), y[:256])
    return trained(Molecules(4), of_output(F.cross_entropy), draw, arm, part=part, **how)


# --- points ----------------------------------------------------------------------------------------------


class Turned(nn.Module):
    """Messages between points that know distances alone, so that a turn changes nothing (Satorras 2021)."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.kinds = nn.Embedding(2, width)
        self.messages = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            for _ in range(2)
        )
        self.updates = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.shifts = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(2))
        self.energy = nn.Linear(width, 1)

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        place, kinds = given
        x, count = self.kinds(kinds), place.shape[1]
        for message, update, shift in zip(self.messages, self.updates, self.shifts, strict=True):
            apart = place[:, :, None] - place[:, None]
            far = apart.square().sum(-1, keepdim=True)
            both = [x[:, :, None].expand(-1, -1, count, -1), x[:, None].expand(-1, count, -1, -1)]
            sent = message(torch.cat([*both, far], -1))
            place = place + (apart * shift(sent).tanh() / (far + 1)).mean(2)
            x = x + update(torch.cat([x, sent.mean(2)], -1))
        return self.energy(x).mean(1)


def energies(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """The energy of six charges, from their places; squared error."""
    torch.manual_seed(seed)
    place, kinds = torch.randn(1200, 6, 3), torch.randint(0, 2, (1200, 6))
    charge = 2.0 * kinds - 1
    near = 1 / (torch.cdist(place, place) + 0.5)
    energy = (near * charge[:, :, None] * charge[:, None]).sum((1, 2), keepdim=True)[..., 0] / 6
    plain = epochs(place, kinds, energy, size=batch, seed=seed)

    def draw(step: int) -> Any:
        ((some, their, wanted),) = plain(step)
        return [((some, their), wanted)]

    part = ((place[:256], kinds[:256]), energy[:256])
    return trained(Turned(), of_output(F.mse_loss), draw, arm, part=part, **how)


class Segments(nn.Module):
    """What each point gives, beside the largest over all (Qi et al. 2017); a small network turns them."""

    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()
        self.turn = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 4))
        nn.init.zeros_(self.turn[2].weight)
        self.each = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.both = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Dropout(0.2))
        self.classes = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        turn = self.turn(x).mean(1).unflatten(-1, (2, 2)) + torch.eye(2)
        each = self.each(x @ turn)
        all_of_them = each.amax(1, keepdim=True).expand_as(each)
        return self.classes(self.both(torch.cat([each, all_of_them], -1)))


def _shapes(rows: int, points: int = 16) -> tuple[Tensor, Tensor]:
    """(points [N, P, 2], part of each [N, P]): a body that is a circle, a tail that is a line."""
    along = 2 * math.pi * torch.rand(rows, points)
    body = torch.stack([along.cos(), along.sin()], -1)
    tail = torch.stack([1 + 1.5 * torch.rand(rows, points), torch.zeros(rows, points)], -1)
    part = (torch.rand(rows, points) < 0.4).long()
    turn = 2 * math.pi * torch.rand(rows, 1)
    turns = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).unflatten(-1, (2, 2))
    placed = torch.where(part[..., None] == 1, tail, body) + 0.15 * torch.randn(rows, points, 2)
    return (placed[:, :, None] @ turns.transpose(-1, -2)).squeeze(2), part


def outlines(seed: int, arm: LogitChange, *, batch: int = 16, **how: Any) -> CheckedTraining:
    """Whether each point is of the body or of the tail of a turned figure."""
    torch.manual_seed(seed)
    x, y = _shapes(1000)
    draw = epochs(x, y, size=batch, seed=seed)
    return trained(Segments(2), of_output(each_place), draw, arm, part=part_of(x, y), **how)


def nearest_points(z: Tensor, x: Tensor) -> Tensor:
    """Chamfer's distance between two clouds."""
    far = torch.cdist(z.unflatten(-1, (-1, 2)), x).square()
    return far.amin(1).mean() + far.amin(2).mean()


def clouds_again(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """Clouds through eight numbers and back, in any order of the points."""
    torch.manual_seed(seed)
    x, _ = _shapes(1000)

    class Folded(nn.Module):
        def __init__(self, width: int = 32) -> None:
            super().__init__()
            self.each = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Linear(width, width))
            self.code = nn.Linear(width, 8)
            self.back = nn.Sequential(nn.Linear(8, 2 * width), nn.GELU(), nn.Linear(2 * width, 32))

        def forward(self, points: Tensor) -> Tensor:
            return self.back(self.code(self.each(points).amax(1)))

    draw = epochs(x, x, size=batch, seed=seed)
    return trained(Folded(), of_output(nearest_points), draw, arm, part=part_of(x, x), **how)
