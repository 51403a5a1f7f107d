"""A monitor that looks for other ranks and cannot reach them; what they read together: tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nfi_monitor import Monitor
from nfi_monitor.capture.reading_plan import ReadingPlan
from nfi_monitor.measure.accumulator import RowAccumulator
from nfi_monitor.ranks import processes
from nfi_monitor.ranks.exchange import Exchange
from nfi_monitor.ranks.membership import Membership
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


def test_ranks_are_looked_for_until_the_first_step_is_over_and_never_where_that_is_declined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def none_yet(model: Any, group: Any = None) -> None:
        asked.append(group)

    monkeypatch.setattr(processes, "find_ranks", none_yet)
    monitor = trained(4)
    assert asked == [None, None, None], (
        "when it is attached, in the first forward, and at the first step: DDP may wrap the model later"
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


def membership(followed: list[ReadingPlan]) -> Membership:
    def nothing(*arguments: Any) -> None: ...

    return Membership(
        None,
        "auto",
        rows=RowAccumulator(),
        fill=nothing,
        next_read=lambda step, attention, tau: step + 1,
        follow=followed.append,
        note=nothing,
        failed=nothing,
        failed_parts=set(),
    )


def test_what_the_ranks_agree_on_is_handed_over_as_one_plan_and_taken_back_when_they_part() -> None:
    followed: list[ReadingPlan] = []
    one = membership(followed)
    one.share_head(None, None)
    assert followed == [], "nothing was agreed on"
    disbanded: list[bool] = []
    team = SimpleNamespace(disband=lambda: disbanded.append(True))
    one.exchange = SimpleNamespace(  # type: ignore[assignment]
        shape=SimpleNamespace(head_sharded=True, row_slots=16), team=team
    )
    one.share_head(None, None)
    one.share_head(None, None)
    assert followed == [ReadingPlan(head_summed=True, row_slots=16)]
    one.drop_out(7)
    assert followed[1:] == [ReadingPlan()] and disbanded == [True]
    assert one.exchange is None and not one.searching
    one.drop_out(8)
    assert len(followed) == 2


def test_probe_and_reader_follow_the_same_plan() -> None:
    model = mlp()
    with Monitor(model, torch.optim.AdamW(model.parameters()), console=False) as monitor:
        loop = monitor._loop
        loop.schedule.reduced_sample = True
        loop.look_ahead()
        assert loop.probe.plan is loop.reader.plan == ReadingPlan(reduced_sample=True)
        loop.step_reader.memory = object()  # type: ignore[assignment]
        loop._follow(ReadingPlan(head_summed=True, row_slots=8))
        assert loop.probe.plan is loop.reader.plan
        assert loop.probe.plan == ReadingPlan(reduced_sample=True, head_summed=True, row_slots=8)
        assert loop.step_reader.memory is None, "what was read before is not comparable"
