"""Gradients that are discarded before the step are none of the step's, and one odd look decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nfi_monitor import Monitor
from tests.runs import batch, mlp

X, Y = batch(24)


def loss_of(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(X), Y)


def history(
    trial: Callable[[nn.Module, torch.optim.Optimizer], None], steps: int, at: set[int], **options: Any
) -> tuple[dict[str, list[float]], Monitor]:
    """Train; before the forward pass of each step in ``at`` (counted from 1) call ``trial``."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    monitor = Monitor(model, optimizer, console=False, every=1, overhead_budget=None, **options)
    for step in range(1, steps + 1):
        if step in at:
            trial(model, optimizer)
        loss = loss_of(model)
        monitor.observe_loss(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    return {name: monitor.history[name][1].tolist() for name in monitor.history}, monitor


def other_loss(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A gradient that breaks the zero-sum and is that of no cross-entropy."""
    model(X).pow(2).sum().backward()
    optimizer.zero_grad()


@pytest.mark.parametrize("at", [{1}, {2, 5}, {9}, set(range(1, 11))], ids=str)
def test_a_pass_whose_gradients_are_zeroed_leaves_no_trace_in_the_readings(at: set[int]) -> None:
    with_it, monitor = history(other_loss, 10, at)
    assert not monitor.notes
    assert with_it == history(other_loss, 10, set())[0]


def test_gradients_that_are_zeroed_after_the_forward_pass_are_discarded_too() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(6):
            model(X).pow(2).sum().backward()
            loss = loss_of(model)
            optimizer.zero_grad()
            monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()
    assert not monitor.notes and monitor.history["zero_sum_violation"][1].max() < 1e-6


def test_micro_batches_and_a_head_that_is_computed_anew_lose_no_row() -> None:
    class Chunked(nn.Module):
        """The head runs inside of checkpoints, once more in the backward pass."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(12, 8), nn.Linear(8, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = self.body(x).chunk(3)
            return torch.cat([checkpoint(self.head, part, use_reentrant=False) for part in parts])

    model = Chunked()
    optimizer = torch.optim.AdamW(model.parameters())
    # Of the targets a third is ignored in each micro-batch: rows that are lost would change the share.
    targets = Y % 7
    with Monitor(model, optimizer, head=model.head, console=False, every=1) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            for part in (range(12), range(12, 24)):
                ignored = torch.where(torch.tensor(part) < 8, -100, targets[list(part)])
                F.cross_entropy(model(X[list(part)]), ignored).backward()
            optimizer.step()
    assert monitor.history["live_fraction"][1].tolist() == [pytest.approx(16 / 24)] * 4


def test_one_odd_step_does_not_decide_what_later_rows_are_held_against() -> None:
    """The kind of loss is checked in step 64 and then in step 128."""

    def policy(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        (model(X).log_softmax(-1).gather(1, Y[:, None])[:, 0] * torch.randn(24)).sum().backward()

    readings, monitor = history(policy, 72, {64})
    assert not {"absorption_left_out", "not_cross_entropy"} & {note.code for note in monitor.notes}
    steps = monitor.history["mismatch_fraction"][0].tolist()
    assert steps in ([], [64]), "the odd step itself"
    assert len(readings["absorbed_fraction"]) == 72 - len(steps)


def test_a_loss_that_is_no_cross_entropy_is_said_within_ten_readings() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(10):
            optimizer.zero_grad()
            rows = F.cross_entropy(model(X), Y, reduction="none")
            loss = (rows * torch.linspace(-1, 1, 24)).sum()
            monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()
    assert "absorption_left_out" in {note.code for note in monitor.notes}
