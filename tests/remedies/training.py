"""What the tests of remedies train with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "betas": (0.9, 0.95), **options})
