from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

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
