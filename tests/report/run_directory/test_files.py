from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nfi_monitor.report.run_directory.files import READINGS, RunDirectoryError
from nfi_monitor.report.run_directory.reader import read_run
from nfi_monitor.report.run_directory.writer import RunDirectory
from nfi_monitor.report.summary import Summary, summarize
from nfi_monitor.types import Change, Note, Phase, Reading
from tests.report.builders import AT_RISK, INFO, SLINGSHOT, readings, recorded, resolved


def write(path: Path, steps: range, phase: Phase = Phase.HEALTHY, *, close: bool = True) -> RunDirectory:
    sink = RunDirectory(path)
    sink.start(INFO)
    for step in steps:
        sink.reading(Reading(step, {"loss": 1.0 / step}), phase)
    if close:
        sink.close(INFO, Summary())
    return sink


def strict(line: str) -> object:
    def refuse(word: str) -> object:
        raise AssertionError(f"not strict JSON: {word}")

    return json.loads(line, parse_constant=refuse)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    run = readings(200)
    note = Note("no_loss", "No loss to look at.", 5)
    sink = RunDirectory(tmp_path / "made" / "on the way")
    sink.start(INFO)
    for reading, phase in run:
        sink.reading(reading, phase)
    sink.note(note)
    sink.alert(AT_RISK, Change.BEGIN)
    sink.alert(resolved(AT_RISK, 895), Change.END)
    sink.alert(SLINGSHOT, Change.BEGIN)
    sink.close(INFO, Summary())

    record = read_run(sink.path)
    history, phases = recorded(run)
    for name in history.names():
        np.testing.assert_array_equal(record.history[name], history[name])
    assert record.phases == phases
    assert record.alerts == [resolved(AT_RISK, 895), SLINGSHOT]
    assert record.notes == [note]
    assert record.info["head"] == INFO["head"] and record.problems == []


def test_live_and_offline_say_the_same(tmp_path: Path) -> None:
    run = readings(300)
    run.append((Reading(301, {"loss": math.inf, "zero_sum_violation": math.nan}), Phase.HEALTHY))
    alert = replace(
        AT_RISK,
        evidence={**AT_RISK.evidence, "loss": replace(AT_RISK.evidence["absorbed_fraction"], value=math.nan)},
    )
    sink = RunDirectory(tmp_path)
    sink.start(INFO)
    for reading, phase in run:
        sink.reading(reading, phase)
    sink.alert(alert, Change.BEGIN)
    sink.close(INFO, Summary())
    record = read_run(tmp_path)
    live = summarize(INFO, *recorded(run), [alert], [])
    offline = summarize(record.info, record.history, record.phases, record.alerts, record.notes)
    assert offline == live and str(offline) == str(live)


def test_every_line_is_strict_json_even_of_nan(tmp_path: Path) -> None:
    sink = RunDirectory(tmp_path)
    sink.start({**INFO, "lr": math.nan, "odd": {1, 2}, "shape": (3, math.inf)})
    sink.reading(Reading(1, {"loss": math.nan, "weight_norm": math.inf}), Phase.HEALTHY)
    sink.alert(
        replace(AT_RISK, evidence={"loss": replace(AT_RISK.evidence["absorbed_fraction"], value=math.nan)}),
        Change.BEGIN,
    )
    sink.close(INFO, Summary())
    for name in ("readings.jsonl", "alerts.jsonl"):
        for line in (tmp_path / name).read_text().splitlines():
            strict(line)
    strict((tmp_path / "run.json").read_text())
    assert strict((tmp_path / "readings.jsonl").read_text()) == {
        "step": 1, "phase": "healthy", "values": {"loss": None, "weight_norm": None},
    }  # fmt: skip
    steps, values = read_run(tmp_path).history["loss"]
    assert list(steps) == [1] and math.isnan(values[0])


def test_a_killed_run_loses_at_most_its_last_line_and_the_reader_says_so(tmp_path: Path) -> None:
    write(tmp_path, range(1, 11), close=False)  # no close: as if killed
    with open(tmp_path / "readings.jsonl", "ab") as file:
        file.write(b'{"step": 11, "phase": "hea')
    with open(tmp_path / "alerts.jsonl", "ab") as file:
        file.write('{"change": "begin", "alert": {"id": "μ'.encode()[:-1])  # inside a character
    record = read_run(tmp_path)
    assert list(record.history["loss"][0]) == list(range(1, 11))
    assert record.problems == [
        "readings.jsonl: skipped 1 torn line (last)",
        "alerts.jsonl: skipped 1 torn line (last)",
    ]


def test_each_line_is_on_disk_at_once_and_is_one_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = write(tmp_path, range(1, 3), close=False)
    calls: list[bytes] = []
    real = os.write

    def spy(descriptor: int, data: bytes) -> int:
        calls.append(bytes(data))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", spy)
    sink.reading(Reading(3, {"loss": 1.0}), Phase.HEALTHY)
    sink.alert(AT_RISK, Change.BEGIN)
    assert len(calls) == 2 and all(call.endswith(b"\n") and call.count(b"\n") == 1 for call in calls)
    assert (tmp_path / "readings.jsonl").read_bytes().endswith(calls[0])


def test_a_resumed_run_appends_and_does_not_glue_onto_a_torn_line(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    with open(tmp_path / "readings.jsonl", "ab") as file:
        file.write(b'{"step": 6')
    write(tmp_path, range(6, 9))
    record = read_run(tmp_path)
    assert list(record.history["loss"][0]) == list(range(1, 9))
    assert record.problems == ["readings.jsonl: skipped 1 torn line"]


def test_what_a_resumed_run_did_again_replaces_what_it_did_first(tmp_path: Path) -> None:
    sink = write(tmp_path, range(1, 21), close=False)
    sink.alert(replace(AT_RISK, first_step=5, last_step=8), Change.BEGIN)
    sink.alert(replace(AT_RISK, id="at_risk-2", first_step=15, last_step=15), Change.BEGIN)
    again = write(tmp_path, range(11, 14), Phase.ABSORBING, close=False)
    again.alert(replace(AT_RISK, first_step=12, last_step=12), Change.BEGIN)  # ids are counted anew
    record = read_run(tmp_path)
    assert list(record.history["loss"][0]) == list(range(1, 14))
    assert record.phases == [(0, Phase.HEALTHY), (11, Phase.ABSORBING)]
    assert [(alert.id, alert.first_step) for alert in record.alerts] == [("at_risk-1", 5), ("at_risk-1", 12)]
    assert "10 readings were replaced" in record.problems[0]


def test_readings_out_of_order_within_one_run_are_all_kept(tmp_path: Path) -> None:
    sink = write(tmp_path, range(10, 11), close=False)
    for step in (8, 9, 10):  # losses that came late from the device
        sink.reading(Reading(step, {"loss": 1.0}), Phase.HEALTHY)
    assert list(read_run(tmp_path).history["loss"][0]) == [10, 8, 9, 10]


def test_notes_survive_a_resume_and_are_said_once(tmp_path: Path) -> None:
    first, second = Note("a", "first", 1), Note("b", "second", 2)
    sink = write(tmp_path, range(1, 2), close=False)
    sink.note(first)
    sink = write(tmp_path, range(2, 3), close=False)
    sink.note(first)
    sink.note(second)
    sink.close({**INFO, "notes": [{"code": "b", "message": "second", "step": 2}]}, Summary())
    assert read_run(tmp_path).notes == [first, second]


def test_run_json_is_whole_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = write(tmp_path, range(1, 2), close=False)
    before = (tmp_path / "run.json").read_text()

    def fail(source: object, target: object) -> None:
        assert (tmp_path / "run.json").read_text() == before
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"run\.json"):
        sink.note(Note("a", "b", 1))
    assert (tmp_path / "run.json").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alerts.jsonl", "readings.jsonl", "run.json"]


def test_what_a_newer_version_wrote_is_skipped_and_named(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    with open(tmp_path / "readings.jsonl", "a") as file:
        file.write('{"step": 3, "phase": "levitating", "values": {"loss": 1, "aura": 7}, "colour": "red"}\n')
    future = {**AT_RISK.to_json(), "mood": "calm"}
    with open(tmp_path / "alerts.jsonl", "a") as file:
        file.write(json.dumps({"change": "begin", "alert": future, "extra": 1}) + "\n")
        file.write(json.dumps({"change": "begin", "alert": {**future, "id": "x", "kind": "omen"}}) + "\n")
        file.write(json.dumps({"change": "begin", "alert": {"id": "y"}}) + "\n")
    record = read_run(tmp_path)
    assert list(record.history["loss"][0]) == [1, 2, 3]
    assert [alert.id for alert in record.alerts] == ["at_risk-1"]
    assert [problem.split(":")[0] for problem in record.problems] == ["readings.jsonl"] * 2 + ["alerts.jsonl"]
    assert (
        "aura" in record.problems[0] and "levitating" in record.problems[1] and "omen" in record.problems[2]
    )


def test_a_missing_or_broken_run_json_costs_only_what_it_held(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    (tmp_path / "run.json").write_text('{"model": ')
    assert "run.json" in read_run(tmp_path).problems[0]
    (tmp_path / "run.json").unlink()
    record = read_run(tmp_path)
    assert record.info == {} and len(record.history) == 2 and "run.json: missing" in record.problems[0]


def test_a_full_disk_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = write(tmp_path, range(1, 3), close=False)

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"readings\.jsonl.*No space left.*run_dir=") as caught:
        sink.reading(Reading(3, {"loss": 1.0}), Phase.HEALTHY)
    assert caught.value.errno == errno.ENOSPC


def test_a_line_that_the_disk_takes_in_parts_arrives_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = write(tmp_path, range(1, 2), close=False)
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    sink.reading(Reading(2, {"loss": 1.0}), Phase.HEALTHY)
    assert read_run(tmp_path).problems == []
    assert len(read_run(tmp_path).history) == 2


def test_a_file_in_the_way_of_the_directory_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match=r"run.*run_dir="):
        RunDirectory(tmp_path / "run").start(INFO)
    with pytest.raises(OSError, match="run_dir="):
        RunDirectory(tmp_path / "run" / "below").start(INFO)


def test_writing_before_start_or_after_close_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="start"):
        RunDirectory(tmp_path).reading(Reading(1, {}), Phase.HEALTHY)
    sink = write(tmp_path, range(1, 2))
    with pytest.raises(OSError, match="after close"):
        sink.reading(Reading(2, {}), Phase.HEALTHY)


def test_what_is_no_run_directory_is_described(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"nowhere does not exist.*run_dir="):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunDirectoryError, match="it is empty"):
        read_run(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(RunDirectoryError, match=r"found: notes\.txt"):
        read_run(tmp_path)
    with pytest.raises(RunDirectoryError, match="is a file"):
        read_run(tmp_path / "notes.txt")
    write(tmp_path / "float32", range(1, 2))
    with pytest.raises(RunDirectoryError, match=r"contains 1: pass one of .*float32"):
        read_run(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"is a file.*Pass .*float32\."):
        read_run(tmp_path / "float32" / "run.json")


def test_two_thousand_alerts_are_read_back_in_their_last_state(tmp_path: Path) -> None:
    sink = write(tmp_path, range(1, 2), close=False)
    for number in range(2000):
        alert = replace(AT_RISK, id=f"at_risk-{number}", first_step=number, last_step=number)
        sink.alert(alert, Change.BEGIN)
        sink.alert(resolved(alert, number + 1), Change.END)
    alerts = read_run(tmp_path).alerts
    assert [alert.first_step for alert in alerts] == list(range(2000))
    assert all(alert.last_step == alert.first_step + 1 for alert in alerts)


@pytest.mark.parametrize("loss", [0.0, 1.0, 1 / 3, 1e-300, 2, np.int64(3), np.float32(0.1), np.float64(0.1)])
@pytest.mark.parametrize("resumed", [False, True])
def test_losses_that_come_together_are_written_as_those_that_come_alone(
    tmp_path: Path, loss: float, resumed: bool
) -> None:
    steps = (7, 8, 12)
    for name in ("together", "alone"):
        sink = RunDirectory(tmp_path / name)
        sink.start({})
        if resumed:
            sink.went_back()
        if name == "together":
            sink.losses([(step, loss) for step in steps], Phase.ABSORBING)
        else:
            for step in steps:
                sink.reading(Reading(step, {"loss": float(loss)}), Phase.ABSORBING)
        sink.close({}, Summary())
    together, alone = ((tmp_path / name / READINGS).read_bytes() for name in ("together", "alone"))
    assert together == alone and together.count(b"\n") == 3
