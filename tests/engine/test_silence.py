"""What does not arrive is noticed without a reading, said once and truly, and costs no memory."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nfi_monitor import Monitor
from nfi_monitor.engine import silence
from nfi_monitor.engine.loss_queue import MOST, LossQueue
from nfi_monitor.engine.silence import CHANGED, DROPPED, PASSES
from nfi_monitor.types import Thresholds
from tests import own_optimizers as own
from tests.runs import batch, mlp


def backward(model: nn.Module, monitor: Monitor | None = None) -> torch.Tensor:
    inputs, targets = batch()
    loss = F.cross_entropy(model(inputs), targets)
    if monitor is not None:
        monitor.observe_loss(loss)
    loss.backward()
    return loss


def codes(monitor: Monitor) -> list[str]:
    return [note.code for note in monitor.notes]


def said(monitor: Monitor, code: str = "no_steps") -> str:
    return next(note.message for note in monitor.notes if note.code == code)


@pytest.mark.parametrize("reported", [False, True])
@pytest.mark.parametrize("before", [0, 5])
def test_an_optimizer_made_anew_is_said_after_a_few_passes(reported: bool, before: int) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    monitor = Monitor(model, optimizer, console=False)
    for _ in range(before):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    another = torch.optim.AdamW(model.parameters())
    for _ in range(CHANGED + 4):
        another.zero_grad()
        backward(model, monitor if reported else None)
        another.step()
    assert codes(monitor) == ["no_steps"]
    assert "another optimizer updates them" in said(monitor)
    assert ("5 were seen before" if before else "none was seen before") in said(monitor)
    assert monitor.step == before
    monitor.close()


def test_updates_inside_of_the_backward_pass_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As LOMO's: no gradient is ever left, and ``.data`` changes no version.  On an accelerator, values are
    not known."""
    monkeypatch.setattr(silence, "_sample", lambda weight: 0.0)
    model = mlp()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), 0.1), console=False)
    for _ in range(DROPPED + 4):
        backward(model)
        for param in model.parameters():
            param.data.add_(param.grad, alpha=-0.1)
            param.grad = None
    assert codes(monitor) == ["no_steps"] and "inside the backward pass" in said(monitor)
    monitor.close()


def test_updates_of_data_are_said_where_gradients_stay() -> None:
    model = mlp()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), 0.1), console=False)
    for _ in range(CHANGED + 4):
        model.zero_grad(set_to_none=False)
        backward(model)
        for param in model.parameters():
            param.data.add_(param.grad, alpha=-0.1)
    assert codes(monitor) == ["no_steps"] and "The weights change all the same" in said(monitor)
    monitor.close()


def test_a_run_without_any_step_hears_of_it_at_its_end() -> None:
    model = mlp()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), 0.1), console=False)
    for _ in range(20):
        monitor.observe_loss(1.0)
    assert codes(monitor) == []
    monitor.close()
    assert codes(monitor) == ["no_steps"] and "20 losses" in said(monitor)


@pytest.mark.parametrize("broken", ["_count_pass", "_look"])
def test_an_error_in_counting_costs_nothing_else(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr(silence.Silence, broken, fail)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    monitor = Monitor(model, optimizer, console=False, every=1)
    for _ in range(5):
        for _ in range(silence.LOOKS):
            backward(model, monitor)
        optimizer.step()
        optimizer.zero_grad()
    assert codes(monitor) == ["failed_silence"] and monitor.step == 5
    assert all(len(monitor.history[name][0]) == 5 for name in ("loss", "rms_t_max", "zero_sum_violation"))
    monitor.close()


def test_hooks_that_were_cleared_are_said() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model, optimizer, console=False)
    optimizer._optimizer_step_pre_hooks.clear()
    optimizer._optimizer_step_post_hooks.clear()
    for _ in range(CHANGED + 4):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    assert codes(monitor) == ["no_steps"] and "hooks were removed" in said(monitor)
    monitor.close()


def test_a_head_that_is_replaced_is_said_and_nothing_else_of_it() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    monitor = Monitor(model, optimizer, console=False, every=1)
    for step in range(20):
        if step == 8:
            model[4] = copy.deepcopy(model[4])
            optimizer.add_param_group({"params": model[4].parameters()})
        backward(model, monitor)
        optimizer.step()
        optimizer.zero_grad()
    assert (
        codes(monitor) == ["head_replaced"] and "is no longer a part of the model" in monitor.notes[0].message
    )
    monitor.close()


def test_a_head_whose_hooks_were_cleared_is_said() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    monitor = Monitor(model, optimizer, console=False, every=100)
    model[4]._forward_hooks.clear()
    for _ in range(10):
        backward(model, monitor)
        optimizer.step()
        optimizer.zero_grad()
    assert codes(monitor) == ["head_replaced"] and "has lost the monitor's hook" in monitor.notes[0].message
    monitor.close()


class TwoSteps(torch.optim.Optimizer):
    """SAM with two steps of its own; ``step`` of the optimizer inside is the one that is called."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([{"params": group["params"]} for group in inner.param_groups], {})
        self.base_optimizer = inner

    @torch.no_grad()
    def first(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(param.grad, alpha=0.05)
                self.state[param]["old"] = param.grad
                param.grad = None

    @torch.no_grad()
    def second(self) -> None:
        for param, state in self.state.items():
            param.sub_(state["old"], alpha=0.05)
        self.base_optimizer.step()
        self.base_optimizer.zero_grad()


def test_two_steps_of_sam_are_one_step_of_the_optimizer_inside() -> None:
    model = mlp()
    optimizer = TwoSteps(torch.optim.AdamW(model.parameters()))
    monitor = Monitor(model, optimizer, console=False, every=1)
    for _ in range(30):
        backward(model, monitor)
        optimizer.first()
        backward(model, monitor)
        optimizer.second()
    assert monitor.step == 30 and codes(monitor) == [] and len(monitor.history["rms_t_max"][0]) == 30
    monitor.close()


@pytest.mark.parametrize("zero", ["set_to_none", "zeros"])
def test_gradients_of_many_passes_may_be_added_up(zero: str) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    monitor = Monitor(model, optimizer, console=False)
    for passed in range(3 * 100):
        backward(model, monitor)
        if passed % 100 == 99:
            optimizer.step()
            optimizer.zero_grad(set_to_none=zero == "set_to_none")
    assert monitor.step == 3 and codes(monitor) == []
    monitor.close()


def test_losses_without_any_step_are_said_and_do_not_pile_up() -> None:
    model = mlp()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), 0.1), console=False)
    for told in range(PASSES):
        assert codes(monitor) == [], told
        monitor.observe_loss(torch.tensor(1.0))
    assert codes(monitor) == ["no_steps"] and f"{PASSES} losses" in said(monitor)
    assert len(monitor._loop.losses.observed) <= MOST
    monitor.close()


def test_many_passes_inside_of_a_step_and_a_head_that_runs_often_are_ordinary() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn="strong_wolfe")
    monitor = Monitor(model, optimizer, console=False)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return backward(model, monitor)

    for _ in range(3):
        optimizer.step(closure)
    assert monitor.step == 3 and "no_steps" not in codes(monitor)
    monitor.close()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model, optimizer, console=False)
    inputs, targets = batch()
    for _ in range(2):  # a recurrent model: the head runs once a position
        sum(F.cross_entropy(model(inputs), targets) for _ in range(PASSES)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for _ in range(2 * PASSES):
            model(inputs)
    assert codes(monitor) == []
    monitor.close()


def test_a_step_that_calls_the_step_of_its_base_class_counts_once() -> None:
    class Nested(own.Own):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    own.Own(mlp().parameters())  # torch hooks step() of a class when its first object is made
    model = mlp()
    optimizer = Nested(model.parameters())
    monitor = Monitor(model, optimizer, console=False, every=1)
    for _ in range(10):
        backward(model, monitor)
        optimizer.step()
        optimizer.zero_grad()
    assert monitor.step == 10 and len(monitor.history["rms_t_max"][0]) >= 9
    assert len(monitor.history["loss"][0]) == 10
    monitor.close()


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("kind", ["tensors", "numbers", "numbers among tensors", "with NaN"])
def test_the_mean_of_very_many_losses_is_that_of_all(kind: str, share: float | None) -> None:
    count = 3 * MOST + 5
    values = [0.01 * at for at in range(count)]
    if kind == "with NaN":
        values[7] = values[300] = math.nan
    given: list[Any] = [torch.tensor(value, dtype=torch.float64) for value in values]
    if kind == "numbers":
        given = values
    if kind == "numbers among tensors":
        for at in (3, 400):
            given[at] = values[at]
    long = LossQueue(lambda step, loss: False, Thresholds())
    short = LossQueue(lambda step, loss: False, Thresholds())
    long.share = short.share = share
    for loss in given:
        long.observe(loss)
        short.observed.append(loss)
    assert len(long.observed) <= MOST
    assert float(long.mean()) == pytest.approx(float(short.mean()), rel=1e-12)
    long.forget()
    assert long.mean() is None


@pytest.mark.parametrize("before", [0, 5])
def test_steps_that_begin_and_do_not_end_are_said(before: int) -> None:
    """Something has removed the hook after the step alone, or each step raises."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    monitor = Monitor(model, optimizer, console=False)
    for step in range(before + CHANGED + 2):
        if step == before:
            optimizer._optimizer_step_post_hooks.clear()
        backward(model, monitor)
        optimizer.step()
        optimizer.zero_grad()
    assert codes(monitor) == ["no_steps"] and "have begun and not ended" in said(monitor)
    assert monitor.step == before
    monitor.close()
