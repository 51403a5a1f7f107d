from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nfi_monitor import __version__
from nfi_monitor.cli import main
from nfi_monitor.cli.tail import Tail
from nfi_monitor.report import figure
from nfi_monitor.report.run_directory.thinning import thin
from nfi_monitor.report.run_directory.writer import RunDirectory
from nfi_monitor.report.summary import Summary
from nfi_monitor.types import Change, Note, Phase, Reading
from tests.report.builders import AT_RISK, INFO, SLINGSHOT, readings, resolved


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    sink = RunDirectory(path)
    sink.start(INFO)
    for reading, phase in readings(100):
        sink.reading(reading, phase)
        if reading.step == 50:
            sink.note(Note("tied_head", "The head is tied.", 50))
            sink.alert(resolved(AT_RISK, 50), Change.BEGIN)
    sink.alert(SLINGSHOT, Change.BEGIN)
    sink.close(INFO, Summary())
    return path


def lines(text: str) -> list[dict[str, Any]]:
    def refuse(word: str) -> object:
        raise AssertionError(f"not strict JSON: {word}")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_report_prints_the_summary_and_writes_the_figure(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert "Slingshots and their warnings" in out and f"figure: {run / 'report.png'}" in out
    assert (run / "report.png").stat().st_size > 10_000


def test_report_json_is_json_and_nothing_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["slingshots"][0]["start"] == 895
    assert not (run / "report.png").exists()


def test_report_goes_on_without_matplotlib(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any, **kwargs: Any) -> None:
        raise ImportError('Figures need matplotlib: pip install "nfi-monitor[plots]"')

    monkeypatch.setattr(figure, "draw", missing)
    assert main(["report", str(run)]) == 0
    assert 'no figure: Figures need matplotlib: pip install "nfi-monitor[plots]"' in capsys.readouterr().out


def test_report_names_what_it_could_not_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(run / "readings.jsonl", "a") as file:
        file.write('{"step": 101, "pha')
    assert main(["report", str(run), "--no-figure"]) == 0
    assert "skipped 1 torn line (last)" in capsys.readouterr().out


def test_a_figure_that_cannot_be_written_where_asked_is_an_error(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["report", str(run), "--figure", str(run / "run.json" / "x.png")]) == 2
    assert "--figure" in capsys.readouterr().err
    assert main(["report", str(run), "--figure", str(run / "x.novel")]) == 2


@pytest.mark.parametrize("command", ["report", "tail"])
def test_an_unreadable_run_is_one_line_on_stderr_and_exit_code_2(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path / "nowhere")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "does not exist" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [[], ["reprot"], ["tail"], ["tail", "x", "-n", "-1"], ["tail", "x", "-n", "many"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and __version__ in capsys.readouterr().out


def test_tail_shows_the_last_readings_and_alerts_in_the_order_of_steps(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tail", str(run), "-n", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown] == ["50", "50", "99", "100", "895"]
    assert "slingshot-1: slingshot: the loss has risen far above its usual level" in shown[-1]
    assert "recovering" in shown[-2] and "zero-sum violation 0.7" in shown[-2]


def test_tail_json_is_strict_json_lines_with_a_type(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(run / "readings.jsonl", "a") as file:
        file.write('{"step": 101, "phase": "healthy", "values": {"loss": null, "aura": "odd"}}\n{"step": 1')
    assert main(["tail", str(run), "--json", "-n", "3"]) == 0
    records = lines(capsys.readouterr().out)
    assert [record["type"] for record in records] == [
        "note",
        "alert",
        "reading",
        "reading",
        "reading",
        "alert",
    ]
    assert records[-2]["values"]["loss"] is None
    assert main(["tail", str(run)]) == 0  # and plain words survive the odd record
    assert "loss not finite" in capsys.readouterr().out


def test_tail_of_nothing_is_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tail", str(run), "-n", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1  # the note
    (run / "readings.jsonl").unlink()
    (run / "alerts.jsonl").unlink()
    assert main(["tail", str(run)]) == 0


def test_tail_reads_the_end_of_a_long_file_only(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(run / "readings.jsonl", "r+b") as file:
        file.truncate(1 << 30)  # a gigabyte of holes before the last line
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"step": 7, "phase": "healthy", "values": {}}\n' * 300)
    assert [record["step"] for record in Tail(run / "readings.jsonl").last(5)] == [7] * 5
    os.truncate(run / "readings.jsonl", 0)


def test_follow_shows_what_is_appended_and_ends_quietly_when_interrupted(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = RunDirectory(run)
    sink.start(INFO)
    polls = 0

    def step(seconds: float) -> None:
        nonlocal polls
        polls += 1
        if polls == 1:
            sink.reading(Reading(101, {"loss": 1.0}), Phase.HEALTHY)
            with open(run / "alerts.jsonl", "a") as file:
                file.write('{"change": "end", "alert": ')  # half a line now,
        elif polls == 2:
            with open(run / "alerts.jsonl", "a") as file:
                file.write(json.dumps(resolved(SLINGSHOT, 905).to_json()) + "}\n")  # the rest later
            sink.note(Note("no_loss", "No loss.", 102))
        elif polls == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("nfi_monitor.cli.tail.time.sleep", step)
    assert main(["tail", str(run), "--json", "--follow", "-n", "0"]) == 130
    records = lines(capsys.readouterr().out)
    assert [record["type"] for record in records] == ["note", "reading", "note", "alert"]
    assert records[1]["step"] == 101 and records[-1]["alert"]["state"] == "resolved"


def test_a_reader_that_leaves_early_is_no_error(run: Path) -> None:
    with open(run / "readings.jsonl", "a") as file:
        for step in range(101, 5000):
            file.write(json.dumps({"step": step, "phase": "healthy", "values": {"loss": 1.0}}) + "\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "nfi_monitor", "tail", str(run), "--json", "-n", "5000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(30) == 0


def test_the_command_line_imports_no_torch_and_speaks_ascii(run: Path) -> None:
    code = (
        "import sys; from nfi_monitor.cli import main; "
        f"a = main(['report', {str(run)!r}, '--no-figure']); b = main(['tail', {str(run)!r}]); "
        "assert 'torch' not in sys.modules, 'torch'; assert 'matplotlib' not in sys.modules; sys.exit(a or b)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"|mu_G|" in done.stdout and b"?" not in done.stdout


def test_demo_hands_its_arguments_to_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    module = SimpleNamespace(main=lambda argv: seen.append(argv))
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    assert main(["demo", "--steps", "10", "--help"]) == 0
    assert seen == [["--steps", "10", "--help"]]


@pytest.mark.parametrize(
    ("missing", "words"),
    [("nfi_monitor.examples", "not installed. Install the package"), ("sklearn", "pip install sklearn")],
)
def test_a_demo_that_cannot_start_says_why(
    missing: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(importlib, "import_module", fail)
    assert main(["demo"]) == 2
    assert words in capsys.readouterr().err


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupt)
    assert main(["demo"]) == 130


def test_report_to_a_file_is_wide_enough_for_its_tables(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    assert main(["report", str(run), "--no-figure"]) == 0
    assert "numerical feature inflation         86%" in file.getvalue()


def test_a_followed_tail_goes_on_where_it_was_when_readings_are_thinned(tmp_path: Path) -> None:
    path = tmp_path / "readings.jsonl"
    lines = [f'{{"step": {n}, "phase": "healthy", "values": {{"loss": 1.0}}}}\n' for n in range(1000, 1100)]
    path.write_text("".join(lines[:90]))
    tail = Tail(path)
    assert [record["step"] for record in tail.last(2)] == [1088, 1089]
    with open(path, "a") as file:
        file.writelines(lines[90:95])
    thin(path)
    with open(path, "a") as file:
        file.writelines(lines[95:])
    assert [record["step"] for record in tail.more()] == list(range(1090, 1100))
    assert tail.more() == []


def test_tail_of_fifty_thousand_notes_ends(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    info["notes"] = [{"code": f"c{n}", "message": "x", "step": n} for n in range(50_000)]
    (run / "run.json").write_text(json.dumps(info), encoding="utf-8")
    started = time.process_time()
    assert main(["tail", str(run), "-n", "1"]) == 0
    assert capsys.readouterr().out.count(" note ") == 50_000
    assert time.process_time() - started < 20
