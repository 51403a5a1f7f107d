"""Small real trainings that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[nn.Module, torch.optim.Optimizer, int], Tensor]


def mlp(inputs: int = 12, width: int = 32, classes: int = 7, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )


def batch(rows: int = 24, inputs: int = 12, classes: int = 7, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, inputs, generator=generator),
        torch.randint(0, classes, (rows,), generator=generator),
    )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    loss_of: Callable[..., Tensor] = F.cross_entropy,
) -> list[float]:
    """Full-batch training; returns the losses."""
    inputs, targets = batch()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that training may change: weights, buffers, optimizer state, random state."""
    import copy

    return {
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "rng": torch.get_rng_state(),
    }


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two nested structures are not bitwise equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [path + "/keys"] if a.keys() != b.keys() else []
        return keys + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        sizes = [path + "/len"] if len(a) != len(b) else []
        return sizes + [
            d for i, (x, y) in enumerate(zip(a, b, strict=False)) for d in differences(x, y, f"{path}/{i}")
        ]
    return [] if a == b or (a != a and b != b) else [path]


def _bits(tensor: Tensor) -> Tensor:
    """NaN equals NaN only as bits."""
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)
