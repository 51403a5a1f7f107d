"""What other programs do to the files and streams of a training costs the reports, never the training."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nfi_monitor import Monitor, open_monitors
from nfi_monitor.report import tensorboard
from nfi_monitor.report.run_directory.reader import read_run
from tests.runs import batch, mlp

PIPED = """
import sys, torch
from nfi_monitor import Monitor
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.AdamW(model.parameters())
with Monitor(model, optimizer, head=model, every=1) as monitor:
    for _ in range(3):
        torch.nn.functional.cross_entropy(model(torch.ones(3, 4)), torch.arange(3)).backward()
        optimizer.step()
print("trained", monitor.step, [note.code for note in monitor.notes])
"""


def test_a_reader_of_stderr_that_is_gone_ends_no_training_and_hides_no_output() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", PIPED], stdout=subprocess.PIPE, stderr=writing, text=True, timeout=120
    )
    os.close(writing)
    assert done.stdout == "trained 3 ['failed_ConsoleSink']\n"


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    inputs, targets = batch(6)
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def test_a_directory_that_is_replaced_by_a_link_leads_nowhere(tmp_path: Path) -> None:
    """run.json and TensorBoard's files are opened by their names, again and again."""
    pytest.importorskip("tensorboard")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "run.json").write_text("precious")
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, optimizer, console=False, run_dir=tmp_path / "run", every=1) as monitor:
        step(model, optimizer)
        monitor._loop.reports.sinks[-1]._writer.flush()  # TensorBoard's own thread writes a moment later
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").symlink_to(outside)
        step(model, optimizer)
        monitor.note("mine", "A note, which is a part of run.json.")
        step(model, optimizer)
    assert [path.name for path in outside.iterdir()] == ["run.json"]
    assert (outside / "run.json").read_text() == "precious"
    said = {note.code: note.message for note in monitor.notes}
    assert "it was moved or replaced" in said["failed_RunDirectory"]
    assert read_run(tmp_path / "moved").history["gradient_norm"][0].tolist()[:2] == [1, 2]


@pytest.mark.parametrize("kind", ["link", "file", "nothing"])
def test_an_event_file_that_is_replaced_is_not_written(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    outside = tmp_path / "precious"
    outside.write_text("precious")
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, optimizer, console=False, run_dir=tmp_path / "run", every=1) as monitor:
        step(model, optimizer)
        monitor._loop.reports.sinks[-1]._writer.flush()
        (events,) = (tmp_path / "run").glob("events.*")
        events.unlink()
        if kind == "link":
            events.symlink_to(outside)
        elif kind == "file":
            outside.rename(events)
            outside = events
        step(model, optimizer)
    assert outside.read_text() == "precious"
    assert (
        "deleted or replaced" in {note.code: note.message for note in monitor.notes}["failed_TensorBoardSink"]
    )


@pytest.mark.parametrize("stub", [None, types.ModuleType("tensorboard")], ids=["none", "module"])
def test_a_module_in_the_place_of_tensorboard_does_not_stop_the_monitor(
    stub: types.ModuleType | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", stub)
    assert not tensorboard.available()
    model = mlp()
    Monitor(model, torch.optim.AdamW(model.parameters()), console=False, run_dir=tmp_path).close()
    assert (tmp_path / "run.json").is_file()


class Odd(nn.Linear):
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compare the weights instead")

    __hash__ = nn.Linear.__hash__


def test_a_head_that_cannot_be_compared_is_watched_and_released() -> None:
    model = mlp()
    model[-1] = Odd(model[-1].in_features, model[-1].out_features)
    monitor = Monitor(model, torch.optim.AdamW(model.parameters()), console=False)
    assert open_monitors() == [monitor]
    monitor.close()
    assert not open_monitors() and not monitor.notes
