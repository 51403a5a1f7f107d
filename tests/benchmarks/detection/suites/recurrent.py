"""Ordinary trainings of recurrent networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, clipped, cosine, epochs, scheduled
from tests.benchmarks.detection.training import LogitChange


class Recurrent(nn.Module):
    """Embedding → recurrent layer → head, at the last position or at all of them."""

    def __init__(
        self, kind: str, tokens: int, width: int, outputs: int, *, everywhere: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        kinds = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
        self.layer: Any = kinds[kind](width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, outputs)
        self.everywhere = everywhere

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.layer(self.embedding(x))[0])
        return self.fc(hidden if self.everywhere else hidden[:, -1])


def flat_cross_entropy(training: Any, batch: Any, monitor: Any) -> Tensor:
    inputs, target = batch
    return F.cross_entropy(training.model(inputs).flatten(0, -2), target.flatten())


def recurrent(
    seed: int,
    arm: LogitChange,
    *,
    kind: str,
    task: str,
    rows: int = 2000,
    batch: int = 16,
    lr: float = 2e-3,
    decay: float = 0.01,
    beta2: float = 0.999,
    dropout: float = 0.0,
    clip: float | None = 1.0,
    total: int = 0,
) -> CheckedTraining:
    """``task``: "text" (next byte), "topics" (which part of the manual), "count" (of two tokens, mod 6)."""
    torch.manual_seed(seed)
    length = 12
    if task == "count":
        x = torch.randint(0, 12, (rows, length))
        y = ((x == 3).sum(1) + 2 * (x == 7).sum(1)) % 6
        outputs = 6
    else:
        x, y = data.text_windows(rows, length, seed=seed)
        outputs = 128
        if task == "topics":
            y, outputs = (x.sum(1) // 7) % 5, 5
    model = Recurrent(kind, 128, 32, outputs, everywhere=task == "text", dropout=dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, beta2), weight_decay=decay)
    return CheckedTraining(
        model,
        optimizer,
        flat_cross_entropy,
        epochs(x, y, size=batch, seed=seed),
        scheduled(optimizer, cosine(total, 100) if total else None),
        arm,
        part=(x[:128], y[:128]),
        check_every=20,
        before_update=None if clip is None else clipped(clip),
    )
