from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from nfi_monitor.report.run_directory.reader import read_run
from nfi_monitor.report.run_directory.thinning import thin
from nfi_monitor.report.run_directory.writer import RunDirectory
from nfi_monitor.types import Change, Phase, Reading
from tests.report.builders import AT_RISK, INFO, resolved


def line(step: int, phase: str = "healthy", full: bool = False, session: int = 0) -> str:
    values = {"loss": 1.0 / step, "update_rms": float(step)} if full else {"loss": 1.0 / step}
    tail = {"session": session} if session else {}
    return json.dumps({"step": step, "phase": phase, "values": values, **tail}) + "\n"


def steps_after(tmp_path: Path, *lines: str) -> list[int]:
    path = tmp_path / "readings.jsonl"
    path.write_text("".join(lines))
    thin(path)
    return [json.loads(text)["step"] for text in path.read_text().splitlines()]


def test_of_the_older_half_every_second_reading_goes_and_the_newer_half_stays(tmp_path: Path) -> None:
    steps = steps_after(tmp_path, *(line(n) for n in range(1000, 1100)))
    assert steps == [*range(1000, 1050, 2), *range(1050, 1100)]


def test_full_readings_and_losses_are_thinned_apart(tmp_path: Path) -> None:
    """Every second one is full: thinned together, one kind would be lost."""
    path = tmp_path / "readings.jsonl"
    path.write_text("".join(line(n, full=n % 2 == 0) for n in range(1000, 1200)))
    thin(path)
    old = [json.loads(text) for text in path.read_text().splitlines()[:40]]
    assert {len(record["values"]) for record in old} == {1, 2}
    assert [r["step"] for r in old[:4]] == [1000, 1001, 1004, 1005], "one of each kind in four steps"


def test_the_first_reading_of_each_phase_and_of_each_session_stays(tmp_path: Path) -> None:
    phases = ["healthy"] * 3 + ["absorbing"] * 2 + ["inflating"] + ["healthy"] * 4
    lines = [line(1000 + i, phase) for i, phase in enumerate(phases)]
    lines += [line(1008 + i, session=2) for i in range(4)]
    lines += [line(1100 + i, session=2) for i in range(40)]
    kept = steps_after(tmp_path, *lines)
    assert len(kept) < len(lines) and {1000, 1003, 1005, 1006} <= set(kept) and kept.count(1008) >= 1
    text = (tmp_path / "readings.jsonl").read_text()
    assert next(text for text in text.splitlines() if "session" in text) == line(1008, session=2).strip()


def test_lines_that_are_no_readings_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "readings.jsonl"
    strange = ['{"step": 1, "pha\n', '{"new": "kind"}\n', "\n"]
    path.write_text("".join([*strange, *(line(n) for n in range(1000, 1030))]))
    thin(path)
    assert path.read_text().startswith("".join(strange))


def test_what_thinning_keeps_is_kept_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "readings.jsonl"
    path.write_text("".join(line(n, full=n % 5 == 0) for n in range(1000, 1400)))
    before = path.read_text().splitlines()
    for _ in range(4):
        thin(path)
        left = path.read_text().splitlines()
        assert left == [text for text in before if text in set(left)] and len(left) < len(before)
        before = left


def test_a_thinning_that_fails_leaves_the_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "readings.jsonl"
    path.write_text("".join(line(n) for n in range(1000, 1100)))
    before = path.read_bytes()

    def fail(source: object, target: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        thin(path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_run_keeps_to_its_budget_and_its_alerts_and_phases(tmp_path: Path) -> None:
    sink = RunDirectory(tmp_path, readings_bytes=30_000)
    sink.start(INFO)
    largest = 0
    phases = [(0, Phase.HEALTHY)]
    for step in range(1, 5001):
        phase = Phase.ABSORBING if step // 500 % 2 else Phase.HEALTHY
        if phase is not phases[-1][1]:
            phases.append((step, phase))
        sink.reading(Reading(step, {"loss": 1.0 / step}), phase)
        if step % 500 == 0:
            sink.alert(resolved(AT_RISK, 535 + step), Change.END)
        largest = max(largest, (tmp_path / "readings.jsonl").stat().st_size)
    assert 20_000 < largest <= 30_100
    assert len((tmp_path / "alerts.jsonl").read_text().splitlines()) == 10
    record = read_run(tmp_path)
    assert record.phases == phases and record.problems == []
    steps, losses = record.history["loss"]
    assert steps[0] == 1 and steps[-1] == 5000 and losses.tolist() == [1.0 / n for n in steps.tolist()]
    early, late = (np.diff(steps[(a <= steps) & (steps < b)]) for a, b in ((1, 1000), (1000, 2000)))
    assert len(early) > 10 and early.max() == late.max() <= 64, "the oldest are as dense as those after them"


def test_what_a_killed_thinning_left_is_removed_by_the_next_start(tmp_path: Path) -> None:
    (tmp_path / ".readings.jsonl.4711.tmp").write_text(line(1))
    (tmp_path / ".run.json.4711.tmp").write_text("{")
    RunDirectory(tmp_path).start(INFO)
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_an_alert_of_steps_that_were_done_again_is_as_it_was_before_them(tmp_path: Path) -> None:
    """It ended at step 560; the run went back to 550, where it still fired."""
    sink = RunDirectory(tmp_path)
    sink.start(INFO)
    sink.reading(Reading(535, {"loss": 1.0}), Phase.ABSORBING)
    sink.alert(AT_RISK, Change.BEGIN)
    sink.reading(Reading(560, {"loss": 1.0}), Phase.HEALTHY)
    sink.alert(resolved(AT_RISK, 560), Change.END)
    sink = RunDirectory(tmp_path)
    sink.start(INFO)
    sink.reading(Reading(550, {"loss": 1.0}), Phase.ABSORBING)
    assert read_run(tmp_path).alerts == [AT_RISK]
