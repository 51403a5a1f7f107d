"""What a run of a million steps leaves in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from nfi_monitor.report.run_directory.reader import read_run
from nfi_monitor.report.run_directory.thinning import READINGS_BYTES
from tests.safety.long_run import MIB, run
from tests.safety.table import Shown


def test_a_run_far_beyond_its_budgets_grows_in_neither_memory_nor_files(tmp_path: Path) -> None:
    """Small budgets stand for a long run: this one fills them several times."""
    measured = run(2_000, tmp_path, history_rows=64, readings_bytes=40_000)
    print(measured)
    assert measured.files["readings.jsonl"] <= 40_000 + 4_000
    assert measured.blocks[-1] - measured.blocks[9] < 2_000 and measured.traced < 0.5 * MIB
    assert measured.slower < 2.5  # a shared machine has moods
    record = read_run(tmp_path)
    steps = record.history["loss"][0]
    assert steps[0] == 1 and steps[-1] == 2_100 and len(steps) < 1_200, "thinned, and both ends are there"
    assert steps[-50:].tolist() == list(range(2_051, 2_101)), "the recent past is dense"
    assert record.problems == []


@pytest.mark.slow
def test_a_million_steps_grow_neither_the_process_nor_the_time_of_a_step(
    tmp_path: Path, shown: Shown
) -> None:
    measured = run(1_000_000, tmp_path)
    print(measured)
    assert max(measured.resident) - measured.before <= 64 * MIB
    assert measured.resident[-1] - measured.resident[9] <= 8 * MIB
    assert measured.blocks[-1] - measured.blocks[9] < 2_000 and measured.growing < MIB // 2
    assert measured.slower < 1.2
    assert measured.files["readings.jsonl"] <= READINGS_BYTES + 4_000
    assert sum(measured.files.values()) <= 2 * READINGS_BYTES
    shown("long runs", measured.steps, "steps of one run")
