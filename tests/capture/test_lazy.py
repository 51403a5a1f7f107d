"""Layers that get their size in their first forward pass have none when the monitor attaches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor


def train(model: nn.Module, monitored: bool) -> tuple[list[Tensor], Monitor | None]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer, console=False, every=1) if monitored else None
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.randn(32, 8)), torch.randint(5, (32,)))
        loss.backward()
        optimizer.step()
    if monitor is not None:
        monitor.close()
    return [param.detach().clone() for param in model.parameters()], monitor


@pytest.mark.parametrize("lazy", ["body", "head", "both"])
def test_lazy_layers_are_watched_from_their_first_step(lazy: str) -> None:
    def model() -> nn.Module:
        body = nn.Linear(8, 16) if lazy == "head" else nn.LazyLinear(16)
        return nn.Sequential(body, nn.ReLU(), nn.Linear(16, 5) if lazy == "body" else nn.LazyLinear(5))

    torch.manual_seed(1)
    bare, _ = train(model(), monitored=False)
    torch.manual_seed(1)
    watched, monitor = train(model(), monitored=True)
    assert all(torch.equal(one, other) for one, other in zip(bare, watched, strict=True))
    assert monitor is not None and not monitor.notes
    for name in ("gradient_norm", "margin_median", "classifier_mean_norm", "logit_displacement"):
        assert len(monitor.history[name][0]) == 8, name
