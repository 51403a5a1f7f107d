"""The optimizer is found inside wrappers."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from nfi_monitor.capture.head import find_head
from nfi_monitor.capture.unwrap import choose, unwrap
from tests.runs import mlp


class Wrapper:
    """Like accelerate's optimizer: delegates, and its own hooks never fire."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_wrapped_optimizers_are_looked_through() -> None:
    inner = torch.optim.SGD(mlp().parameters(), 0.1)
    assert unwrap(Wrapper(Wrapper(inner))) is inner


def adam() -> torch.optim.Optimizer:
    return torch.optim.Adam(mlp().parameters())


class Named:
    """Keeps its optimizer under any name, behind a property that raises."""

    def __init__(self, name: str, inner: Any) -> None:
        vars(self)[name] = inner

    @property
    def optimizer(self) -> Any:
        raise RuntimeError("not ready")


class Projected(torch.optim.Optimizer):
    """Itself an optimizer, as SAM, OrthoGrad and Lookahead are."""

    def __init__(self, inner: torch.optim.Optimizer, name: str = "base_optimizer") -> None:
        super().__init__([{"params": group["params"]} for group in inner.param_groups], {})
        vars(self)[name] = inner

    def step(self, closure: Any = None) -> Any: ...


@pytest.mark.parametrize(
    "name", ["base_optimizer", "_optimizer", "optim", "opt", "base", "wrapped_optimizer", "anything"]
)
def test_wrappers_may_use_any_name(name: str) -> None:
    inner = adam()
    assert unwrap(Named(name, inner)) is inner
    assert unwrap(Projected(inner, name)) is inner
    assert unwrap(Projected(Projected(inner, name), name)) is inner


def test_an_optimizer_that_uses_another_for_some_of_its_parameters_is_watched_itself() -> None:
    outer = Projected(adam())
    outer.base_optimizer = torch.optim.SGD([outer.param_groups[0]["params"][0]], 0.1)
    assert unwrap(outer) is outer


def test_a_circle_or_an_endless_chain_of_wrappers_ends() -> None:
    first, second = Wrapper(None), Wrapper(None)
    first.optimizer, second.optimizer = second, first
    with pytest.raises(TypeError, match="got Wrapper, with none inside"):
        unwrap(first)
    inner = adam()
    inner.optimizer = inner  # type: ignore[attr-defined]
    assert unwrap(inner) is inner
    outer = Projected(inner)
    vars(inner)["optimizer"] = outer
    assert unwrap(outer) is inner
    with pytest.raises(TypeError, match="got MagicMock"):
        unwrap(MagicMock())


def test_of_a_container_the_optimizer_that_trains_the_head_is_chosen() -> None:
    model = mlp()
    body, last = torch.optim.Adam(model[:4].parameters()), torch.optim.SGD(model[4].parameters(), 0.1)
    head = find_head(model)
    for container in (Named("optimizers", [body, last]), Named("parts", {"body": body, "head": last})):
        assert choose(container, head) is last
        assert choose(container, None) is body


class Slots:
    __slots__ = ("params",)

    def __init__(self, params: Any) -> None:
        self.params = list(params)

    def step(self) -> None:
        for param in self.params:
            param.data -= 0.1 * param.grad


def test_why_an_optimizer_with_slots_cannot_be_watched_is_said_and_a_derived_class_can() -> None:
    with pytest.raises(TypeError, match=r"Slots cannot be watched.*__slots__.*class Watched\(Slots\): pass"):
        choose(Slots(mlp().parameters()), None)

    class Watched(Slots):
        pass

    assert choose(Watched(mlp().parameters()), None).param_groups[0]["params"]


def test_something_that_is_no_optimizer_is_named() -> None:
    with pytest.raises(TypeError, match="got Linear"):
        unwrap(nn.Linear(1, 1))
