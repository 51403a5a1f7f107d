"""Foreign files in a run directory: nothing hangs, nothing outside is written, and the training goes on."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nfi_monitor import Monitor, cli
from nfi_monitor.report.run_directory.reader import read_run
from nfi_monitor.report.run_directory.writer import CHECK_SECONDS, RunDirectory
from nfi_monitor.types import Change, Phase, Reading
from tests.report.builders import AT_RISK, INFO

NAMES = (
    "run.json", "readings.jsonl", "alerts.jsonl", "replays.jsonl", "report.png", ".lock",
    f".run.json.{os.getpid()}.tmp", f".report.png.{os.getpid()}.tmp",
)  # fmt: skip
PRECIOUS = "precious\n"


def _socket(path: Path, outside: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _device(path: Path, outside: Path) -> None:
    try:
        os.mknod(path, 0o020666, os.makedev(1, 5))  # /dev/zero
    except (PermissionError, OSError):
        pytest.skip("devices cannot be made here")


def _unreadable(path: Path, outside: Path) -> None:
    path.write_text("")
    path.chmod(0)


KINDS: dict[str, Callable[[Path, Path], object]] = {
    "fifo": lambda path, outside: os.mkfifo(path),
    "socket": _socket,
    "directory": lambda path, outside: path.mkdir(),
    "full directory": lambda path, outside: (path / "inside").mkdir(parents=True),
    "device": _device,
    "unreadable file": _unreadable,
    "link to a file": lambda path, outside: path.symlink_to(outside / "file"),
    "link to a directory": lambda path, outside: path.symlink_to(outside),
    "link to nothing": lambda path, outside: path.symlink_to(outside / "new"),
    "link to itself": lambda path, outside: path.symlink_to(path),
    "link to a device": lambda path, outside: path.symlink_to("/dev/zero"),
    "link to a fifo": lambda path, outside: path.symlink_to(outside / "fifo"),
    "hard link": lambda path, outside: os.link(outside / "file", path),
}


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    def hangs(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def trained(run: Path | None) -> tuple[list[torch.Tensor], Monitor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, optimizer, console=False, run_dir=run, every=1) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.ones(5, 4)), torch.tensor([0, 1, 2, 0, 1]))
            loss.backward()
            optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()], monitor


def asked(*arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        assert cli.main([*arguments]) in (0, 2)
    assert "Traceback" not in out.getvalue()
    return out.getvalue()


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES, ids=[name.replace(str(os.getpid()), "PID") for name in NAMES])
def test_a_foreign_file_costs_at_most_the_files(name: str, kind: str, tmp_path: Path) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    run.mkdir()
    (outside / "file").write_text(PRECIOUS)
    os.mkfifo(outside / "fifo")
    before = contents(outside)
    KINDS[kind](run / name, outside)
    bare, _ = trained(None)
    weights, monitor = trained(run)
    assert all(torch.equal(one, two) for one, two in zip(weights, bare, strict=True))
    failed = [note.message for note in monitor.notes if note.code.startswith("failed")]
    assert all("run_dir=" in message for message in failed), failed
    asked("report", str(run))
    asked("report", str(run), "--json")
    asked("tail", str(run))
    assert contents(outside) == before and len(list(outside.iterdir())) == 2


@pytest.mark.parametrize("name", ["run.json", "readings.jsonl", "alerts.jsonl", "replays.jsonl"])
def test_a_huge_file_takes_neither_time_nor_memory_nor_disk(name: str, tmp_path: Path) -> None:
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 37)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights, monitor = trained(tmp_path)
    assert all(torch.equal(one, two) for one, two in zip(weights, trained(None)[0], strict=True))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    assert sum(path.stat().st_blocks for path in tmp_path.iterdir()) < 100_000
    assert not [note for note in monitor.notes if note.code.startswith("failed")]


def test_a_link_as_the_directory_itself_is_followed_once(tmp_path: Path) -> None:
    (tmp_path / "runs" / "7").mkdir(parents=True)
    (tmp_path / "runs" / "8").mkdir()
    latest = tmp_path / "latest"
    latest.symlink_to(tmp_path / "runs" / "7")
    sink = RunDirectory(latest)
    sink.start(INFO)
    latest.unlink()
    latest.symlink_to(tmp_path / "runs" / "8")
    sink.went_back()  # writes run.json again, by its path
    assert list((tmp_path / "runs" / "8").iterdir()) == []


def test_a_changed_working_directory_does_not_move_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "two")
    trained(Path("run"))
    other = (tmp_path / "two" / "run" / "run.json").read_bytes()
    monkeypatch.chdir(tmp_path / "one")
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    monitor = Monitor(model, optimizer, head=model, console=False, run_dir="run")
    monkeypatch.chdir(tmp_path / "two")
    monitor.note("mine", "A note.")
    monitor.close()
    assert (tmp_path / "two" / "run" / "run.json").read_bytes() == other
    assert [note.code for note in read_run(tmp_path / "one" / "run").notes][-1] == "mine"
    assert monitor.run_dir == str(tmp_path / "one" / "run")


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(4, 3)
    Monitor(model, torch.optim.Adam(model.parameters()), head=model, console=False, run_dir="~/7").close()
    assert (tmp_path / "home" / "7" / "run.json").is_file() and not (tmp_path / "~").exists()


def test_two_open_monitors_do_not_share_a_directory(tmp_path: Path) -> None:
    def attach() -> tuple[Callable[[], None], Monitor]:
        model = nn.Linear(4, 3)
        optimizer = torch.optim.Adam(model.parameters())
        monitor = Monitor(model, optimizer, head=model, console=False, run_dir=tmp_path, every=1)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(torch.ones(3, 4)), torch.arange(3)).backward()
            optimizer.step()

        return step, monitor

    first, second = attach(), attach()
    for _ in range(4):
        first[0]()
        second[0]()
    said = [note.message for note in second[1].notes if note.code.startswith("failed")]
    assert len(said) == 1 and "in use: another open monitor of this process" in said[0]
    assert "Close that monitor first" in said[0]
    second[1].close()
    first[1].close()
    record = read_run(tmp_path)
    assert record.history["gradient_norm"][0].tolist() == [1, 2, 3, 4] and record.problems == []
    third = attach()
    assert not [note for note in third[1].notes if note.code.startswith("failed")], "free again"
    del first, second, third
    gc.collect()
    fourth = attach()[1]
    assert not [note for note in fourth.notes if note.code.startswith("failed")], "the third one is gone"
    fourth.close()


def test_a_removed_file_is_noticed_while_another_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = RunDirectory(tmp_path)
    sink.start(INFO)
    sink.alert(AT_RISK, Change.BEGIN)
    (tmp_path / "alerts.jsonl").unlink()
    now = [1e6]
    monkeypatch.setattr("nfi_monitor.report.run_directory.writer.time.monotonic", lambda: now[0])
    with pytest.raises(OSError, match=r"alerts\.jsonl: it was deleted"):
        for step in range(1, 10):
            now[0] += CHECK_SECONDS / 2
            sink.reading(Reading(step, {"loss": 1.0}), Phase.HEALTHY)


def test_a_removed_working_directory_costs_the_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    _, monitor = trained(Path("run"))
    assert any("cannot write" in note.message for note in monitor.notes)
    monkeypatch.chdir(tmp_path)


def test_a_file_without_an_end_of_line_is_not_read_whole(tmp_path: Path) -> None:
    RunDirectory(tmp_path).start(INFO)
    with open(tmp_path / "alerts.jsonl", "wb") as file:
        file.truncate(1 << 34)  # sixteen gigabytes of holes
    asked("tail", str(tmp_path))
