"""Ordinary trainings of small language models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.reference.gpt_model import GPT
from tests.benchmarks.detection import data, losses, models
from tests.benchmarks.detection.suites.checked import (
    CheckedTraining,
    clipped,
    cosine,
    epochs,
    part_of,
    scheduled,
)
from tests.benchmarks.detection.training import LogitChange


def reader(
    seed: int,
    arm: LogitChange,
    *,
    windows: int,
    length: int = 24,
    batch: int = 8,
    width: int = 32,
    layers: int = 1,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    decay: float = 0.01,
    clip: float | None = None,
    total: int = 0,
) -> CheckedTraining:
    """Byte-level text: few windows are learnt by heart, many are read once. ``total``: a cosine over them."""
    torch.manual_seed(seed)
    x, y = data.text_windows(windows, length, seed=seed)
    model = models.Transformer(
        128, length, 128, width=width, layers=layers, heads=4, norm=True, all_positions=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=decay)
    return CheckedTraining(
        model,
        optimizer,
        losses.cross_entropy,
        epochs(x, y, size=batch, seed=seed),
        scheduled(optimizer, cosine(total, 100, 0.1) if total else None),
        arm,
        part=part_of(x, y, rows=32),
        check_every=20,
        before_update=None if clip is None else clipped(clip),
    )


def autocast_loss(training: Any, batch: Any, monitor: Any) -> Tensor:
    """The model under bfloat16 autocast, the loss in float32, targets of −100 left out."""
    inputs, target = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = training.model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=-100)


def modern_gpt(
    seed: int,
    arm: LogitChange,
    *,
    windows: int,
    length: int = 16,
    batch: int = 8,
    prefix: int = 0,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    decay: float = 0.1,
) -> CheckedTraining:
    """RoPE, SwiGLU, QK-norm, bfloat16 autocast, clipping at 1.

    ``prefix``: windows begin with so many equal bytes, after which nothing tells them apart: a loss below
    the entropy of that choice is not to be had.
    """
    torch.manual_seed(seed)
    x, y = data.text_windows(windows, length, seed=seed)
    if prefix:
        x = x.clone()
        x[:, : prefix + 1] = 0
        y = y.clone()
        y[:, :prefix] = 0
    model = GPT(128, width=32, layers=1, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=decay)
    return CheckedTraining(
        model,
        optimizer,
        autocast_loss,
        epochs(x, y, size=batch, seed=seed),
        None,
        arm,
        part=part_of(x, y, rows=32),
        check_every=20,
        before_update=clipped(1.0),
    )


class SortingGPT(nn.Module):
    """minGPT's shape: learned positions, GELU, dropout, a head without bias."""

    def __init__(self, digits: int, length: int, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(digits, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 2, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, digits, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions
        return self.lm_head(self.norm(self.blocks(x, mask=self.mask)))


def masked_loss(training: Any, batch: Any, monitor: Any) -> Tensor:
    inputs, target = batch
    logits = training.model(inputs)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1)


def sorting(
    seed: int,
    arm: LogitChange,
    *,
    length: int = 6,
    digits: int = 3,
    batch: int = 32,
    lr: float = 5e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    decay: float = 0.1,
) -> CheckedTraining:
    """minGPT's demo: sort six digits; the loss counts the sorted half only."""
    torch.manual_seed(seed)

    def rows(count: int, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(15_485_863 * (seed + 1) + number)
        given = torch.randint(0, digits, (count, length), generator=generator)
        whole = torch.cat([given, given.sort(1).values], 1)
        target = whole[:, 1:].clone()
        target[:, : length - 1] = -1
        return whole[:, :-1], target

    model = SortingGPT(digits, 2 * length - 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=decay)
    return CheckedTraining(
        model,
        optimizer,
        masked_loss,
        lambda step: [rows(batch, step)],
        None,
        arm,
        part=rows(128, 0),
        check_every=10,
        before_update=clipped(1.0),
    )
