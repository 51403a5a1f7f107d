"""Hooks that go while torch iterates over them must not raise into the step that runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nfi_monitor import Monitor, Thresholds
from nfi_monitor.capture.step_hooks import StepHooks
from tests.runs import batch, mlp

SOON = Thresholds(absorbing_enter=1e-9, absorbing_exit=1e-10)
"""Any rounding at all counts as absorption: *at risk* fires within the first steps of any training."""


def hooks_on(optimizer: torch.optim.Optimizer) -> list[int]:
    return [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]


def forget(*_: Any) -> None:
    return None


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(mlp().parameters(), 0.1)


def test_a_callback_that_closes_the_monitor_does_not_stop_an_optimizer_with_other_hooks() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, betas=(0.9, 0.95))
    inputs, targets = batch()
    heard: list[int] = []

    def stop(_: Any) -> None:
        heard.append(monitor.step)
        monitor.close()

    monitor = Monitor(model, optimizer, console=False, every=1, thresholds=SOON, on_alert=stop)
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(len(steps)))
    for _ in range(10):
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert monitor.closed and len(heard) == 1 and heard[0] < 10
    assert len(steps) == 10, "the other hook missed a step"
    assert hooks_on(optimizer) == [0, 1]
    assert not [note for note in monitor.notes if note.code.startswith("failed")]


@pytest.mark.parametrize("inside", ["before", "after"])
@pytest.mark.parametrize("others", ["none", "earlier", "later", "both"])
def test_hooks_removed_from_inside_are_never_called_again(
    inside: str, others: str, optimizer: torch.optim.Optimizer
) -> None:
    calls: list[str] = []
    other: list[str] = []

    def neighbours() -> None:
        optimizer.register_step_pre_hook(lambda *_: other.append("pre"))
        optimizer.register_step_post_hook(lambda *_: other.append("post"))

    def called(name: str) -> Callable[..., None]:
        def call(*_: Any) -> None:
            calls.append(name)
            if name == inside:
                hooks.remove()

        return call

    if others in ("earlier", "both"):
        neighbours()
    hooks = StepHooks(optimizer, called("before"), called("after"), forget)
    hooks.install()
    if others in ("later", "both"):
        neighbours()
    for _ in range(3):
        optimizer.step()
    assert calls == (["before"] if inside == "before" else ["before", "after"])
    pairs = {"none": 0, "both": 2}.get(others, 1)
    assert len(other) == 6 * pairs
    left = [found - pairs for found in hooks_on(optimizer)]
    # Beside a later hook the one of the two that never is the last may stay, and does nothing.
    assert left == [0, 0] if others in ("none", "earlier") else sum(left) <= 1


def test_hooks_that_serve_another_stay_where_they_are(optimizer: torch.optim.Optimizer) -> None:
    calls: list[str] = []

    def after() -> None:
        calls.append("first")
        hooks.serve(forget, lambda: calls.append("second"), forget)

    hooks = StepHooks(optimizer, forget, after, forget)
    hooks.install()
    optimizer.register_step_post_hook(forget)
    for _ in range(3):
        optimizer.step()
    assert calls == ["first", "second", "second"]
    hooks.remove()
    optimizer.step()
    assert len(calls) == 3 and hooks_on(optimizer) == [0, 1]


def test_an_error_in_what_the_hooks_call_is_handed_on_and_does_not_reach_the_step(
    optimizer: torch.optim.Optimizer,
) -> None:
    failed: list[str] = []

    def broken(*_: Any) -> None:
        raise ArithmeticError("broken on purpose")

    StepHooks(optimizer, broken, broken, lambda part, error: failed.append(f"{part}: {error}")).install()
    optimizer.step()
    assert failed == ["step: broken on purpose"] * 2
