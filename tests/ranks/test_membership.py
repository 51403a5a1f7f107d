"""A monitor that looks for other ranks and cannot reach them; what they read together: tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nfi_monitor import Monitor
from nfi_monitor.ranks import processes
from nfi_monitor.ranks.exchange import Exchange, Message, survey
from tests.runs import batch, mlp


def trained(steps: int, **arguments: Any) -> Monitor:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=1, **arguments) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()
    return monitor


def readings(monitor: Monitor) -> dict[str, list[list[float]]]:
    return {name: [column.tolist() for column in monitor.history[name]] for name in monitor.history}


def test_a_store_that_cannot_be_reached_is_said_once_and_this_rank_is_read_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def unreachable(model: Any, group: Any = None) -> tuple[int, ...]:
        asked.append(group)
        raise RuntimeError("connection refused")

    monkeypatch.setattr(processes, "find_ranks", unreachable)
    monitor = trained(4)
    (said,) = [note for note in monitor.notes if note.code == "ranks_apart"]
    assert said.step == 0
    assert "their store cannot be reached (RuntimeError: connection refused)" in said.message
    assert "only rank 0 reports. Training is not affected." in said.message
    assert asked == [None], "nobody looks again"
    monkeypatch.undo()
    assert repr(readings(monitor)) == repr(readings(trained(4)))


def test_what_one_rank_says_may_lie_on_two_devices() -> None:
    message = Message(SimpleNamespace(at=lambda name: 0, line=0), 0)  # type: ignore[arg-type]
    for place, device in enumerate(("cpu", "meta", "cpu")):
        message.add("rows", torch.ones(2, device=device), 2 * place)
    packed = message.pack()
    assert (packed.tensor.shape, packed.tensor.device.type) == ((6,), "meta")


def test_ranks_are_looked_for_until_the_first_step_is_over_and_never_where_that_is_declined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def none_yet(model: Any, group: Any = None) -> None:
        asked.append(group)

    monkeypatch.setattr(processes, "find_ranks", none_yet)
    monitor = trained(4)
    assert asked == [None, None], (
        "when it is attached, and in the first forward: DDP may wrap the model later"
    )
    asked.clear()
    assert not [
        note for note in [*trained(4, group=False).notes, *monitor.notes] if note.code == "ranks_apart"
    ]
    assert asked == []


def test_a_rank_that_cannot_sign_up_reads_whole_tensors_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> Exchange:
        raise ConnectionError("the store is gone")

    monkeypatch.setattr(processes, "find_ranks", lambda model, group=None: (0, 1))
    monkeypatch.setattr(Exchange, "form", refuse)
    monitor = trained(4)
    assert [note.code for note in monitor.notes if note.code == "ranks_apart"] == ["ranks_apart"]
    assert monitor.history["zero_sum_violation"][0].tolist() == [1, 2, 3, 4]
    assert monitor.history["loss"][0].tolist() == [1, 2, 3, 4]


def test_what_is_done_to_a_loss_before_ranks_tell_each_other_is_not_taken_for_the_loss() -> None:
    model = mlp()
    shape, shares = survey(model, torch.optim.AdamW(model.parameters()), None, 1, slots=4)
    pool = Exchange(SimpleNamespace(world=1, index=0), shape, shares, {})  # type: ignore[arg-type]
    loss = torch.tensor(2.0)
    pool.keep_loss(1, loss)
    loss.mul_(8)
    assert pool.finish(pool.message(), 3).tensor.tolist() == [2.0]
