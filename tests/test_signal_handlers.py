"""An exception that the user's handler of a signal raises inside the monitor reaches the training."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nfi_monitor import Monitor
from nfi_monitor.engine.step_reader import StepReader
from nfi_monitor.report.sink import SinkBase
from nfi_monitor.signal_handlers import raised_by_signal_handler
from tests.runs import batch, mlp


class JobEnds(Exception):
    """What a scheduler's notice raises."""


def _inner() -> None:
    raise JobEnds


def handler(*_: object) -> None:
    _inner()


class Object:
    def __call__(self, *_: object) -> None:
        raise JobEnds

    def method(self, *_: object) -> None:
        raise JobEnds


@pytest.fixture(autouse=True)
def before() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, handler)


@pytest.mark.parametrize(
    "handler",
    [handler, Object(), Object().method, functools.partial(handler, 1)],
    ids=["function", "object", "method", "partial"],
)
def test_every_kind_of_handler_is_recognised(handler: Callable[..., None]) -> None:
    signal.signal(signal.SIGUSR1, handler)
    with pytest.raises(JobEnds) as found:
        signal.raise_signal(signal.SIGUSR1)
    assert raised_by_signal_handler(found.value)


def test_an_ordinary_error_is_no_handlers() -> None:
    signal.signal(signal.SIGUSR1, handler)
    with pytest.raises(JobEnds) as found:
        _inner()
    assert not raised_by_signal_handler(found.value)


def ends(*_: Any) -> None:
    signal.raise_signal(signal.SIGUSR1)


class Ends(SinkBase):
    def reading(self, reading: Any, phase: Any) -> None:
        ends()


@pytest.mark.parametrize("where", ["reading", "loss", "sink", "close"])
def test_it_comes_out_of_the_monitor_wherever_it_was_raised(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGUSR1, handler)
    model, (inputs, targets) = mlp(), batch(6)
    optimizer = torch.optim.AdamW(model.parameters())
    monitor = Monitor(model, optimizer, console=False, every=1, sinks=[Ends()] if where == "sink" else [])
    if where == "reading":
        monkeypatch.setattr(StepReader, "read", ends)
    if where == "loss":
        monkeypatch.setattr(monitor._loop.loss_sources, "report", ends)
    if where == "close":
        monkeypatch.setattr(monitor._loop.schedule, "finish", ends)

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        monitor.observe_loss(loss)
        loss.backward()
        optimizer.step()

    with pytest.raises(JobEnds):
        step()
        monitor.close()
    assert torch.is_grad_enabled() and not [note for note in monitor.notes if "failed" in note.code]
    monkeypatch.undo()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if where != "close":
        step()
        assert monitor.step == (1 if where == "loss" else 2)
    monitor.close()
    assert not model[-1]._forward_hooks
