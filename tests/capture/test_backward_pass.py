"""Several backward passes through the same logits, and passes that train nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor
from nfi_monitor.capture.backward_pass import SeveralPasses, looks_like_cross_entropy
from tests.runs import batch, differences, mlp, snapshot

Passes = Callable[[Tensor, Tensor, Tensor], None]
"""Runs the backward passes of one step: (logits, targets, inputs)."""


def run(passes: Passes, *, steps: int = 3, watched: bool = True) -> tuple[Monitor | None, dict[str, object]]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer, console=False, every=1) if watched else None
    inputs, targets = batch()
    for _ in range(steps):
        x = inputs.clone().requires_grad_()
        passes(model(x), targets, x)
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return monitor, snapshot(model, optimizer)


def whole(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    F.cross_entropy(logits, targets).backward()


def halves(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    """The rows of one half of the batch, then those of the other."""
    half = len(targets) // 2
    (F.cross_entropy(logits[:half], targets[:half]) / 2).backward(retain_graph=True)
    (F.cross_entropy(logits[half:], targets[half:]) / 2).backward()


def quarters(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    for left in (True, True, True, False):
        (F.cross_entropy(logits, targets) / 4).backward(retain_graph=left)


def penalty_first(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    (1e-9 * logits.square().mean()).backward(retain_graph=True)
    F.cross_entropy(logits, targets).backward()


def penalty_last(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    F.cross_entropy(logits, targets).backward(retain_graph=True)
    (1e-9 * logits.square().mean()).backward()


def saliency_first(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    torch.autograd.grad(logits.square().sum(), inputs, retain_graph=True)
    F.cross_entropy(logits, targets).backward()


def penalty_of_the_gradient(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    (slope,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    (F.cross_entropy(logits, targets) + 1e-6 * slope.square().sum()).backward()


@pytest.mark.parametrize(
    "passes",
    [halves, quarters, penalty_first, penalty_last, saliency_first, penalty_of_the_gradient],
    ids=lambda passes: passes.__name__,
)
def test_what_arrives_in_several_backward_passes_is_read_as_one(passes: Passes) -> None:
    """Only the loss's passes count, and their sum is the gradient of a single pass."""
    expected, _ = run(whole)
    monitor, trained = run(passes)
    assert monitor is not None and expected is not None
    for name in ("zero_sum_violation", "absorbed_fraction", "soft_target_fraction", "head_loss"):
        steps, values = monitor.history[name]
        assert steps.tolist() == [1, 2, 3], name
        assert values == pytest.approx(expected.history[name][1], rel=1e-3, abs=1e-6), name
    assert [note.code for note in monitor.notes] == [note.code for note in expected.notes]
    assert not differences(run(passes, watched=False)[1], trained)


def test_gradients_that_the_loop_asks_for_itself_and_assigns_are_read() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(3):
            gradients = torch.autograd.grad(F.cross_entropy(model(inputs), targets), [*model.parameters()])
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    assert len(monitor.history["zero_sum_violation"][0]) == 3


def test_a_penalty_hides_no_absorbed_rows_and_counts_where_it_is_large() -> None:
    logits = torch.tensor([[40.0, 1.0, -3.0], [2.0, 1.0, -1.0]], requires_grad=True)
    targets = torch.tensor([0, 1])
    (own,) = torch.autograd.grad(F.cross_entropy(logits, targets), logits)
    for scale, expected in ((1e-9, own), (1.0, own + 2 * logits.detach())):
        passes = SeveralPasses(scale * 2 * logits.detach(), logits.detach())
        passes.add(own)
        assert torch.equal(passes.sum(), expected)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])
def test_a_cross_entropy_is_told_from_penalties_on_its_logits(scale: float) -> None:
    torch.manual_seed(0)
    logits = (scale * torch.randn(64, 9)).requires_grad_()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits)[0]

    for targets in (torch.randint(9, (64,)), logits.argmax(-1)):
        assert looks_like_cross_entropy(gradient(F.cross_entropy(logits, targets)), logits)
    assert not looks_like_cross_entropy(gradient(logits.square().mean()), logits)
    assert not looks_like_cross_entropy(gradient(logits.logsumexp(-1).square().mean()), logits)


def test_rows_of_many_micro_batches_do_not_wait_for_the_step() -> None:
    """Only those whose graph may still get a gradient are held."""
    model = nn.Linear(8, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(20):
            F.cross_entropy(model(torch.randn(4, 8)), torch.randint(5, (4,))).backward()
            assert len(monitor._loop.step_reader._arrived) <= 1
        optimizer.step()
        assert monitor.history["live_fraction"][1].tolist() == [1.0]
