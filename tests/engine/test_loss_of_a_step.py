from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor


@pytest.mark.parametrize("given", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("losses", [[0.25], [1.0, 2.0, 4.5], [3.0, math.nan, 5.0], [math.nan]])
def test_the_loss_of_a_step_is_the_mean_of_its_micro_batches(
    losses: list[float], given: Callable[[float], Any]
) -> None:
    """Those that are finite, if any is."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for loss in losses:
            model(torch.ones(1, 3)).sum().backward()
            monitor.observe_loss(given(loss))
        optimizer.step()
    finite = [loss for loss in losses if math.isfinite(loss)]
    expected = math.fsum(finite) / len(finite) if finite else math.nan
    assert monitor.history.last("loss") == pytest.approx(expected, rel=1e-6, nan_ok=True)


def accumulate(
    report: Callable[[Monitor, Tensor], None], loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Monitor:
    """Train 8 steps of 4 micro-batches, each loss divided by 4 before its backward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(8):
            for _ in range(4):
                loss = loss_of(model(torch.randn(12, 6)), torch.randint(0, 5, (12,))) / 4
                loss.backward()
                report(monitor, loss)
            optimizer.step()
            optimizer.zero_grad()
    return monitor


def test_losses_that_are_reported_divided_by_their_number_are_said() -> None:
    monitor = accumulate(Monitor.observe_loss, F.cross_entropy)
    [note] = [note for note in monitor.notes if note.code == "loss_divided"]
    assert "4 losses" in note.message and "observe_loss(loss * 4)" in note.message
    assert monitor.history.last("head_loss") == pytest.approx(4 * monitor.history.last("loss"), rel=1e-5)


@pytest.mark.parametrize(
    ("report", "loss_of"),
    [
        (lambda monitor, loss: monitor.observe_loss(4 * loss), F.cross_entropy),
        (lambda monitor, loss: monitor.observe_loss(float(loss) * 4), F.cross_entropy),
        (Monitor.observe_loss, lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2)),
    ],
    ids=["multiplied", "a number", "another loss"],
)
def test_other_losses_of_micro_batches_are_not_called_divided(
    report: Callable[[Monitor, Tensor], None], loss_of: Callable[[Tensor, Tensor], Tensor]
) -> None:
    assert "loss_divided" not in {note.code for note in accumulate(report, loss_of).notes}
