"""The optimizer is found inside wrappers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nfi_monitor.capture.unwrap import unwrap
from tests.runs import mlp


class Wrapper:
    """Like accelerate's optimizer: delegates, and its own hooks never fire."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_wrapped_optimizers_are_looked_through() -> None:
    inner = torch.optim.SGD(mlp().parameters(), 0.1)
    assert unwrap(Wrapper(Wrapper(inner))) is inner


def test_something_that_is_no_optimizer_is_named() -> None:
    with pytest.raises(TypeError, match="got Linear"):
        unwrap(nn.Linear(1, 1))
