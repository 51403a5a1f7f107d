"""No interference, over the product of precisions, ways to train and optimizers.

A cell is one training, done twice from the same seed, with and without the monitor: weights, buffers,
optimizer states, the gradient scaler and all random states must be equal to the last bit.  All cells are
slow; the fast form takes a subset in which every two values of different axes meet at least once.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nfi_monitor import Monitor
from nfi_monitor.engine.loop import StepLoop
from tests.runs import differences
from tests.safety.table import Shown

TOKENS, WIDTH, ROWS = 11, 16, 6


class Net(nn.Module):
    """Tokens in, one row of logits per token; dropout, so that a random number too many would show."""

    def __init__(self, checkpointed: bool | None, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, TOKENS, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
        self.checkpointed = checkpointed  # reentrant, not, or (None) no checkpointing

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        if self.checkpointed is None:
            return self.head(self.block(hidden))
        # The head is inside: its forward runs twice.
        return checkpoint(lambda h: self.head(self.block(h)), hidden, use_reentrant=self.checkpointed)


def adamw(**options: Any) -> Callable[[nn.Module], list[torch.optim.Optimizer]]:
    return lambda model: [torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), **options)]


def muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """As Muon is meant: hidden matrices with it, the rest with AdamW."""
    hidden = [p for p in model.block.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not one for one in hidden)]
    return [torch.optim.Muon(hidden, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95))]


PRECISIONS = ("float32", "bf16 autocast", "fp16 autocast and scaler")
WAYS = ("plain", "accumulation", "checkpointing, reentrant", "checkpointing", "compile", "tied head")
OPTIMIZERS: dict[str, Callable[[nn.Module], list[torch.optim.Optimizer]]] = {
    "AdamW": adamw(),
    "AdamW foreach": adamw(foreach=True),
    "AdamW fused": adamw(fused=True),
    "Adam amsgrad": lambda model: [torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True)],
    "SGD": lambda model: [torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9)],
    "Adafactor": lambda model: [torch.optim.Adafactor(model.parameters(), lr=1e-2)],
    "Muon and AdamW": muon,
}


class Cell(NamedTuple):
    precision: str
    way: str
    optimizer: str

    def __str__(self) -> str:
        return ", ".join(self)


CELLS = [Cell(*values) for values in itertools.product(PRECISIONS, WAYS, OPTIMIZERS)]


def pairwise(cells: Sequence[Cell]) -> list[Cell]:
    """A subset in which every pair of values of two axes occurs: greedy, and the same each time."""

    def pairs(cell: Cell) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(enumerate(cell), 2))

    missing = set().union(*map(pairs, cells))
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(pairs(cell) & missing))  # the first of the best
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def train(cell: Cell, steps: int, backend: str, monitored: bool) -> dict[str, Any]:
    """One training of the cell; what it may change at all."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    torch._dynamo.reset()
    checkpointed = {"checkpointing, reentrant": True, "checkpointing": False}.get(cell.way)
    bare = Net(checkpointed, cell.way == "tied head")
    model = torch.compile(bare, backend=backend) if cell.way == "compile" else bare
    optimizers = OPTIMIZERS[cell.optimizer](bare)
    half = {"bf16 autocast": torch.bfloat16, "fp16 autocast and scaler": torch.float16}.get(cell.precision)
    # So large that the first steps are skipped.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, enabled=half is torch.float16)
    monitor = Monitor(model, optimizers, console=False, every=1) if monitored else None
    parts = 3 if cell.way == "accumulation" else 1
    data = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for _ in range(parts):
            tokens = torch.randint(0, TOKENS, (ROWS, 4), generator=data)
            with torch.autocast("cpu", half) if half is not None else contextlib.nullcontext():
                logits = model(tokens)
                loss = F.cross_entropy(logits.flatten(0, 1), (tokens.flatten() * 3 + 1) % TOKENS) / parts
            if monitor is not None:
                monitor.observe_loss(loss)
            scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    if monitor is not None:
        assert len(monitor.history["gradient_norm"][0]), f"{cell}: nothing was read, so nothing is shown"
        assert [note for note in monitor.notes if note.code.startswith("failed")] == [], str(cell)
        monitor.close()
    return {
        "model": {name: value.clone() for name, value in bare.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "scaler": scaler.state_dict(),
        "random": [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()],
    }


def different(cell: Cell, steps: int, backend: str) -> list[str]:
    results = [train(cell, steps, backend, monitored) for monitored in (False, True)]
    return [f"{cell}: {path}" for path in differences(*results)]


quiet = pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad", "ignore:.*lr_scheduler.step", "ignore::UserWarning:torch"
)


def test_every_two_values_of_different_axes_meet_in_the_fast_subset() -> None:
    chosen = pairwise(CELLS)
    assert len(CELLS) == 3 * 6 * 7 and 6 * 7 <= len(chosen) < len(CELLS) / 2
    for a, b in itertools.combinations(range(3), 2):
        axes = (PRECISIONS, WAYS, tuple(OPTIMIZERS))
        assert {(cell[a], cell[b]) for cell in chosen} == set(itertools.product(axes[a], axes[b]))


@quiet
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_is_bitwise_equal_in_every_pair_of_modes(precision: str) -> None:
    chosen = [cell for cell in pairwise(CELLS) if cell.precision == precision]
    assert [path for cell in chosen for path in different(cell, 8, "eager")] == []


@quiet
def test_the_comparison_sees_what_a_monitor_that_draws_one_random_number_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before_step = StepLoop._before_step

    def draws(self: StepLoop, given: Any) -> None:
        torch.rand(())
        before_step(self, given)

    monkeypatch.setattr(StepLoop, "_before_step", draws)
    found = different(Cell("float32", "plain", "AdamW"), 3, "eager")
    assert any("/random/0" in path for path in found) and any("/model/" in path for path in found)


@quiet
@pytest.mark.slow
def test_training_is_bitwise_equal_in_the_whole_matrix(shown: Shown) -> None:
    wrong = [path for cell in CELLS for path in different(cell, 40, "inductor")]
    assert wrong == []
    shown("no interference", len(CELLS), "trainings, each with and without")
