"""Whatever happens while a file is replaced, the old one or the new one is there, whole."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nfi_monitor.atomic_write import remove_leftovers, replacing
from tests.safety.killed import Child, limit_file_size

OLD, NEW = b"old\n" * 100, b"new\n" * 50_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_bytes(OLD)
    return path


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.iterdir()}


def test_the_new_file_is_seen_when_the_block_has_ended_and_not_before(path: Path) -> None:
    with replacing(path) as file:
        file.write(NEW)
        file.flush()
        assert path.read_bytes() == OLD
    assert files(path) == {"run.json": NEW}


def test_where_there_is_no_file_one_is_made(tmp_path: Path) -> None:
    with replacing(tmp_path / "at4.pt") as file:
        file.write(NEW)
    assert files(tmp_path / "at4.pt") == {"at4.pt": NEW}


def test_all_of_it_is_on_the_disk_before_it_takes_the_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync, replace = os.fsync, os.replace

    def look_and_sync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    def look_and_replace(source: Path, target: Path) -> None:
        assert synced == [len(NEW)]
        replace(source, target)

    monkeypatch.setattr(os, "fsync", look_and_sync)
    monkeypatch.setattr(os, "replace", look_and_replace)
    with replacing(path) as file:
        file.write(NEW)
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error, match="in the middle"), replacing(path) as file:
        file.write(NEW)
        raise error("in the middle")
    assert files(path) == {"run.json": OLD}


@pytest.mark.parametrize("limit", [0, 1, len(NEW) // 2, len(NEW) - 1])
def test_a_full_disk_is_an_oserror_and_leaves_the_old_file_and_nothing_else(path: Path, limit: int) -> None:
    def work(done: Callable[[int], None]) -> None:
        limit_file_size(limit)
        with pytest.raises(OSError, match="File too large"), replacing(path) as file:
            file.write(NEW)
        done(1)

    child = Child(work)
    assert child.wait() == "" and child.done == 1
    assert files(path) == {"run.json": OLD}


def test_a_name_that_cannot_be_taken_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "run.json") as file:
        file.write(NEW)
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_directory_that_is_gone_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "gone" / "run.json"):
        raise AssertionError("there is nothing to write to")


def test_a_killed_write_leaves_the_old_file_and_what_it_left_can_be_removed(path: Path) -> None:
    def work(done: Callable[[int], None]) -> None:
        with replacing(path) as file:
            file.write(NEW)
            file.flush()
            done(1)
            time.sleep(60)

    other = path.with_name(".readings.jsonl.4711.tmp")
    other.write_bytes(NEW)
    child = Child(work)
    child.kill(0, begun=True)
    left = f".run.json.{child.pid}.tmp"
    assert files(path) == {"run.json": OLD, left: NEW, other.name: NEW}
    remove_leftovers(path)
    assert files(path) == {"run.json": OLD, other.name: NEW}
