"""Example 08 as a person starts it: the same seed with the Autopilot and without."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from nfi_monitor import AlertKind
from nfi_monitor.report.run_directory.reader import read_run
from tests.examples.test_examples import PNG, example

NAME = "08_autopilot"


def slingshots(run: Path) -> list[int]:
    return [alert.first_step for alert in read_run(run).alerts if alert.kind is AlertKind.SLINGSHOT]


@pytest.mark.slow
def test_the_slingshot_of_the_run_as_it_is_does_not_come_with_the_autopilot(tmp_path: Path) -> None:
    printed = example(NAME, "--out", "out", cwd=tmp_path)
    assert "warned, the Autopilot acted, and no slingshot" in printed
    start, *_ = slingshots(tmp_path / "out" / "alone")
    assert slingshots(tmp_path / "out" / "autopilot") == []
    [note] = [note for note in read_run(tmp_path / "out" / "autopilot").notes if "autopilot" in note.code]
    assert "zero_sum_cross_entropy" in note.message and note.step < start
    assert re.search(rf"loss {note.step} ", printed) and str(start) in printed
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(PNG)


def test_short_runs_claim_nothing_and_an_older_run_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Any = importlib.import_module("examples.08_autopilot").main
    out = str(tmp_path / "out")
    assert run(["--steps", "20", "--out", out, "--dry-run"]) == 0
    assert "nothing to avert" in capsys.readouterr().out
    for arguments, complaint in (
        (["--out", out], "holds runs already"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(arguments)
        assert stopped.value.code == 2 and complaint in capsys.readouterr().err
