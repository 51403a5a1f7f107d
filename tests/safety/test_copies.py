"""Copies of a watched model are nobody's run: they are never counted, never break, and load anywhere."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from nfi_monitor import Monitor
from nfi_monitor.engine import step_reader
from nfi_monitor.report.run_directory.reader import read_run
from tests.forked import Forked
from tests.runs import batch, differences, mlp, snapshot
from tests.safety.killed import Child
from tests.safety.table import Shown

ROWS = 24


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, marked: bool = False) -> Tensor:
    """One step; ``marked``: on rows of NaN, which show wherever they are counted."""
    inputs, targets = batch(ROWS)
    loss = F.cross_entropy(model.train()(inputs * float("nan") if marked else inputs), targets)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return loss


def unpickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model: nn.Module) -> nn.Module:
    average = AveragedModel(model)
    average.update_parameters(model)
    return average


def moving(model: nn.Module) -> nn.Module:
    """An exponential moving average as many write it by hand."""
    average = copy.deepcopy(model)
    with torch.no_grad():
        for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
            ours.lerp_(theirs, 0.01)
    return average


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy.deepcopy": copy.deepcopy,
    "a copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickle": unpickled,
    "torch.save": saved,
    "AveragedModel": averaged,
    "moving average": moving,
    "a pickled copy": lambda model: unpickled(copy.deepcopy(model)),
}


def seen(monitor: Monitor) -> tuple[int, list[float]]:
    return monitor.step, monitor.history["live_fraction"][1].tolist()


@pytest.fixture
def watched() -> Iterator[tuple[nn.Sequential, torch.optim.Optimizer, Monitor]]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        monitor.observe_outputs()  # the loss probe is copied, too
        step(model, optimizer)
        yield model, optimizer, monitor


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_trains_unseen_while_the_run_goes_on(kind: str, watched: Any) -> None:
    model, optimizer, monitor = watched
    other = COPIES[kind](model)
    for _ in range(3):
        step(other, torch.optim.SGD(other.parameters(), lr=0.1), marked=True)
        step(model, optimizer)
    assert seen(monitor) == (4, [1.0] * 4)
    assert monitor.history["non_finite_rows"][1].tolist() == [0.0] * 4
    assert all(math.isfinite(loss) for loss in monitor.history["loss"][1])
    assert not [note for note in monitor.notes if note.code.startswith("failed")]


def test_a_copied_optimizer_takes_steps_that_are_not_the_runs(watched: Any) -> None:
    _, optimizer, monitor = watched
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for group in other.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        other.step()
    assert monitor.step == 1


def test_a_copy_can_be_watched_by_a_monitor_of_its_own(watched: Any) -> None:
    model, optimizer, monitor = watched
    other = copy.deepcopy(model)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    with Monitor(other, theirs, console=False, every=1) as second:
        step(other, theirs)
        step(model, optimizer)
        assert seen(second) == (1, [1.0]) and seen(monitor) == (2, [1.0, 1.0])


def test_a_saved_model_loads_where_the_package_is_not_installed(tmp_path: Path, watched: Any) -> None:
    model, _, _ = watched
    torch.save(model, tmp_path / "model.pt")

    def elsewhere() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("nfi_monitor", "tests")]:
            del sys.modules[name]
        sys.modules["nfi_monitor"] = None  # type: ignore[assignment]  # importing it is an ImportError now
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        loaded.train()(torch.zeros(2, 12)).sum().backward()
        print(tuple(loaded[0].weight.grad.shape))

    assert Forked(elsewhere, tmp_path, {}).printed().strip() == "(32, 12)"


def test_state_dicts_hold_nothing_of_the_monitor(watched: Any) -> None:
    model, optimizer, _ = watched
    bare = mlp()
    step(bare, other := torch.optim.AdamW(bare.parameters(), lr=1e-3))
    assert not differences(snapshot(model, optimizer), snapshot(bare, other))


def test_data_parallel_without_accelerators_is_seen_once(watched: Any) -> None:
    model, optimizer, monitor = watched
    step(nn.DataParallel(model), optimizer)
    assert seen(monitor) == (2, [1.0, 1.0])


def test_replicas_on_several_threads_are_parts_of_one_step(watched: Any) -> None:
    """What DataParallel does on several accelerators: shallow copies that share hooks, one thread each."""
    model, optimizer, monitor = watched
    inputs, targets = batch(ROWS)

    def replica(module: nn.Module) -> nn.Module:
        copied = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            copied._parameters[name] = None if parameter is None else parameter.clone()
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else replica(child)
        return copied

    outputs: dict[int, Tensor] = {}
    for _ in range(3):
        replicas = [replica(model) for _ in range(3)]

        def forward(number: int, module: nn.Module) -> None:
            outputs[number] = module(inputs[number::3])

        threads = [threading.Thread(target=forward, args=item) for item in enumerate(replicas)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        F.cross_entropy(
            torch.cat([outputs[n] for n in range(3)]), torch.cat([targets[n::3] for n in range(3)])
        ).backward()
        monitor._loop.step_reader.finish_rows()
        sums = monitor._loop.rows.sums
        assert sums is not None and sums[0] == ROWS, "live rows: each of them once"
        optimizer.step()
        optimizer.zero_grad()
    assert seen(monitor) == (4, [1.0] * 4)
    assert not [note for note in monitor.notes if note.code.startswith("failed")]


def test_a_replica_on_another_device_is_left_out_and_said_once(watched: Any, monkeypatch: Any) -> None:
    model, optimizer, monitor = watched
    # The meta device stands for a second accelerator, though it has no numbers and no autocast.
    monkeypatch.setattr(step_reader, "full_precision", lambda tensor: nullcontext())
    monitor._loop.probe.on_meta = True
    for _ in range(3):
        replica = model._replicate_for_data_parallel()
        for number, layer in enumerate(model):
            replica._modules[str(number)] = copied = layer._replicate_for_data_parallel()
            for name, parameter in layer.named_parameters():
                copied._parameters[name] = parameter.detach().to("meta").requires_grad_()
        inputs, targets = batch(ROWS)
        F.cross_entropy(model(inputs), targets).backward()
        outputs = replica(torch.zeros(ROWS, 12, device="meta"))
        outputs.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen(monitor) == (4, [1.0] * 4)
    assert [note.code for note in monitor.notes] == ["rows_elsewhere"]
    assert "Rows on meta are not read, only those on cpu" in monitor.notes[0].message


# --- processes ---------------------------------------------------------------------------------------


class Predicted(Dataset[Tensor]):
    """A dataset that runs, and even trains, the watched model in its workers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(1)
        step(self.model, torch.optim.SGD(self.model.parameters(), lr=0.1))
        return self.model(batch(1, seed=index)[0])[0].detach()


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_that_run_the_watched_model_are_not_the_run(start: str, watched: Any, tmp_path: Path) -> None:
    model, optimizer, monitor = watched
    loader = DataLoader(Predicted(model), batch_size=3, num_workers=1, multiprocessing_context=start)
    assert sum(len(rows) for rows in loader) == 6
    step(model, optimizer)
    assert seen(monitor) == (2, [1.0, 1.0])


def test_a_forked_child_that_trains_on_writes_nothing_and_tells_nobody(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    told: list[str] = []
    run = tmp_path / "run"
    monitor = Monitor(
        model, optimizer, console=False, every=1, run_dir=run, on_alert=lambda alert: told.append(alert.id)
    )
    for _ in range(3):
        step(model, optimizer)

    def break_it() -> None:
        """Something that is told at once."""
        for _ in range(5):
            monitor.observe_loss(float("nan"))
            step(model, optimizer)

    before = {path.name: path.read_bytes() for path in run.iterdir() if "tfevents" not in path.name}

    def work(said: Callable[[int], None]) -> None:
        with monitor:  # its end is no end of the run
            break_it()
            monitor.tap(torch.zeros(3, 7, requires_grad=True))
        assert told == [] and monitor.closed and monitor.step == 3
        with Monitor(model, optimizer, console=False, every=1) as own:  # the child's own run is one
            step(model, optimizer)
            assert seen(own) == (1, [1.0])
        said(1)

    child = Child(work)
    assert child.wait() == "" and child.done == 1
    assert {name: (run / name).read_bytes() for name in before} == before
    break_it()
    monitor.close()
    assert told == ["non_finite-1"] and monitor.step == 8
    assert read_run(run).history["live_fraction"][0].tolist() == list(range(1, 9))


@pytest.mark.slow
def test_every_kind_of_copy_at_every_step_of_a_run(shown: Shown) -> None:
    """Copied while anything may be under way: between forward, backward and step, too."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = batch(ROWS)
    count = 0
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        monitor.observe_outputs()
        for _ in range(30):
            loss = F.cross_entropy(model(inputs), targets)
            for make in COPIES.values():
                step(make(model), marked=True)
            loss.backward()
            for make in COPIES.values():
                step(make(model), marked=True)
            optimizer.step()
            optimizer.zero_grad()
            for make in COPIES.values():
                step(make(model), marked=True)
            count += 3 * len(COPIES)
        assert seen(monitor) == (30, [1.0] * 30)
        assert monitor.history["non_finite_rows"][1].tolist() == [0.0] * 30
    shown("copies", count, "copies trained")
