"""Disks that fill up, directories that go away, processes that are killed: what is on disk is right."""

from __future__ import annotations

import errno
import importlib
import os
import random
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nfi_monitor import Monitor
from nfi_monitor.report.run_directory.files import RunDirectoryError
from nfi_monitor.report.run_directory.lock import DirectoryInUseError, DirectoryLock
from nfi_monitor.report.run_directory.reader import read_run
from nfi_monitor.report.run_directory.writer import RunDirectory
from nfi_monitor.types import Phase
from tests.runs import batch, differences, mlp, snapshot
from tests.safety.killed import Child, alert_of, limit_file_size, reading_of, write
from tests.safety.table import Shown

UNBOUNDED = 1 << 40


def wrong_in(directory: Path, done: int, last: set[int], *, thinned: bool) -> list[str]:
    """What the reader shows that :func:`write` did not write, or does not show that it did.

    ``done``: the last step that was written whole, with all that belongs to it. ``last``: which steps may be
    the last one that is there.
    """
    try:
        record = read_run(directory)
    except RunDirectoryError as error:
        return [] if 0 in last else [str(error)]  # killed before there was anything
    steps, losses = (column.tolist() for column in record.history["loss"])
    wrong = [f"step {a} before step {b}" for a, b in pairwise(steps) if a >= b]
    wrong += [f"loss {x} at step {n}" for n, x in zip(steps, losses, strict=True) if x != 1.0 / n]
    for name in ("zero_sum_violation", "update_rms"):
        for n, x in zip(*(column.tolist() for column in record.history[name]), strict=True):
            wrong += [f"{name} {x} at step {n}"] * (reading_of(n)[0].values.get(name) != x)
    found = steps[-1] if steps else 0
    if found not in last:
        wrong.append(f"the last reading is of step {found}, which is none of {sorted(last)}")
    every = list(range(1, found + 1))
    # Thinning leaves the newer half of the file as it was.
    dense = steps[-len(steps) // 4 :] if thinned else steps
    if dense != every[len(every) - len(dense) :]:
        wrong.append(f"{len(steps)} of {found} readings")
    phases = [(0, Phase.HEALTHY)]
    for n in every:
        if (phase := reading_of(n)[1]) is not phases[-1][1]:
            phases.append((n, phase))
    if record.phases != phases:
        wrong.append(f"phases {record.phases[-3:]}, not {phases[-3:]}")
    told = {}
    for n in every:
        change = alert_of(n)
        if change is not None and (n <= done or change[0] in record.alerts):
            told[change[0].id] = change[0]
    if record.alerts != list(told.values()):
        wrong.append(f"alerts {record.alerts[-2:]}, not {list(told.values())[-2:]}")
    known = ("torn", "replaced", "run.json: missing" if 0 in last else "torn")
    return wrong + [problem for problem in record.problems if not any(word in problem for word in known)]


def kill_again_and_again(directory: Path, kills: int, chance: random.Random, budget: int) -> list[str]:
    """One run that is killed so often while it writes, and resumed from a checkpoint each time.

    Kills before the first step of a session is whole come on top: what was there has to stay.
    """
    done, last, written = 0, {0}, 0
    number = whole = 0
    while whole < kills:
        number += 1
        checkpoint = max(0, done - chance.randrange(12))
        child = Child(lambda said, first=checkpoint + 1: write(directory, budget, first, said))
        child.kill(chance.choice((0.002, 0.01, 0.03)) * chance.random(), begun=chance.random() < 0.7)
        if child.done:
            done = child.done
            last = {done, done + 1}
            written += done - checkpoint
            whole += 1
        else:  # before its first step was whole: it may have replaced what was there, or not
            done = checkpoint
            last |= {checkpoint + 1}
        found = wrong_in(directory, done, last, thinned=budget < UNBOUNDED)
        if found:
            return [f"after kill {number}: {found}"]
    assert written > 2 * kills, "they are killed too soon to show anything"
    return []


@pytest.mark.parametrize("budget", [UNBOUNDED, 20_000], ids=["unbounded", "thinned"])
def test_what_was_written_before_a_kill_is_read_back_right(tmp_path: Path, budget: int) -> None:
    chance = random.Random(budget)
    assert [kill_again_and_again(tmp_path / str(run), 6, chance, budget) for run in range(2)] == [[]] * 2


@pytest.mark.slow
def test_what_was_written_before_any_of_many_kills_is_read_back_right(tmp_path: Path, shown: Shown) -> None:
    chance, wrong, kills = random.Random(1), [], Counter[int]()
    for run in range(30):
        budget = UNBOUNDED if run % 2 else 20_000
        wrong += kill_again_and_again(tmp_path / str(run), 20, chance, budget)
        kills[budget] += 20
    assert wrong == []
    shown("storage", kills[UNBOUNDED], "kills of a writer that keeps every reading")
    shown("storage", kills[20_000], "kills of a writer that thins its readings")


def training(run_dir: Path | None, steps: int, done: Callable[[int], None] | None = None) -> tuple[Any, ...]:
    """Absorbs from the first step on, and reads every step."""
    model = mlp()
    with torch.no_grad():
        model[-1].weight.mul_(40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    inputs, targets = batch()
    monitor = None
    if run_dir is not None:
        monitor = Monitor(model, optimizer, run_dir=run_dir, console=False, every=1)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        if monitor is not None:
            monitor.observe_loss(loss)
        loss.backward()
        optimizer.step()
        if done is not None:
            done(step)
    return model, optimizer, monitor


def monitors_killed(directory: Path, kills: int, chance: random.Random) -> list[str]:
    """Trainings under a monitor are killed; what is read back is what the whole run has measured.

    So many of those that had come as far as to write something; the others come on top.
    """
    expected = training(directory / "whole", 150)[2]
    assert expected is not None
    expected.close()
    whole, wrong = read_run(directory / "whole"), []
    number = read = 0
    while read < kills:
        number += 1
        run = directory / str(number)
        child = Child(lambda said, run=run: training(run, 150, said) and None)
        child.kill(0.3 * chance.random())
        if not (run / "readings.jsonl").exists():
            continue
        read += 1
        record, done = read_run(run), child.done
        steps = record.history["loss"][0].tolist()
        if steps not in (list(range(1, done + 1)), list(range(1, done + 2))):
            wrong.append(f"kill {number}: {len(steps)} readings of {done}")
        for name in whole.history:
            at, values = record.history[name]
            expected_at, expected_values = (column[: len(at)] for column in whole.history[name])
            if at.tolist() != expected_at.tolist() or values.tobytes() != expected_values.tobytes():
                wrong.append(f"kill {number}: {name} is not what was measured")
        alerts = {alert.id: alert.first_step for alert in record.alerts}
        known = {alert.id: alert.first_step for alert in whole.alerts if alert.first_step <= len(steps)}
        if not alerts.items() <= known.items() or len(known) - len(alerts) > 1:
            wrong.append(f"kill {number}: {alerts}, not {known}")
    return wrong


def test_a_killed_training_leaves_what_it_had_measured(tmp_path: Path) -> None:
    assert monitors_killed(tmp_path, 6, random.Random(2)) == []


@pytest.mark.slow
def test_any_of_many_killed_trainings_leaves_what_it_had_measured(tmp_path: Path, shown: Shown) -> None:
    assert monitors_killed(tmp_path, 200, random.Random(3)) == []
    shown("storage", 200, "kills of a training")


# --- full disks -------------------------------------------------------------------------------------


def filled(directory: Path, limit: int, budget: int) -> list[str]:
    """A writer whose files may not grow beyond ``limit``: it says so, and what was whole is read back."""
    directory.mkdir()

    def work(said: Callable[[int], None]) -> None:
        limit_file_size(limit)
        write(directory, budget, 1, said)

    child = Child(work)
    said = child.wait()
    if "cannot write" not in said or "run_dir=" not in said:
        return [f"limit {limit}: the writer said {said[-300:]!r}"]
    done = child.done
    last = {done, done + 1} if done else {0, 1}  # 0: run.json itself did not fit
    found = wrong_in(directory, done, last, thinned=budget < UNBOUNDED)
    return [f"limit {limit}: {found}"] if found else []


def test_a_full_disk_loses_one_line_at_most_and_says_so(tmp_path: Path) -> None:
    chance = random.Random(4)
    limits = [0, 40, *(chance.randrange(200, 30_000) for _ in range(18))]
    assert [x for i, limit in enumerate(limits) for x in filled(tmp_path / str(i), limit, UNBOUNDED)] == []


@pytest.mark.slow
def test_a_disk_full_at_any_size_loses_one_line_at_most(tmp_path: Path, shown: Shown) -> None:
    wrong, disks = [], Counter[int]()
    for i, limit in enumerate(range(50, 30_050, 50)):
        # A smaller disk is full before there is anything to thin.
        budget = 20_000 if i % 3 == 0 and limit > 20_500 else UNBOUNDED
        wrong += filled(tmp_path / "run", limit, budget)
        shutil.rmtree(tmp_path / "run")
        disks[budget] += 1
    assert wrong == []
    shown("storage", disks[UNBOUNDED], "disks full under a writer that keeps every reading")
    shown("storage", disks[20_000], "disks full under a writer that thins its readings")


def test_a_disk_that_fills_up_under_a_training_is_one_note_and_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = training(None, 20)
    chance, real = random.Random(5), os.write
    for number in range(8):
        left = chance.randrange(1, 20_000)

        def write_some(descriptor: int, data: bytes) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, "No space left on device")
            count = real(descriptor, data[:left])
            left -= count
            return count

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", write_some)
            model, optimizer, monitor = training(tmp_path / str(number), 20)
            monitor.close()
        said = [note.message for note in monitor.notes if note.code == "failed_RunDirectory"]
        assert len(said) == 1 and "No space left" in said[0] and "run_dir=" in said[0]
        assert len(monitor.history["loss"][0]) == 20, "everything else goes on"
        assert not differences(snapshot(model, optimizer), snapshot(*bare[:2]))
        steps = read_run(tmp_path / str(number)).history["loss"][0].tolist()
        assert steps == list(range(1, len(steps) + 1)) and len(steps) < 20


def test_a_full_disk_while_readings_are_thinned_leaves_them_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sink = RunDirectory(tmp_path, readings_bytes=2_000)
    sink.start({})
    with monkeypatch.context() as patched:
        patched.setattr("nfi_monitor.report.run_directory.thinning.os.fsync", full)
        for step in range(1, 41):
            sink.reading(*reading_of(step))
    assert (tmp_path / "readings.jsonl").stat().st_size > 2_000
    assert read_run(tmp_path).history["loss"][0].tolist() == list(range(1, 41))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock", "alerts.jsonl", "readings.jsonl", "run.json"
    ]  # fmt: skip


# --- a shortage of file handles ----------------------------------------------------------------------


@contextmanager
def no_handles() -> Iterator[None]:
    """Take all file handles of this process."""
    importlib.import_module("tracemalloc")  # pytest needs it where a thread fails
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def starved(directory: Path, first: int, last: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Train 20 steps, those from ``first`` to ``last`` without a file handle; 0: the attach, too."""
    monkeypatch.setattr("nfi_monitor.report.sinks.TRY_AGAIN", 0.0)
    shortage = no_handles()
    if first == 0:
        shortage.__enter__()

    def done(step: int) -> None:
        if step == last:
            shortage.__exit__(None, None, None)
        if step == first - 1:
            shortage.__enter__()

    model, optimizer, monitor = training(directory, 20, done)
    monitor.note("own", "made afterwards")
    monitor.close()
    assert not differences(snapshot(model, optimizer), snapshot(*training(None, 20)[:2]))
    return monitor, read_run(directory)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's own writer
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="handles are counted in /proc")
@pytest.mark.parametrize(("first", "last"), [(6, 6), (3, 12), (0, 0), (0, 7)])
def test_a_shortage_of_file_handles_costs_what_comes_meanwhile(
    first: int, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (first, last) == (0, 0):
        last = 1
    monitor, record = starved(tmp_path / "run", first, last, monkeypatch)
    steps = record.history["loss"][0].tolist()
    assert steps == list(range(1 if first else last + 1, 21)), "an open file needs no handle"
    assert record.problems == []
    saved = [note["code"] for note in record.info["notes"]]
    assert "own" in saved and saved.count("failed_RunDirectory") == (first == 0)
    told = [note.message for note in monitor.notes if note.code == "failed_RunDirectory"]
    assert all("Too many open files. Later records are tried" in message for message in told)
    assert "off from now on" not in " ".join(note.message for note in monitor.notes)
    events = [path for path in (tmp_path / "run").iterdir() if "tfevents" in path.name]
    assert max(path.stat().st_size for path in events) > 5_000, "written after the shortage"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="files are named in /proc")
def test_a_record_that_memory_was_short_for_is_the_only_one_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.write, iter(range(1000))

    def write_some(descriptor: int, data: bytes) -> int:
        if not os.readlink(f"/proc/self/fd/{descriptor}").endswith("readings.jsonl"):
            return real(descriptor, data)
        call = next(calls)
        if call == 7:
            return real(descriptor, data[:20])
        if call == 8:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write_some)
        _, _, monitor = training(tmp_path, 20)
        monitor.close()
    record = read_run(tmp_path)
    assert record.history["loss"][0].tolist() == [*range(1, 8), *range(9, 21)]
    assert len(record.problems) == 1 and "torn" in record.problems[0]


# --- directories that go away ------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's own writer
def test_a_directory_removed_on_the_way_is_said_once_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nfi_monitor.report.run_directory.writer.CHECK_SECONDS", 0.0)
    bare = training(None, 12)
    run = tmp_path / "run"
    model, optimizer, monitor = training(run, 12, lambda step: shutil.rmtree(run) if step == 6 else None)
    said = [note.message for note in monitor.notes if note.code == "failed_RunDirectory"]
    assert len(said) == 1 and "it was deleted during the run" in said[0]
    monitor.close()
    assert not differences(snapshot(model, optimizer), snapshot(*bare[:2]))
    assert len(monitor.history["loss"][0]) == 12
    assert not [alert for alert in monitor.notes if alert.code == "failed_close"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into what is read-only")
def test_a_read_only_directory_is_said_and_changes_nothing(tmp_path: Path) -> None:
    check_unwritable(tmp_path)


def check_unwritable(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    bare = training(None, 5)
    model, optimizer, monitor = training(tmp_path / "locked" / "run", 5)
    monitor.close()
    said = [note.message for note in monitor.notes if note.code == "failed_RunDirectory"]
    assert len(said) == 1 and "Permission denied" in said[0] and "run_dir=" in said[0]
    assert not differences(snapshot(model, optimizer), snapshot(*bare[:2]))


@pytest.mark.skipif(os.geteuid() != 0, reason="shown by the test before")
def test_a_directory_of_another_user_is_said_and_changes_nothing() -> None:
    """As root nothing is read-only: a child gives its rights away first."""

    def work(said: Callable[[int], None]) -> None:
        os.setgid(65534)
        os.setuid(65534)
        try:
            os.listdir(directory)
        except PermissionError:
            return
        (said(1), unwritable(directory, said))

    def unwritable(path: Path, said: Callable[[int], None]) -> None:
        bare = training(None, 5)
        model, optimizer, monitor = training(path / "run", 5)
        monitor.close()
        told = [note.message for note in monitor.notes if note.code == "failed_RunDirectory"]
        assert len(told) == 1 and "Permission denied" in told[0] and "run_dir=" in told[0], told
        assert not differences(snapshot(model, optimizer), snapshot(*bare[:2]))
        said(2)

    # Not the test's own directory: its parents are closed to others, and opening them is not ours to do.
    directory = Path(tempfile.mkdtemp())
    try:
        directory.chmod(0o755)
        child = Child(work)
        assert child.wait() == ""
        if child.done == 0:
            pytest.skip(f"{directory.parent} is closed to other users")
        assert child.done == 2
    finally:
        shutil.rmtree(directory)


# --- two processes -----------------------------------------------------------------------------------


def test_a_second_process_in_one_directory_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    _, _, first = training(tmp_path, 3)

    def work(said: Callable[[int], None]) -> None:
        with pytest.raises(DirectoryInUseError, match=rf"in use: process {os.getppid()} on .*run_dir="):
            DirectoryLock(tmp_path).acquire()
        bare = training(None, 3)
        model, optimizer, second = training(tmp_path, 3)
        told = [note.message for note in second.notes if note.code == "failed_RunDirectory"]
        assert len(told) == 1 and f"process {os.getppid()}" in told[0]
        assert not differences(snapshot(model, optimizer), snapshot(*bare[:2]))
        second.close()
        said(1)

    before = sorted(path.name for path in tmp_path.iterdir())
    child = Child(work)
    assert child.wait() == "" and child.done == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "not one file of the second one"
    first.close()
    assert read_run(tmp_path).history["loss"][0].tolist() == [1, 2, 3]
    child = Child(lambda said: DirectoryLock(tmp_path).acquire())
    assert child.wait() == "", "free again"


def test_a_killed_process_holds_nothing_and_a_forked_one_neither(tmp_path: Path) -> None:
    def hold(said: Callable[[int], None]) -> None:
        lock = DirectoryLock(tmp_path)
        lock.acquire()
        said(1)
        time.sleep(60)
        lock.release()

    child = Child(hold)
    while not child.done:
        time.sleep(0.001)
    with pytest.raises(DirectoryInUseError, match=f"process {child.pid} "):
        DirectoryLock(tmp_path).acquire()
    child.kill(0)
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    worker = Child(
        lambda said: lock.release()
    )  # inherits the object, and must not give up what is not its own
    assert worker.wait() == ""
    refused = Child(lambda said: DirectoryLock(tmp_path).acquire())
    assert "DirectoryInUseError" in refused.wait()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_within_one_process_a_resumed_run_takes_over_and_counts_as_a_session(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path)
    first.start({})
    second = RunDirectory(tmp_path)
    for sink, steps in ((first, range(1, 6)), (second, range(4, 9))):
        if sink is second:
            sink.start({})
        for step in steps:
            sink.reading(*reading_of(step))
    assert read_run(tmp_path).history["loss"][0].tolist() == list(range(1, 9))
