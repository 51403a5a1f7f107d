"""What is trained while the clock runs: from a model that feels everything to one that feels nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Transformer(nn.Module):
    """A pre-norm language model."""

    def __init__(
        self, vocabulary: int, length: int, width: int, layers: int, heads: int, *, tied: bool = False
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def features(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens) + self.positions
        return self.blocks(hidden, mask=self.mask, is_causal=True).flatten(0, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens))


class Classifier(nn.Module):
    """Layers and a head."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes[:-1]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-2], sizes[-1])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.features(inputs))


def fused_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The loss from the head's weight, past the module, as fused losses do: no hook on the head fires."""
    return F.cross_entropy(F.linear(model.features(inputs), model.head.weight, model.head.bias), targets)


def plain_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), targets)


def rows(count: int, features: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, features), torch.randint(classes, (count,))


def tokens(count: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(vocabulary, (count, length + 1))
    return text[:, :-1].contiguous(), text[:, 1:].flatten()


@dataclass(frozen=True)
class Case:
    """``default`` and ``every_step``: what the monitor may cost there, as a share of the bare step.

    ``autocast``: forward and loss run in bfloat16.  ``accelerator``: of no use on a CPU.
    """

    what: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    default: float
    every_step: float | None = None
    autocast: bool = False
    accelerator: bool = False

    def runs_on(self, device: str) -> bool:
        return not self.accelerator or device != "cpu"


CASES = {
    "mlp-26k": Case(
        "MLP, batch 128", lambda: Classifier(64, 128, 128, 10), lambda: rows(128, 64, 10), 0.05, 0.15
    ),
    "transformer-422k": Case(
        "transformer, vocabulary 1,000, 8 × 64 tokens",
        lambda: Transformer(1_000, 64, 96, 2, 4),
        lambda: tokens(8, 64, 1_000),
        0.02,
        0.05,
    ),
    "mlp-2.6M": Case(
        "MLP, batch 128",
        lambda: Classifier(512, 1024, 1024, 1024, 10),
        lambda: rows(128, 512, 10),
        0.01,
        0.03,
    ),
    "gpt-10M": Case(
        "transformer, vocabulary 8,192, 4 × 128 tokens",
        lambda: Transformer(8_192, 128, 256, 7, 8),
        lambda: tokens(4, 128, 8_192),
        0.005,
        0.02,
    ),
    "head-heavy": Case(
        "K = 50,257, 1,024 rows", lambda: Classifier(64, 64, 50_257), lambda: rows(1_024, 64, 50_257), 0.005
    ),
    "parameters-50M": Case(
        "MLP, batch 8", lambda: Classifier(512, 4096, 4096, 4096, 3072, 10), lambda: rows(8, 512, 10), 0.005
    ),
    "gpt2-124M": Case(
        "GPT-2's sizes, tied, bfloat16, vocabulary 50,304, 16 × 1,024 tokens",
        lambda: Transformer(50_304, 1_024, 768, 12, 12, tied=True),
        lambda: tokens(16, 1_024, 50_304),
        0.005,
        autocast=True,
        accelerator=True,
    ),
}
