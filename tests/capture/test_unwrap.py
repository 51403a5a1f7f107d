"""The optimizer is found inside wrappers; an old import of what finds it still works."""

from __future__ import annotations

import importlib
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


@pytest.mark.parametrize("name", ["unwrap", "choose", "SECOND_MOMENTS"])
def test_names_that_left_the_optimizers_reader_are_found_there_with_a_warning(name: str) -> None:
    old = importlib.import_module("nfi_monitor.capture.optimizer")
    with pytest.warns(DeprecationWarning, match=f"import {name}") as warned:
        found = getattr(old, name)
    assert warned[0].filename == __file__
    assert found is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        old.nothing  # noqa: B018
