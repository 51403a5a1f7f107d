"""Example 07 as its docstring starts it: under torchrun, on two processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nfi_monitor import AlertKind
from nfi_monitor.report.jsonl import read_run
from tests.examples.test_examples import ROOT

EXAMPLE = str(ROOT / "examples" / "07_ddp.py")


def start(*arguments: str, cwd: Path) -> str:
    """What both ranks print, on either stream."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", EXAMPLE, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment | {"PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def begins(folder: Path) -> dict[AlertKind, int]:
    """The first step of each kind of alert that was written."""
    return {alert.kind: alert.first_step for alert in reversed(read_run(folder).alerts)}


def test_rank_0_warns_and_nobody_else_speaks_or_writes(tmp_path: Path) -> None:
    printed = start("--steps", "600", "--run-dir", "run", cwd=tmp_path)
    assert printed.count("nfi  watching") == 1
    assert len(re.findall("nfi  step .* WARNING +at risk", printed)) == 1
    assert begins(tmp_path / "run").keys() == {AlertKind.AT_RISK}
    lines = (tmp_path / "run" / "readings.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, 601)), "one process writes, once"


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--fully-shard",)])
def test_both_ranks_stop_after_the_slingshot_it_warned_of(options: tuple[str, ...], tmp_path: Path) -> None:
    printed = start(*options, "--run-dir", "run", cwd=tmp_path)
    first = begins(tmp_path / "run")
    assert first[AlertKind.AT_RISK] < first[AlertKind.IMMINENT] < first[AlertKind.SLINGSHOT]
    assert printed.count("after-run report") == 1


@pytest.mark.slow
def test_the_cure_it_names_averts_the_slingshot(tmp_path: Path) -> None:
    start("--loss-dtype", "float64", "--run-dir", "run", cwd=tmp_path)
    assert begins(tmp_path / "run") == {}


def test_started_without_torchrun_it_says_how(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, EXAMPLE], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode != 0
    assert "torchrun --nproc-per-node 2" in done.stderr
