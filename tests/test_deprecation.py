"""The old keyword ``extras=`` works wherever ``stateful=`` does, and warns the one who writes it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from nfi_monitor import Monitor, Snapshot
from nfi_monitor.integrations.attach import Attachment
from nfi_monitor.replay import replay
from tests.runs import mlp


def parts():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)


def test_a_monitor_takes_the_old_keyword():
    model, optimizer, scheduler = parts()
    with pytest.warns(DeprecationWarning, match=r"Monitor\(extras=\.\.\.\) is now stateful=") as warned:
        monitor = Monitor(model, optimizer, console=False, extras=[scheduler])
    assert [Path(warning.filename) for warning in warned] == [Path(__file__)]
    assert monitor.port.stateful == (scheduler,)
    monitor.close()


def test_both_keywords_at_once_are_refused():
    model, optimizer, scheduler = parts()
    with pytest.raises(TypeError, match="Monitor got both stateful= and its old name extras="):
        Monitor(model, optimizer, stateful=[scheduler], extras=[scheduler])
    Monitor(model, optimizer, console=False).close()


def test_an_adapter_takes_the_old_keyword(tmp_path):
    model, optimizer, scheduler = parts()
    with pytest.warns(DeprecationWarning, match=r"Attachment\(extras="):
        attachment = Attachment(console=False, run_dir=None, extras=[scheduler])
    generator = torch.Generator()
    monitor = attachment.open(model, optimizer, directory=tmp_path, schedulers=[generator])
    assert monitor.port.stateful == (scheduler, generator)
    attachment.close()


def test_a_snapshot_takes_the_old_keyword_and_keeps_its_name_in_files(tmp_path):
    model, optimizer, scheduler = parts()
    with pytest.warns(DeprecationWarning, match=r"Snapshot\.take\(extras="):
        taken = Snapshot.take(0, model, optimizer, extras=[scheduler])
    taken.save(tmp_path / "taken.pt")
    assert "extras" in torch.load(tmp_path / "taken.pt", weights_only=True)
    loaded = Snapshot.load(tmp_path / "taken.pt")
    optimizer.step()
    scheduler.step()
    with pytest.warns(DeprecationWarning, match=r"Snapshot\.restore\(extras="):
        loaded.restore(model, optimizer, extras=[scheduler])
    assert scheduler.last_epoch == 0
    with pytest.warns(DeprecationWarning, match=r"Snapshot\.completed\(extras="):
        assert loaded.completed(optimizer, extras=[scheduler]).extras == loaded.extras


def test_a_replay_takes_the_old_keyword():
    model, optimizer, scheduler = parts()
    taken = Snapshot.take(0, model, optimizer, [scheduler])

    def step_fn(step: int) -> float:
        optimizer.step()
        scheduler.step()
        return 1.0

    with pytest.warns(DeprecationWarning, match=r"replay\(extras="):
        replay(taken, step_fn, [], 3, model=model, optimizer=optimizer, extras=[scheduler])
    assert scheduler.last_epoch == 0


def test_the_signature_shows_the_new_name_alone():
    for function in (Monitor, Snapshot.take, replay):
        names = inspect.signature(function).parameters
        assert "stateful" in names and "extras" not in names
