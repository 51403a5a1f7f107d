"""Example 07 on two processes; the slow tests start it as its docstring does, under torchrun."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nfi_monitor import AlertKind
from nfi_monitor.report.run_directory.reader import read_run
from tests.examples.started import ROOT, started

NAME = "07_ddp"
EXAMPLE = str(ROOT / "examples" / f"{NAME}.py")


def both_ranks(*arguments: str, cwd: Path) -> str:
    """What two processes print that have what torchrun gives its own: ranks, and where they meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        started(NAME, *arguments, cwd=cwd, environment=world | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    return "".join([rank.printed() for rank in ranks])


def start(*arguments: str, cwd: Path) -> str:
    """What both ranks print under torchrun, on either stream."""
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


def test_rank_0_speaks_and_nobody_else_speaks_or_writes(tmp_path: Path) -> None:
    printed = both_ranks("--steps", "120", "--run-dir", "run", cwd=tmp_path)
    assert printed.count("nfi  watching") == 1
    lines = (tmp_path / "run" / "readings.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, 121)), "one process writes, once"


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--fully-shard",)])
def test_both_ranks_stop_after_the_slingshot_it_warned_of(options: tuple[str, ...], tmp_path: Path) -> None:
    printed = start(*options, "--run-dir", "run", cwd=tmp_path)
    first = begins(tmp_path / "run")
    assert first[AlertKind.AT_RISK] < first[AlertKind.IMMINENT] < first[AlertKind.SLINGSHOT]
    assert printed.count("after-run report") == 1
    assert len(re.findall("nfi  step .* WARNING +at risk", printed)) == 1


@pytest.mark.slow
def test_the_cure_it_names_averts_the_slingshot(tmp_path: Path) -> None:
    start("--loss-dtype", "float64", "--run-dir", "run", cwd=tmp_path)
    assert begins(tmp_path / "run") == {}


def test_started_without_torchrun_it_says_how(tmp_path: Path) -> None:
    code, printed = started(NAME, cwd=tmp_path).wait()
    assert code != 0 and "torchrun --nproc-per-node 2" in printed
