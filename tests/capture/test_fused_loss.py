"""Rows of ``nn.LinearCrossEntropyLoss``, whose head is a layer of the loss that is never called."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor
from tests.runs import batch, differences, snapshot

pytestmark = pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch has no LinearCrossEntropyLoss"
)
K = 7


class Model(nn.Module):
    """``chunked``: by torch's memory-saving operation; None: with logits, by the layer in the same place."""

    def __init__(self, chunked: bool | None, ignore_index: int = -100) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, 32), nn.ReLU())
        options = nn.LinearCrossEntropyOptions() if chunked else None
        self.loss = nn.LinearCrossEntropyLoss(32, K, bias=True, options=options, ignore_index=ignore_index)
        self.called = chunked is None

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = self.body(inputs)
        if self.called:
            return F.cross_entropy(self.loss.linear(hidden), targets, ignore_index=self.loss.ignore_index)
        found: Tensor = self.loss(hidden, targets)
        return found


def train(model: Model, *, watched: bool = True, tapped: bool = False) -> tuple[Any, dict[str, Any]]:
    """Six steps with many absorbed rows; one row in four does not count."""
    inputs, targets = batch()
    with torch.no_grad():
        model.loss.linear.weight.mul_(200.0)
        nearest = model.loss.linear(model.body(inputs)).argmax(1)
        targets = torch.where(torch.arange(24) % 3 > 0, nearest, targets)
        targets[::4] = model.loss.ignore_index
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer, console=False, every=1) if watched else None
    if monitor is not None and tapped:
        model.body.register_forward_hook(lambda module, args, hidden: monitor.tap_features(hidden, targets))
    for _ in range(6):
        model(inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return monitor, snapshot(model, optimizer)


@pytest.mark.parametrize("tapped", [False, True], ids=["", "tapped by the user too"])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("chunked", [True, False])
def test_rows_of_a_loss_with_a_head_of_its_own_are_those_with_logits(
    chunked: bool, ignore_index: int, tapped: bool
) -> None:
    if tapped and ignore_index >= 0:
        pytest.skip("the user's tap knows no ignored class")
    expected, _ = train(Model(None, ignore_index))
    monitor, trained = train(Model(chunked, ignore_index), tapped=tapped)
    assert not differences(trained, train(Model(chunked, ignore_index), watched=False)[1])
    assert monitor.history["recomputed_fraction"][1].tolist() == [1.0] * 6
    assert max(expected.history["absorbed_fraction"][1]) > 0.3
    for name in ("absorbed_fraction", "live_fraction", "zero_sum_violation", "head_loss", "margin_median"):
        assert monitor.history[name][1] == pytest.approx(expected.history[name][1], rel=1e-4, abs=1e-6), name
    assert "head_never_fired" not in {note.code for note in monitor.notes}


def functional(chunked: bool) -> Any:
    """A loop with ``F.linear_cross_entropy``, which taps its features and reports its loss."""
    model = Model(None)
    inputs, targets = batch()
    with torch.no_grad():
        model.loss.linear.weight.mul_(200.0)
        targets = model.loss.linear(model.body(inputs)).argmax(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(6):
            hidden, linear = monitor.tap_features(model.body(inputs), targets), model.loss.linear
            options = nn.LinearCrossEntropyOptions() if chunked else None
            loss = F.linear_cross_entropy(
                hidden, linear.weight, targets, linear_bias=linear.bias, options=options
            )
            loss.backward()
            monitor.observe_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
    return monitor


def test_absorbed_rows_that_the_loss_in_chunks_rounds_away_are_counted() -> None:
    expected, monitor = functional(False).history, functional(True).history
    assert max(expected["absorbed_fraction"][1]) > 0.3
    for name in ("absorbed_fraction", "live_fraction"):  # the first loss is reported after its rows
        assert monitor[name][1][1:] == pytest.approx(expected[name][1][1:], rel=1e-4), name


def test_other_losses_than_a_plain_cross_entropy_are_refused_with_a_note() -> None:
    model = Model(True)
    model.loss.label_smoothing = 0.3
    monitor, _ = train(model)
    assert "absorbed_fraction" not in monitor.history
    assert "head_never_fired" in {note.code for note in monitor.notes}


def test_a_copy_and_a_saved_model_hold_no_hook() -> None:
    model = Model(True)
    with Monitor(model, torch.optim.AdamW(model.parameters()), console=False):
        assert all(type(hook).__module__ != "nfi_monitor.capture.fused_loss"
                   for hook in copy.deepcopy(model).loss._forward_hooks.values())  # fmt: skip
        torch.save(model, file := io.BytesIO())
    assert not model.loss._forward_hooks
    file.seek(0)
    assert not torch.load(file, weights_only=False).loss._forward_hooks
