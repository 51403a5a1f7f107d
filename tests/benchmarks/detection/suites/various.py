"""Ordinary trainings of other networks: mixers, graphs, tables, sets, experts, embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data, losses
from tests.benchmarks.detection.suites.checked import CheckedTraining, cosine, epochs, part_of, scheduled
from tests.benchmarks.detection.training import LogitChange, LossOf


class Mixer(nn.Module):
    """MLP-Mixer on 2×2 patches of the digits (Tolstikhin et al. 2021)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.norm1, self.norm2, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.channels = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x.reshape(-1, 1, 8, 8)).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(self.norm(x).mean(1))


class TableNet(nn.Module):
    """A residual perceptron with BatchNorm and dropout for tables (Gorishniy et al. 2021)."""

    def __init__(self, inputs: int, outputs: int, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(width), nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.1),
                nn.Linear(width, width),
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.relu(x))


class Experts(nn.Module):
    """Four experts, the best two of which are mixed for each row."""

    def __init__(self, inputs: int, outputs: int, width: int = 32) -> None:
        super().__init__()
        self.gate = nn.Linear(inputs, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(4)
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x)
        best = gates.topk(2, -1)
        weight = torch.zeros_like(gates).scatter(-1, best.indices, best.values.softmax(-1))
        mixed = torch.stack([expert(x) for expert in self.experts], 1)
        return self.head((weight[..., None] * mixed).sum(1))


class Sets(nn.Module):
    """DeepSets: the sum over a set's members, then a head."""

    def __init__(self, outputs: int, width: int = 32) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Embedding(10, width), nn.Linear(width, width), nn.ReLU())
        self.outer = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outer(self.inner(x).sum(1)))


class Graph(nn.Module):
    """Two graph convolutions (Kipf and Welling 2017) on a fixed graph; returns the rows asked for."""

    def __init__(self, adjacency: Tensor, features: Tensor, outputs: int, width: int = 24) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.register_buffer("features", features)
        self.first, self.head = nn.Linear(features.shape[1], width), nn.Linear(width, outputs)
        self.dropout = nn.Dropout(0.3)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.dropout(F.relu(self.first(self.adjacency @ self.features)))
        return self.head((self.adjacency @ hidden)[rows])


def simple(
    seed: int,
    arm: LogitChange,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    batch: int = 32,
    lr: float = 1e-3,
    beta2: float = 0.999,
    decay: float = 0.01,
    total: int = 0,
    loss: LossOf = losses.cross_entropy,
    **watch: Any,
) -> CheckedTraining:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, beta2), weight_decay=decay)
    return CheckedTraining(
        model,
        optimizer,
        loss,
        epochs(x, y, size=batch, seed=seed),
        scheduled(optimizer, cosine(total, 100) if total else None),
        arm,
        part=part_of(x, y),
        check_every=10,
        watch=watch,
    )


def mixer(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    torch.manual_seed(seed)
    x, y = data.digits(1500, seed=seed)
    return simple(seed, arm, Mixer(), x, y, **how)


def experts(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    torch.manual_seed(seed)
    x, y = data.digits(1500, seed=seed)
    return simple(seed, arm, Experts(64, 10), x, y, **how)


def sets(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    """How often the commonest number stands in a set of eight."""
    torch.manual_seed(seed)
    x = torch.randint(0, 10, (1500, 8))
    y = F.one_hot(x, 10).sum(1).max(1).values.clamp_max(5)
    return simple(seed, arm, Sets(6), x, y, **how)


def table(seed: int, arm: LogitChange, *, data_set: str, **how: Any) -> CheckedTraining:
    """scikit-learn's breast_cancer, wine, or diabetes (a regression)."""
    from sklearn import datasets

    torch.manual_seed(seed)
    found = getattr(datasets, f"load_{data_set}")()
    x = torch.tensor(found.data, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, raw = x[order], torch.tensor(found.target)[order]
    if data_set == "diabetes":
        y = raw[:, None].float()  # in its own unit: squares of thousands
        return simple(seed, arm, TableNet(x.shape[1], 1), x, y, loss=squared, **how)
    return simple(seed, arm, TableNet(x.shape[1], int(raw.max()) + 1), x, raw, **how)


def squared(training: Any, batch: Any, monitor: Any) -> Tensor:
    return F.mse_loss(training.model(batch[0]), batch[1])


def graph(seed: int, arm: LogitChange, *, nodes: int = 200, **how: Any) -> CheckedTraining:
    """Communities of a random graph from noisy features."""
    torch.manual_seed(seed)
    y = torch.randint(0, 4, (nodes,))
    odds = torch.where(y[:, None] == y[None], 0.1, 0.01)
    edges = (torch.rand(nodes, nodes) < odds).float().triu(1)
    adjacency = edges + edges.T + torch.eye(nodes)
    scale = adjacency.sum(1).rsqrt()
    features = F.one_hot(y, 4).float() + torch.randn(nodes, 4)
    model = Graph(scale[:, None] * adjacency * scale, features, 4)
    return simple(seed, arm, model, torch.arange(nodes), y, **how)


class Factors(nn.Module):
    """Recommender: two embeddings and a head on their product."""

    def __init__(self, users: int, items: int, width: int = 16) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        self.head = nn.Linear(width, 1)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.head(self.users(pairs[:, 0]) * self.items(pairs[:, 1])).squeeze(1)


def binary(training: Any, batch: Any, monitor: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(training.model(batch[0]), batch[1])


def recommender(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    torch.manual_seed(seed)
    taste, kind = torch.randn(100, 3), torch.randn(80, 3)
    pairs = torch.stack([torch.randint(0, 100, (3000,)), torch.randint(0, 80, (3000,))], 1)
    liked = (taste[pairs[:, 0]] * kind[pairs[:, 1]]).sum(1) + torch.randn(3000) > 0
    return simple(seed, arm, Factors(100, 80), pairs, liked.float(), loss=binary, **how)


class SkipGram(nn.Module):
    """word2vec with a full softmax."""

    def __init__(self, words: int, width: int = 24) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x))


def skip_gram(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    torch.manual_seed(seed)
    stream = data.text()[:4000]
    return simple(seed, arm, SkipGram(128), stream[:-1], stream[1:], **how)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
        self.projection = nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.projection(self.inner(x)), dim=1)


def two_noises(seed: int, arm: LogitChange, *, batch: int = 32, decay: float = 0.01) -> CheckedTraining:
    """SimCLR: two noisy copies of a digit are neighbours (Chen et al. 2020)."""
    torch.manual_seed(seed)
    x, _ = data.digits(1500, seed=seed)
    plain = epochs(x, size=batch, seed=seed)

    def copies(rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(number)
        one, two = (rows + 0.2 * torch.randn(rows.shape, generator=generator) for _ in range(2))
        return one, two

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        one, two = (training.model(item) for item in given)
        logits = monitor.tap(one @ two.T / 0.2)
        return F.cross_entropy(logits, torch.arange(len(logits)))

    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=decay)
    return CheckedTraining(
        model, optimizer, loss, lambda step: [copies(plain(step)[0][0], step)], None, arm,
        part=copies(x[:batch], 0), watch={"head": False},
    )  # fmt: skip


def triplets(seed: int, arm: LogitChange, *, decay: float = 0.01) -> CheckedTraining:
    """A margin between digits of one kind and of another; exactly 0 once it holds."""
    torch.manual_seed(seed)
    x, y = data.digits(1500, seed=seed)

    def drawn(number: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(7_919 * (seed + 1) + number)
        first = torch.randint(0, len(y), (rows,), generator=generator)
        others = torch.rand(rows, len(y), generator=generator)
        same = y[first][:, None] == y[None]
        return x[first], x[(others * same).argmax(1)], x[(others * ~same).argmax(1)]

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        return F.triplet_margin_loss(*(training.model(item) for item in given), margin=0.5)

    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=decay)
    return CheckedTraining(
        model, optimizer, loss, lambda step: [drawn(step, 24)], None, arm, part=drawn(0, 128),
        watch={"head": "projection"},
    )  # fmt: skip
