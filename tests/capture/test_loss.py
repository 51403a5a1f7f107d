"""The loss that a model returns with its output, read by a hook on the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor
from nfi_monitor.capture.loss import LossProbe, loss_of
from tests.runs import batch, differences, mlp, snapshot


class Returning(nn.Module):
    """Returns what ``form`` makes of loss and logits; told ``num_items_in_batch``, the loss is a share."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.net = mlp()
        self.form = form

    def forward(self, x: Tensor, y: Tensor, num_items_in_batch: int | None = None) -> Any:
        logits = self.net(x)
        if num_items_in_batch is None:
            return self.form(F.cross_entropy(logits, y), logits)
        return self.form(F.cross_entropy(logits, y, reduction="sum") / num_items_in_batch, logits)


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "tuple": lambda loss, logits: (loss, logits),
    "tensor": lambda loss, logits: loss,
}


def train(form: str, micro_batches: int, told: bool, scale: float = 1.0) -> tuple[Monitor, list[float]]:
    """Three steps of 24 rows in unequal micro-batches: (monitor, the steps' true mean losses)."""
    model = Returning(FORMS[form])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    expected = []
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        monitor.observe_outputs(scale)
        x, y = batch()
        for _ in range(3):
            model.eval()
            expected.append(F.cross_entropy(model.net(x), y).item())
            model(x, y)  # an evaluation, gradients or not: no loss of the run's
            model.train()
            cuts = [24] if micro_batches == 1 else [16, 8]
            for part_x, part_y in zip(x.split(cuts), y.split(cuts), strict=True):
                output = model(part_x, part_y, num_items_in_batch=24 if told else None)
                loss = loss_of(output)
                assert loss is not None
                (loss if told else loss * len(part_x) / 24).backward()
            optimizer.step()
            optimizer.zero_grad()
    return monitor, expected


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_read_from_every_form_of_output_and_only_in_training(form: str) -> None:
    monitor, expected = train(form, 1, told=False)
    assert monitor.history["loss"][1] == pytest.approx(expected, rel=1e-6)


def test_shares_of_a_steps_loss_are_added_up_and_scaled() -> None:
    monitor, expected = train("dict", 2, told=True)
    assert monitor.history["loss"][1] == pytest.approx(expected, rel=1e-6)
    monitor, expected = train("dict", 2, told=True, scale=4.0)
    assert monitor.history["loss"][1] == pytest.approx([4 * loss for loss in expected], rel=1e-6)


@pytest.mark.parametrize(
    "output",
    [None, (), {}, {"loss": None}, SimpleNamespace(), torch.ones(3, requires_grad=True), torch.tensor(1.0)],
    ids=repr,
)
def test_what_is_no_loss_is_not_taken_for_one(output: Any) -> None:
    """Rows of logits, nothing, or a scalar that nothing can be learned from."""
    assert loss_of(output) is None


def plain(loss: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """A form that can be copied along with its model."""
    return {"loss": loss}


def test_a_copy_of_the_model_reports_no_loss_and_closing_leaves_no_hook() -> None:
    model = Returning(plain)
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        monitor.observe_outputs()
        monitor.observe_outputs()  # asking twice is asking once
        assert [type(hook) for hook in model._forward_hooks.values()].count(LossProbe) == 1
        loss = model(*batch())["loss"]
        averaged = copy.deepcopy(model)
        nn.init.zeros_(averaged.net[-1].weight)
        assert averaged(*batch())["loss"].item() != loss.item()
        loss.backward()
        optimizer.step()
        assert monitor.history["loss"][1].tolist() == [pytest.approx(loss.item())]
    assert len(model._forward_hooks) == 0


# --- the loss that trains ---------------------------------------------------------------------------

TrainedBy = Callable[[Any, Tensor], None]
"""Runs the backward passes of one step: (output of the model, targets)."""


def of_other_loss(output: Any, y: Tensor) -> None:
    """The model returns its loss, and the loop trains by another."""
    (100 * F.cross_entropy(output["logits"], y.flip(0))).backward()


def of_scaled(output: Any, y: Tensor) -> None:
    (output["loss"] / 4).backward()


def of_two_passes(output: Any, y: Tensor) -> None:
    (1e-3 * output["logits"].square().mean()).backward(retain_graph=True)
    output["loss"].backward()


def parameters_of(loss: Tensor) -> list[Tensor]:
    """Return the parameters behind a loss."""
    found, ahead, seen = [], [loss.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [node.variable] if hasattr(node, "variable") else []
            ahead += [following for following, _ in node.next_functions]
    return found


def of_assigned_gradients(output: Any, y: Tensor) -> None:
    """The loop asks for gradients that it differentiates once more, and assigns them."""
    params = parameters_of(output["loss"])
    gradients = torch.autograd.grad(output["loss"], params, create_graph=True)
    torch.autograd.grad(gradients, params, [torch.ones_like(one) for one in params])
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.detach()


def of_slope(output: Any, y: Tensor) -> None:
    """A derivative of the returned loss is looked at, and another loss trains."""
    torch.autograd.grad(output["loss"], output["logits"], retain_graph=True)
    F.cross_entropy(output["logits"], y.flip(0)).backward()


def trained_by(way: TrainedBy, *, told: bool = False, watched: bool = True) -> tuple[Any, list[float], Any]:
    model = Returning(FORMS["dict"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    monitor = Monitor(model, optimizer, console=False, every=1) if watched else None
    returned = []
    if monitor is not None:
        monitor.observe_outputs()
    x, y = batch()
    for _ in range(8):
        output = model(x, y)
        returned.append(output["loss"].item())
        if told and monitor is not None:
            monitor.observe_loss(42.0)
        way(output, y)
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return monitor, returned, snapshot(model, optimizer)


@pytest.mark.parametrize("way", [of_other_loss, of_slope], ids=lambda way: way.__name__)
def test_a_returned_loss_that_does_not_train_is_left_out_and_said(way: TrainedBy) -> None:
    monitor, _, trained = trained_by(way)
    assert "loss" not in monitor.history
    [note] = [note for note in monitor.notes if note.code == "loss_not_trained"]
    assert "no gradient arrives at it" in note.message and note.step <= 5
    assert not differences(trained, trained_by(way, watched=False)[2])


@pytest.mark.parametrize(
    "way", [of_scaled, of_two_passes, of_assigned_gradients], ids=lambda way: way.__name__
)
def test_a_returned_loss_that_trains_is_seen_once_a_step(way: TrainedBy) -> None:
    monitor, returned, trained = trained_by(way)
    assert monitor.history["loss"][1] == pytest.approx(returned, rel=1e-6)
    assert "loss_not_trained" not in [note.code for note in monitor.notes]
    assert not differences(trained, trained_by(way, watched=False)[2])


def test_a_loss_that_the_loop_reports_goes_before_the_returned_one() -> None:
    for way in (of_scaled, of_other_loss):
        monitor, _, _ = trained_by(way, told=True)
        assert monitor.history["loss"][1].tolist() == [42.0] * 8
        assert "loss_not_trained" not in [note.code for note in monitor.notes]
