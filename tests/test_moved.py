"""An import that worked before a module or a name moved works still, and warns with the new place."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import pytest

from nfi_monitor import _moved
from nfi_monitor._moved import LEFT, MOVED, RENAMED

# Public names that the old modules defined, in the last commit before they moved.
OLD: dict[str, str] = {
    "arms": (
        "Context Arm MOST_GIVEN_BACK larger_eps smaller_lr NUDGE combined AS_IT_WAS NUDGED FLOAT64_LOSS "
        "ZERO_SUM LARGER_EPS SECOND_MOMENT_RESET SECOND_MOMENT_HELD SMALLER_LR LR_HELD OTHER_DATA ARMS"
    ),
    "attach": "Kinds TrainerContext Remedy Due Attachment free_directory",
    "cadence": "SAMPLES FIRST_CHANGE ALL_READ next_read Clock",
    "capture.head": "HEAD_NAMES Head find_head Rows HeadProbe INERT rows_of whole_rows classes_of",
    "capture.optimizer": (
        "HEAD_ELEMENTS MEAN_ELEMENTS SECOND_MOMENTS Update unwrap choose OptimizerReader has_closure "
        "StepHooks gradient_columns"
    ),
    "capture.outbox": "PENDING Outbox",
    "capture.placement": "GRAPHS on_host send together capturing",
    "capture.ring": "CHEAP KEPT SnapshotRing",
    "capture.sampling": (
        "ROW_ELEMENTS ROW_SHARE COORDINATES COORDINATES_FULL COORDINATES_PER_TENSOR LOWERED FEWEST_ROWS "
        "row_stride offset auto_interval local CoordinateSample"
    ),
    "detect.mechanism": "FORGOTTEN LEARNED JUMP UNMOVED Causes name_mechanism",
    "capture.snapshots": "Snapshot feeds_data state_bytes check_extra",
    "capture.texts": "to_text from_text",
    "detect.causal": "BASELINE FLOAT64_NEEDS Outcome ReplayVerdict margin judge arm_in_words",
    "detect.unrest": "FALLS BLOCK LEAP STEPS Unrest",
    "distributed": (
        "WAIT TIMEOUT rank processes check_group find_ranks wrapper_of lets_ranks_stop_early is_sharded "
        "shards flat_shards ClassShard class_shard rows_alike data_ranks Team any_accelerator"
    ),
    "leaver": "Leaver",
    "losses": "TOGETHER Losses",
    "measure.class_shards": "FIELDS HEADER SHOWN ShardRows shard_rows Sent merged Together together",
    "measure.shards": (
        "STEP_SUMS TENSOR_SUMS HEAD_RANKS HEAD_SUMS StepParts step_parts finish_step HeadParts head_parts "
        "finish_head"
    ),
    "meter": "Contents Meter full_precision",
    "notes": "FLOAT32_MARGIN PATIENCE NoteTaker",
    "open_monitors": "OpenMonitor register unregister is_watched open_monitors",
    "pool": (
        "LAG PROBE_ELEMENTS ROW_SLOTS ROW_NUMBERS FLAGS Shape Shares survey Layout Reduced Message Packed "
        "Pool"
    ),
    "ranks": "RECENT Ranks",
    "remedies.centering": "center_classifier center_features",
    "remedies.penalties": "z_loss",
    "remedies.prieto": "stablemax_cross_entropy orthogonal_gradients",
    "remedies.second_moment": "reset_second_moment",
    "remedies.steps": "Hook around_steps hooks_on REPLAY replaying step_now acts",
    "remedies.update_clip": "clip_update_rms",
    "replacing": "replacing remove_leftovers",
    "replay": "StepFunction Plan STEP_FN RECIPE plan replay",
    "report.console": "SEVERITY_STYLES ConsoleSink watching",
    "report.explanation": "Seen Finding Explanation",
    "report.fanout": "open_sinks Fanout",
    "report.findings": "LR_CHANGE look_for",
    "report.hindsight": "LEAD_UP FINITE Series Hindsight",
    "report.jsonl": (
        "RUN READINGS ALERTS REPLAYS LOOK_SECONDS RunDirectoryError RunDirectory RunRecord read_run "
        "check_run parse_line"
    ),
    "report.lock": "LOCK DirectoryInUseError DirectoryLock",
    "report.plain": "plain visible json_line",
    "report.summary": "PHASE_STYLES KEY_QUANTITIES Summary summarize slingshots lingers",
    "report.tensorboard": (
        "EVENTS SLINGSHOT_EVENTS available TensorBoardSink layout alert_markdown overview_markdown "
        "info_markdown"
    ),
    "report.tensorboard_tab": (
        "PLUGIN FORMAT ROWS CHUNKS_PER_WIDTH UPDATES Chart CHARTS TabWriter facts chart_json"
    ),
    "report.thinning": "READINGS_BYTES thin",
    "report.words": (
        "number label amount kind_in_words headline mechanism_in_words mechanism_name "
        "one_evidence_in_words ordered_evidence evidence_in_words forecast_in_words alert_in_words "
        "replay_in_words to_ascii shown"
    ),
    "run_info": "describe_run read_context",
}
STILL_THERE = sorted(set(LEFT) - set(MOVED))


def names_of(module: str) -> list[str]:
    return OLD[module.removeprefix("nfi_monitor.")].split()


@pytest.fixture(autouse=True)
def as_if_never_imported() -> None:
    for name in MOVED:
        sys.modules.pop(name, None)
        package, _, last = name.rpartition(".")
        if package in sys.modules:
            vars(sys.modules[package]).pop(last, None)


def test_the_table_covers_every_old_module() -> None:
    assert {f"nfi_monitor.{name}" for name in OLD} == {*MOVED, *LEFT}


@pytest.mark.parametrize("module", sorted(MOVED))
def test_an_old_module_imports_with_a_warning_and_has_the_objects_of_the_new_ones(module: str) -> None:
    with pytest.warns(DeprecationWarning) as caught:
        old = importlib.import_module(module)
    (warning,) = caught
    assert str(warning.message).startswith(f"{module} has moved: import from ")
    assert all(home in str(warning.message) for home in MOVED[module])
    homes = [importlib.import_module(home) for home in MOVED[module]]
    for name in names_of(module):
        value = getattr(old, name)
        now = RENAMED.get(name, name)
        assert any(getattr(home, now, getattr(home, name, None)) is value for home in homes), name
    with pytest.raises(AttributeError, match="never_there"):
        _ = old.never_there


@pytest.mark.parametrize("module", STILL_THERE)
def test_every_name_that_left_a_module_is_still_found_there(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        here = importlib.import_module(module)
        assert all(hasattr(here, name) for name in names_of(module))
    for name, home in LEFT[module].items():
        now = RENAMED.get(name, name)
        with pytest.warns(DeprecationWarning, match=f"import {now} from {home}"):
            value = getattr(here, name)
        assert value is getattr(importlib.import_module(home), now)
    with pytest.raises(AttributeError, match="never_there"):
        _ = here.never_there


@pytest.mark.parametrize("module", sorted({home for homes in MOVED.values() for home in homes}))
def test_a_new_place_is_no_old_one_and_warns_of_nothing(module: str) -> None:
    assert module not in MOVED
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        importlib.import_module(module)


@pytest.mark.parametrize(
    "line",
    [
        "import nfi_monitor.report.words",
        "from nfi_monitor.report import words",
        "from nfi_monitor.report.words import number",
        "from nfi_monitor.report.summary import PHASE_STYLES",
    ],
)
def test_the_warning_points_at_the_file_that_imports(line: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"\n{line}\n", encoding="utf-8")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), {"__name__": "script"})
    found = [(warning.filename, warning.lineno) for warning in caught if "has moved" in str(warning.message)]
    assert found and set(found) == {(str(script), 2)}


def test_installing_twice_adds_one_finder() -> None:
    before = list(sys.meta_path)
    _moved.install()
    assert sys.meta_path == before


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nfi_monitor.never_there")


def test_a_setting_written_to_an_old_module_takes_effect_in_the_new_one() -> None:
    from nfi_monitor.ranks import team

    with pytest.warns(DeprecationWarning):
        old = importlib.import_module("nfi_monitor.distributed")
    before = team.WAIT
    try:
        old.WAIT = 3.0
        assert team.WAIT == 3.0
    finally:
        team.WAIT = before
    assert before == old.WAIT
