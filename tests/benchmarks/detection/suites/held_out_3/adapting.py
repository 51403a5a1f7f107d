"""Ordinary trainings of a few weights of a network that was trained before, and of tiny library models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data, models
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import (
    ENDS,
    USUAL,
    Draw,
    of_output,
    of_transformers,
    trained,
)
from tests.benchmarks.detection.suites.held_out_3.shared import generator_of
from tests.benchmarks.detection.training import LogitChange

LENGTH = 16

# --- a transformer that was trained before -----------------------------------------------------------------


class Reader(nn.Module):
    """Bytes → class; ``prompt`` learned vectors may stand before the text."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, width)
        self.places = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.prompt: nn.Parameter | None = None
        self.layers = nn.ModuleList(models.Block(width, 2, norm=True, causal=False) for _ in range(2))
        self.score = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.places
        if self.prompt is not None:
            x = torch.cat([self.prompt.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.score(x.mean(1))


class Decomposed(nn.Module):
    """A frozen map whose direction gets a thin product, and whose rows a learned length (Liu et al. 2024)."""

    def __init__(self, inner: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, inner.in_features) * inner.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(inner.out_features, rank))
        self.length = nn.Parameter(inner.weight.detach().norm(dim=1, keepdim=True).clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight + self.up @ self.down
        return F.linear(x, self.length * F.normalize(weight, dim=1), self.inner.bias)


class Bottleneck(nn.Module):
    """A frozen map, and a thin perceptron that is added to what it gives (Houlsby et al. 2019)."""

    def __init__(self, inner: nn.Linear, few: int = 6) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down, self.up = nn.Linear(inner.out_features, few), nn.Linear(few, inner.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x + self.up(F.gelu(self.down(x)))


def _of_text(seed: int, rows: int, *, later: bool) -> tuple[Tensor, Tensor]:
    """Windows of the manual, and how many words begin in each, or (later) which kind of sign is commonest."""
    x, _ = data.text_windows(rows, LENGTH, seed=seed)
    if not later:
        return x, (x == 32).sum(1).clamp(1, 4) - 1
    capital = ((x >= 65) & (x <= 90)).sum(1)
    mark = ((x > 32) & (x < 65)).sum(1)
    return x, torch.where(mark > 2, 2, torch.where(capital > 0, 1, 0))


def adapted(
    seed: int, arm: LogitChange, *, by: str, rows: int = 600, batch: int = 16, **how: Any
) -> CheckedTraining:
    """A second task ``by`` "directions", "bottlenecks", "prompt" or "biases"; all else is frozen."""
    torch.manual_seed(seed)
    model = Reader(4)
    x, y = _of_text(seed, 800, later=False)
    step, draw = torch.optim.AdamW(model.parameters(), lr=2e-3), epochs(x, y, size=32, seed=seed)
    for number in range(1, 251):
        ((some, wanted),) = draw(number)
        F.cross_entropy(model(some), wanted).backward()
        step.step()
        step.zero_grad()
    model.requires_grad_(False)
    if by == "prompt":
        model.prompt = nn.Parameter(0.5 * torch.randn(4, 32))
    elif by == "biases":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    else:
        kind = {"directions": Decomposed, "bottlenecks": Bottleneck}[by]
        for layer in model.layers:
            layer.feed[0], layer.feed[2] = kind(layer.feed[0]), kind(layer.feed[2])
    torch.manual_seed(seed + 1)
    model.score = nn.Linear(32, 3)
    x, y = _of_text(seed + 1, rows, later=True)
    draw = epochs(x, y, size=batch, seed=seed)
    loss = of_output(F.cross_entropy)
    return trained(model, loss, draw, arm, part=part_of(x, y), check_every=20, **how)


# --- float16 with a scaler --------------------------------------------------------------------------------


@dataclass
class Scaled(CheckedTraining):
    """Training in float16 as PyTorch's recipe has it: the loss is scaled, too large gradients skip a step."""

    scaler: Any = None

    def step(self, number: int, monitor: Any) -> None:
        for batch in self.micro_batches(number):
            loss = self.loss(self, batch, monitor)
            monitor.observe_loss(loss)
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def half(seed: int, arm: LogitChange, *, batch: int = 32, lr: float = 1e-3) -> CheckedTraining:
    """Digits by convolutions under autocast in float16, the loss in float32."""
    torch.manual_seed(seed)
    x, y = data.digits(1500, seed=seed)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.1),
        nn.Linear(96, 10),
    )  # fmt: skip

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            z = training.arm(training.model(given[0]))
        return F.cross_entropy(z.float(), given[1])

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=500)
    draw, step = epochs(x, y, size=batch, seed=seed), torch.optim.AdamW(model.parameters(), lr=lr)
    return Scaled(model, step, loss, draw, None, arm, part=part_of(x, y), check_every=10, scaler=scaler)


# --- models of transformers --------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo": ("Olmo2ForCausalLM", {**USUAL, "num_key_value_heads": 1, **ENDS}),
    "deberta": ("DebertaV2ForTokenClassification", {
        **USUAL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
        "num_labels": 3, **ENDS}),
    "neo": ("GPTNeoForCausalLM", {
        "vocab_size": 128, "hidden_size": 24, "num_layers": 2, "num_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 32, "attention_types": [[["global", "local"], 1]], "window_size": 4,
        **ENDS}),
}  # fmt: skip
"""Short name → class of ``transformers`` and its configuration."""


def from_library(
    seed: int, arm: LogitChange, *, model: str, rows: int = 800, batch: int = 8, low: bool = False, **how: Any
) -> CheckedTraining:
    """Train a model of :data:`CONFIGS` with its own loss. ``low``: weights of bfloat16."""
    torch.manual_seed(seed)
    network = of_transformers(*CONFIGS[model]).train()
    if low:
        network = network.bfloat16()
    x, _ = data.text_windows(rows, LENGTH, seed=seed)
    kinds = torch.where(x == 32, 1, ((x < 65) | (x > 122)).long() * 2)
    plain = epochs(x, kinds if model == "deberta" else x, size=batch, seed=seed)

    def named(some: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        return {"input_ids": some, "labels": wanted}

    draw: Draw = lambda step: [named(*plain(step)[0])]  # noqa: E731

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        return training.model(**given).loss  # type: ignore[no-any-return]

    part = named(x[:64], kinds[:64] if model == "deberta" else x[:64])
    return trained(network, loss, draw, arm, part=part, check_every=20, **({"clip": 1.0} | how))


def easy_first(
    seed: int, arm: LogitChange, *, batch: int = 16, full: int = 2000, **how: Any
) -> CheckedTraining:
    """Text from its simplest windows to all of them: a growing share, few kinds of signs first."""
    torch.manual_seed(seed)
    x, y = _of_text(seed, 1500, later=True)
    hard = torch.tensor([len(set(row)) for row in x.tolist()])
    order = hard.argsort(stable=True)

    def draw(step: int) -> Any:
        share = min(0.1 + 0.9 * step / full, 1.0)
        chosen = order[torch.randint(0, max(int(share * len(x)), batch), (batch,),
                                     generator=generator_of(seed, step))]  # fmt: skip
        return [(x[chosen], y[chosen])]

    model = Reader(3)
    loss = of_output(F.cross_entropy)
    return trained(model, loss, draw, arm, part=part_of(x, y), check_every=20, **how)
