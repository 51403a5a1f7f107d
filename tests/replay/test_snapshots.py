"""A snapshot is the whole state of a run; restoring it is exact, in place, and refuses what does not fit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nfi_monitor.replay import recent_snapshots as rings
from nfi_monitor.replay.recent_snapshots import RecentSnapshots
from nfi_monitor.replay.snapshots import Snapshot, state_bytes
from tests.own_optimizers import Nested, Shared
from tests.runs import batch, differences, mlp, snapshot


class Net(nn.Module):
    """Running statistics, a buffer that no state_dict holds, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, 7)
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.head(self.body(x))


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, *also: Any) -> list[float]:
    """Minibatches drawn from torch, numpy and Python's own random state."""
    inputs, targets = batch(rows=64)
    losses = []
    for _ in range(count):
        rows = torch.randperm(64)[:16]
        noise = float(np.random.rand()) + random.random()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[rows] + 0.1 * noise), targets[rows])
        loss.backward()
        optimizer.step()
        for scheduler in also:
            scheduler.step()
        losses.append(loss.item())
    return losses


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    found = snapshot(model, optimizer)
    return {**found, "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()}}


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}])
def test_a_run_continued_from_a_snapshot_is_the_same_run(options: dict[str, Any]) -> None:
    model = Net()
    optimizer = adamw(model, **options)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=60)
    steps(model, optimizer, 10, scheduler)
    taken = Snapshot.take(10, model, optimizer, [scheduler])
    kept = {id(p): p.data_ptr() for p in model.parameters()}
    moments = [state["exp_avg_sq"] for state in optimizer.state.values()]
    losses = steps(model, optimizer, 15, scheduler)
    after = everything(model, optimizer)
    for _ in range(2):  # any number of times
        taken.restore(model, optimizer, [scheduler])
        assert steps(model, optimizer, 15, scheduler) == losses
        assert differences(everything(model, optimizer), after) == []
    assert {id(p): p.data_ptr() for p in model.parameters()} == kept
    assert all(
        a is state["exp_avg_sq"] for a, state in zip(moments, optimizer.state.values(), strict=True)
    ), "views of the state would go stale"


@pytest.mark.parametrize("kind", [Shared, Nested])
def test_state_that_is_shared_or_nested_is_restored_as_well(kind: Any) -> None:
    model = Net()
    optimizer = kind(model.parameters())
    steps(model, optimizer, 4)
    taken = Snapshot.take(4, model, optimizer)
    losses = steps(model, optimizer, 5)
    counts = [value.item() for key, value in optimizer.state.items() if key == "k"]
    for _ in range(2):
        taken.restore(model, optimizer)
        assert steps(model, optimizer, 5) == losses
        assert [value.item() for key, value in optimizer.state.items() if key == "k"] == counts
    before = Snapshot.take(0, model, kind(model.parameters()))
    before.restore(model, optimizer)
    assert len(optimizer.state) == 0


def test_taking_one_changes_nothing_and_shares_nothing() -> None:
    model = Net()
    optimizer = adamw(model)
    steps(model, optimizer, 3)
    before, state = everything(model, optimizer), random.getstate()
    taken = Snapshot.take(3, model, optimizer)
    assert differences(everything(model, optimizer), before) == [] and random.getstate() == state
    steps(model, optimizer, 3)
    again = Snapshot.take(3, model, optimizer)
    assert differences(taken.model, again.model) != []  # the first was not moved along
    assert 0 < taken.nbytes - state_bytes(model, optimizer) < 12_000, "the random state, and no more"


def test_state_that_was_not_there_yet_is_gone_again() -> None:
    model = Net()
    optimizer = adamw(model)
    taken = Snapshot.take(0, model, optimizer)
    steps(model, optimizer, 2)
    taken.restore(model, optimizer)
    assert len(optimizer.state) == 0


def test_state_keeps_its_own_dtype_where_load_state_dict_would_cast_it() -> None:
    model = mlp().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for param in model.parameters():
        optimizer.state[param]["exp_avg_sq"] = torch.full(param.shape, 1 + 2**-20, dtype=torch.float32)
    taken = Snapshot.take(0, model, optimizer)
    optimizer.state.clear()
    taken.restore(model, optimizer)
    for state in optimizer.state.values():
        assert state["exp_avg_sq"].dtype is torch.float32 and state["exp_avg_sq"].min() > 1


def test_a_buffer_that_changed_its_shape_comes_back() -> None:
    model = Net()
    optimizer = adamw(model)
    taken = Snapshot.take(0, model, optimizer)
    model.seen = torch.ones(9)
    taken.restore(model, optimizer)
    assert model.seen.shape == (1,)


def test_extras_are_restored_and_stay_their_own() -> None:
    model = Net()
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    average = torch.optim.swa_utils.AveragedModel(model)
    generator = torch.Generator().manual_seed(5)
    extras = [scheduler, average, generator]
    taken = Snapshot.take(0, model, optimizer, extras)
    drawn = torch.rand(3, generator=generator)
    steps(model, optimizer, 5, scheduler)
    average.update_parameters(model)
    for _ in range(2):
        taken.restore(model, optimizer, extras)
        assert scheduler.last_epoch == 0 and scheduler.get_last_lr() == [1e-2] and average.n_averaged == 0
        assert torch.equal(torch.rand(3, generator=generator), drawn)
        steps(model, optimizer, 5, scheduler)
        assert scheduler.get_last_lr() == [2.5e-3]


def test_what_moves_after_the_step_is_added_before_the_next_and_what_hands_out_data_is_not() -> None:
    model = Net()
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    generator = torch.Generator().manual_seed(5)
    steps(model, optimizer, 1)
    inside = Snapshot.take(1, model, optimizer, [scheduler, generator])
    scheduler.step()
    first = torch.rand(3, generator=generator)  # the next step's batch
    whole = inside.completed(optimizer, [scheduler, generator])
    assert (
        whole.optimizer["param_groups"][0]["lr"] == 5e-3 and inside.optimizer["param_groups"][0]["lr"] == 1e-2
    )
    assert whole.lrs == (1e-2,), "the rate of the step itself is what LR_HELD holds"
    whole.restore(model, optimizer, [scheduler, generator])
    assert scheduler.last_epoch == 1
    assert torch.equal(torch.rand(3, generator=generator), first)


def test_save_and_load_are_exact_and_leave_no_temporary_file(tmp_path: Path) -> None:
    model = Net()
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6])
    steps(model, optimizer, 4, scheduler)
    spike = {"state": "quiet", "average": float("nan")}
    taken = Snapshot.take(4, model, optimizer, [scheduler], spike, second_moment_decay=-0.7)
    taken.save(tmp_path / "at4.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["at4.pt"]
    losses = steps(model, optimizer, 5, scheduler)
    back = Snapshot.load(tmp_path / "at4.pt", trusted=True)
    assert (back.step, back.nbytes, back.lrs) == (4, taken.nbytes, taken.lrs)
    assert back.second_moment_decay == -0.7
    assert (
        differences(
            [back.model, back.optimizer, back.rng, back.spike],
            [taken.model, taken.optimizer, taken.rng, taken.spike],
        )
        == []
    )
    back.restore(model, optimizer, [scheduler])
    assert steps(model, optimizer, 5, scheduler) == losses


def test_a_decay_that_was_not_seen_gives_nothing_back(tmp_path: Path) -> None:
    model = Net()
    unseen = Snapshot.take(1, model, adamw(model), second_moment_decay=float("nan"))
    assert unseen.second_moment_decay == 0.0


def test_a_snapshot_of_plain_states_loads_without_trust(tmp_path: Path) -> None:
    model = Net()
    optimizer = adamw(model)
    steps(model, optimizer, 2)
    Snapshot.take(2, model, optimizer, [torch.optim.lr_scheduler.StepLR(optimizer, 2)]).save(
        tmp_path / "s.pt"
    )
    assert Snapshot.load(tmp_path / "s.pt").step == 2


class Odd:
    """An extra whose state is no plain type."""

    def state_dict(self) -> dict[str, Any]:
        return {"path": Path("x")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_loading_says_what_to_do(tmp_path: Path) -> None:
    model = Net()
    Snapshot.take(0, model, adamw(model), [Odd()]).save(tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"If you wrote it yourself: Snapshot.load\(path, trusted=True\)"):
        Snapshot.load(tmp_path / "odd.pt")
    torch.save({"model": 1}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"no snapshot of this version. Pass what snapshot.save\(path\) wrote"
    ):
        Snapshot.load(tmp_path / "other.pt")


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    taken = Snapshot.take(0, model, adamw(model))
    taken.save(tmp_path / "s.pt")
    old = (tmp_path / "s.pt").read_bytes()

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        taken.save(tmp_path / "s.pt")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("s.pt", old)]


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    model = Net()
    optimizer = adamw(model)
    taken = Snapshot.take(3, model, optimizer)
    other = mlp()
    with pytest.raises(ValueError, match=r"step 3 is of another model: .*Pass the model it is of"):
        taken.restore(other, adamw(other))
    steps(model, optimizer, 1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"1 parameter group\(s\) of \[6\] tensors, the optimizer has 2"):
        taken.restore(model, optimizer)
    with pytest.raises(ValueError, match=r"0 stateful objects, 1 were given\. Pass the same"):
        Snapshot.take(3, model, optimizer).restore(model, optimizer, [torch.Generator()])
    assert differences(everything(model, optimizer), before) == []
    with pytest.raises(TypeError, match="stateful holds a int, which has no state_dict"):
        Snapshot.take(3, model, optimizer, [3])


# --- the ring -------------------------------------------------------------------------------------


def ring_of(count: int, limit: int | str) -> tuple[RecentSnapshots, nn.Module]:
    model = Net()
    optimizer = adamw(model)
    ring = RecentSnapshots(model, optimizer, [], limit)
    for step in range(1, count + 1):
        steps(model, optimizer, 1)
        ring.take(step, None)
        ring.complete()
    return ring, model


def test_the_ring_keeps_the_latest_four() -> None:
    assert [s.step for s in ring_of(7, "auto")[0].snapshots] == [4, 5, 6, 7]


def test_the_ring_stays_within_its_bytes() -> None:
    one = ring_of(1, "auto")[0].snapshots[0].nbytes
    ring, _ = ring_of(7, int(2.5 * one))
    assert [s.step for s in ring.snapshots] == [6, 7]
    assert sum(s.nbytes for s in ring.snapshots) <= 2.5 * one


def test_a_snapshot_is_offered_only_when_it_is_complete() -> None:
    ring, _ = ring_of(2, "auto")
    ring.take(3, None)
    assert ring.pending and [s.step for s in ring.snapshots] == [1, 2]
    ring.close()
    assert [s.step for s in ring.snapshots] == [1, 2, 3]


def test_a_ring_that_keeps_none_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    ring, _ = ring_of(2, 100)
    assert ring.snapshots == [] and "snapshots=100 allows 0.0 MiB for all together" in ring.refused
    assert ring_of(2, 0)[0].snapshots == []
    monkeypatch.setattr(rings, "CHEAP", 100)
    ring, _ = ring_of(2, "auto")
    assert ring.snapshots == [] and "more than snapshots='auto' allows" in ring.refused


def test_a_snapshot_is_due_every_two_tau_and_never_before_twenty_steps() -> None:
    ring, _ = ring_of(1, "auto")
    assert [ring.due(step, tau=5.0) for step in (20, 21)] == [False, True]
    assert [ring.due(step, tau=50.0) for step in (100, 101)] == [False, True]
