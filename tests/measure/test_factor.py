"""A constant factor on the loss (accumulation, loss scaling, a weighted task) changes nothing about rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor
from nfi_monitor.measure.rows import MASKS, SUMS, finish, row_statistics
from tests.runs import batch, mlp

ROWS = 64
FACTORS = [2.0, 1 / 8, 1 / 3, 3.0, 65536.0, 1e-3, 1e3]
MARGINS = torch.tensor([0.0, 1.0, 4.0, 9.0, 15.0, 17.0, 30.0, 60.0])


def scene(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(ROWS, 6)
    target = torch.randint(6, (ROWS,))
    logits[torch.arange(ROWS), target] += MARGINS.repeat(ROWS // len(MARGINS))
    target[:: len(MARGINS)] = -100  # rows with a margin near 0
    return logits.to(dtype), target


def found(factor: float, dtype: torch.dtype, passes: int = 2) -> dict[str, float]:
    """The second pass knows the scale of the gradients."""
    logits, target = scene(dtype)
    logits.requires_grad_()
    loss = F.cross_entropy(logits, target)
    (grad,) = torch.autograd.grad(factor * loss, logits)
    kind, statistics = None, None
    for _ in range(passes):
        statistics = row_statistics(grad, logits.detach(), ROWS, kind)
        kind = statistics.loss_kind
    assert statistics is not None
    sums = dict(zip(SUMS, statistics.sums.tolist(), strict=True))
    values = finish(statistics.sums.tolist(), statistics.maxima.tolist(), single_output=False)
    return values | {name: sums[name] for name in (*MASKS, "soft", "unexplained", "contradicted", "unsure")}


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_factor_changes_neither_masks_nor_violations_nor_margins(factor: float, dtype: torch.dtype) -> None:
    one, other = found(1.0, dtype), found(factor, dtype)
    for name in (*MASKS, "soft", "unexplained", "contradicted", "unsure"):
        assert other[name] == one[name], name
    for name in ("zero_sum_violation", "head_loss", "margin_median", "margin_min", "residual_mass"):
        assert other[name] == pytest.approx(one[name], rel=1e-2, abs=4 * torch.finfo(dtype).eps), name


def test_a_row_that_underflows_because_of_accumulation_is_not_called_ignored() -> None:
    logits, target = scene(torch.float32)
    for factor in (1.0, 2.0**-6):
        logits.requires_grad_(True)
        (grad,) = torch.autograd.grad(factor * F.cross_entropy(logits, target), logits)
        logits = logits.detach()
        grad = grad.half().float()  # smallest number 6e-8
        kind = row_statistics(grad, logits, ROWS).loss_kind
        statistics = row_statistics(grad, logits, ROWS, kind)
        sums = dict(zip(SUMS, statistics.sums.tolist(), strict=True))
        ignored = len(target[target < 0])
        assert sums["silent"] - sums["underflowed"] == ignored, factor
        assert sums["underflowed"] > ROWS / 4


Backward = Callable[[Tensor, Tensor], Any]
"""Runs the backward pass of a step: (loss, logits)."""


def doubled_with_penalty(loss: Tensor, logits: Tensor) -> None:
    weight = next(iter(logits.grad_fn.next_functions))[0].variable  # type: ignore[union-attr]
    (2 * loss + 1e-3 * weight.square().sum()).backward()


BACKWARDS: dict[str, Backward] = {
    "doubled, with a penalty on a weight": doubled_with_penalty,
    "a part of an accumulation": lambda loss, logits: (loss / 16).backward(),
    "scaled": lambda loss, logits: (loss * 65536).backward(),
    "weighted beside another task": lambda loss, logits: (0.3 * loss + 0.0 * logits.sum()).backward(),
    "in two passes": lambda loss, logits: (
        (0.5 * loss).backward(retain_graph=True),
        (0.5 * loss).backward(),
    ),
}


@pytest.mark.parametrize("backward", BACKWARDS.values(), ids=BACKWARDS.keys())
def test_rows_and_loss_of_a_run_whose_loss_has_a_factor(backward: Backward) -> None:
    """The weights stay the same, so the readings must be the same."""

    def watched(backward: Backward) -> Monitor:
        model = mlp()
        with torch.no_grad():
            model[4].weight.mul_(100)  # confident rows
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        inputs, targets = batch()
        with Monitor(model, optimizer, console=False, every=1) as monitor:
            for _ in range(3):
                logits = model(inputs)
                loss = F.cross_entropy(logits, targets)
                monitor.observe_loss(loss)
                backward(loss, logits)
                optimizer.step()
                optimizer.zero_grad()
        return monitor

    one, other = watched(lambda loss, logits: loss.backward()), watched(backward)
    for name in ("loss", "head_loss", "margin_median", "absorbed_fraction", "partially_absorbed_fraction"):
        assert other.history[name][1].tolist() == one.history[name][1].tolist(), name
    for name in ("zero_sum_violation", "zero_sum_violation_weight"):
        assert other.history[name][1] == pytest.approx(one.history[name][1], abs=1e-6), name
    assert [note.code for note in other.notes] == [note.code for note in one.notes]


def test_a_loss_that_is_multiplied_afterwards_is_trained_and_one_with_weight_zero_is_not() -> None:
    """What is observed is the value at which the gradient arrives, before the factor."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.inner(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    inputs, targets = batch()
    for factor in (1 / 8, 2.0, 1024.0, 0.0):
        model = WithLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with Monitor(model, optimizer, console=False, every=1) as monitor:
            monitor.observe_outputs()
            for _ in range(5):
                output = model(inputs, targets)
                other = output["logits"].square().mean()
                (factor * output["loss"] + 1e-3 * other).backward()
                optimizer.step()
        losses = monitor.history["loss"][1].tolist()
        if factor:
            assert losses == pytest.approx([output["loss"].item()] * 5), factor
        else:
            assert not losses
            assert "loss_not_trained" in [note.code for note in monitor.notes]
