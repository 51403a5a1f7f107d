"""Run the tests of this folder in a process of their own, one for each file, that has the played accelerator.

``pytest tests/played/test_x.py`` starts ``pytest`` on the same file there, and reports what each test did.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.played import device as played

FOLDER = Path(__file__).resolve().parent
RESULTS = "NFI_TEST_PLAYED_RESULTS"
"""Environment variable: file for the results of the inner process."""
INSIDE = RESULTS in os.environ
LIMIT = 300.0
"""Seconds for the tests of one file."""
_results: dict[str, tuple[str, str]] = {}

if INSIDE:
    DEVICE = played.register()


@cache
def results(file: str, marks: str) -> dict[str, tuple[str, str]]:
    """Return outcome and report of each test of a file with these marks, by the test's name."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, file]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        done = subprocess.run(
            command,
            cwd=FOLDER.parents[1],
            env={**os.environ, RESULTS: str(out)},
            capture_output=True,
            encoding="utf-8",
            timeout=LIMIT,
        )
        assert out.exists(), f"{done.stdout}\n{done.stderr}"
        return {name: (kind, report) for name, (kind, report) in json.loads(out.read_text()).items()}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Outside, report what the test did inside."""
    if INSIDE or FOLDER not in pyfuncitem.path.parents:
        return None
    if played.MISSING:
        pytest.skip(played.MISSING)
    done = results(str(pyfuncitem.path), pyfuncitem.config.getoption("markexpr"))
    outcome, report = done.get(pyfuncitem.name, ("failed", "it did not run"))
    if outcome == "skipped":
        pytest.skip(report)
    assert outcome == "passed", report
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.partition("::")[2]
    if INSIDE and (report.when == "call" or report.outcome != "passed"):
        _results[name] = (report.outcome, str(report.longrepr or ""))


def pytest_sessionfinish() -> None:
    if INSIDE:
        Path(os.environ[RESULTS]).write_text(json.dumps(_results))


@pytest.fixture(autouse=True)
def accelerator() -> Iterator[played.Accelerator]:
    """The device as at the start of a program."""
    played.accelerator.__init__()  # type: ignore[misc]
    yield played.accelerator


@pytest.fixture
def device() -> torch.device:
    return torch.device(played.NAME if INSIDE else "cpu", 0 if INSIDE else None)
