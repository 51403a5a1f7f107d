"""PyTorch Geometric: nodes and graphs are classified; layers make the logits, not nn.Linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.configuration import Configuration, Table
from tests.zoo.kits import labels, loop, reals

NODES = 32


def _edges() -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randint(0, NODES, (2, 96), generator=generator)


def _nodes(model: nn.Module, step: int) -> Tensor:
    out = model(reals(12), _edges())
    half = torch.arange(NODES) % 2 == 0
    return F.cross_entropy(out[half], labels(5)[half])


def _log_nodes(model: nn.Module, step: int) -> Tensor:
    return F.nll_loss(model(reals(12), _edges()).log_softmax(-1), labels(5))


class _Graphs(nn.Module):
    """Embeds the nodes, averages them over each graph, and classifies the graph."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.lin = body, nn.Linear(16, 5)

    def forward(self, x: Tensor, edges: Tensor, which: Tensor) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        out: Tensor = self.lin(global_mean_pool(self.body(x, edges).relu(), which))
        return out


def _graph_loss(model: nn.Module, step: int) -> Tensor:
    which = torch.arange(NODES) // 4
    return F.cross_entropy(model(reals(12), _edges(), which), labels(5)[:8])


def _basic(name: str) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        from torch_geometric.nn import models

        cls: Any = getattr(models, name)
        found: nn.Module = cls(12, 16, num_layers=2, out_channels=5)
        return found

    return made


class _Handmade(nn.Module):
    """The two-layer network of the library's introduction."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        from torch_geometric import nn as gnn

        layer: Any = getattr(gnn, kind)
        self.conv1, self.conv2 = layer(12, 16), layer(16, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        out: Tensor = self.conv2(F.relu(self.conv1(x, edges)), edges)
        return out


def _make() -> list[Configuration]:
    from torch_geometric.nn import models

    # A graph convolution adds up its neighbours after its linear layer.
    mixed: dict[str, Any] = {"changed": True}
    return [
        Configuration(
            "GCNConv, node classification",
            loop(lambda: _Handmade("GCNConv"), _nodes),
            ("conv2", "conv2.lin", "conv2.lin.weight"),
            **mixed,
        ),
        Configuration(
            "GATConv, node classification",
            loop(lambda: _Handmade("GATConv"), _nodes),
            ("conv2", "conv2.lin", "conv2.lin.weight"),
            **mixed,
        ),
        Configuration(
            "SAGEConv, node classification",
            loop(lambda: _Handmade("SAGEConv"), _nodes),
            ("conv2", "conv2.lin_r", "conv2.lin_r.weight", "conv2.lin_l"),
            **mixed,
        ),
        Configuration(
            "GCN (library's model)",
            loop(_basic("GCN"), _log_nodes),
            ("convs.1", "convs.1.lin", "convs.1.lin.weight"),
            **mixed,
        ),
        Configuration(
            "GIN (library's model)",
            loop(_basic("GIN"), _log_nodes),
            ("convs.1.nn.lins.1", "convs.1.nn.lins.1.weight", "convs.1.nn", "convs.1"),
            **mixed,
        ),
        Configuration(
            "GCN, graph classification", loop(lambda: _Graphs(models.GCN(12, 16, 2)), _graph_loss), "lin"
        ),
        Configuration(
            "GraphSAGE, graph classification",
            loop(lambda: _Graphs(models.GraphSAGE(12, 16, 2)), _graph_loss),
            "lin",
        ),
    ]


TABLE = Table("torch-geometric", ("torch-geometric",), _make)
