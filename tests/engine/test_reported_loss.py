"""A loss that the loop reports and nobody trains on is said; every usual way to report one is quiet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor

K = 7
Step = Callable[[nn.Module, Tensor, Tensor, Callable[[Tensor], object]], None]


def train(step: Step, *, watch: bool = True) -> tuple[Monitor | None, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, K))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    monitor = Monitor(model, optimizer, console=False, every=1) if watch else None
    for _ in range(8):
        x, y = torch.randn(12, 6), torch.randint(0, K, (12,))
        step(model, x, y, (lambda loss: None) if monitor is None else monitor.observe_loss)
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return monitor, model.state_dict()


def _preferences(z: Tensor, y: Tensor) -> Tensor:
    logs = z.log_softmax(-1)
    return -F.logsigmoid(logs.gather(1, y[:, None]) - logs.gather(1, (y[:, None] + 1) % K)).mean()


def cross_entropy_beside_preferences(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    z = model(x)
    _preferences(z, y).backward()
    report(F.cross_entropy(z, y))


def reported_before(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    z = model(x)
    report(F.cross_entropy(z, y))
    (z - y[:, None] / K).square().mean().backward()


def a_metric_of_the_loss(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    z = model(x)
    F.cross_entropy(z, y, label_smoothing=0.1).backward()
    report(F.cross_entropy(z, y))


@pytest.mark.parametrize("step", [cross_entropy_beside_preferences, reported_before, a_metric_of_the_loss])
def test_a_loss_that_nobody_trains_on_is_said(step: Step) -> None:
    monitor, state = train(step)
    assert monitor is not None
    [note] = [note for note in monitor.notes if note.code == "loss_not_trained"]
    assert "observe_loss gets" in note.message and "Report the loss that trains" in note.message
    _, bare = train(step, watch=False)
    assert all(torch.equal(state[name], bare[name]) for name in bare)


def after(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    report(loss)


def before(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    loss = F.cross_entropy(model(x), y)
    report(loss)
    (loss * 2.0**10).backward()


def a_share(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    for rows in (slice(0, 6), slice(6, 12)):
        loss = F.cross_entropy(model(x[rows]), y[rows])
        (loss / 2).backward()
        report(loss * 1.0)


def each_row(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    losses = F.cross_entropy(model(x), y, reduction="none")
    losses.sum().backward()
    report(torch.where(losses.isfinite(), losses, 0.0).mean())


def kept_graph(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    report(loss)


def a_part(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    z = model(x)
    loss = F.cross_entropy(z, y)
    (loss + 0.1 * z.square().mean()).backward()
    report(loss)


def assigned(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    loss = F.cross_entropy(model(x), y)
    parameters = list(model.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = grad
    report(loss)


def a_number(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    report(loss.detach())


def two_losses(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    first, second = F.cross_entropy(model(x), y), F.cross_entropy(model(-x), y)
    first.backward()
    second.backward()
    report(torch.stack([first, second]).mean())


def checkpointed(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    z = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    loss = F.cross_entropy(z, y)
    loss.backward()
    report(loss)


QUIET = [after, before, a_share, each_row, kept_graph, a_part, assigned, a_number, two_losses, checkpointed]


@pytest.mark.parametrize("step", QUIET)
def test_a_loss_that_is_trained_is_reported_quietly(step: Step) -> None:
    monitor, state = train(step)
    assert monitor is not None and "loss_not_trained" not in {note.code for note in monitor.notes}
    _, bare = train(step, watch=False)
    assert all(torch.equal(state[name], bare[name]) for name in bare)
