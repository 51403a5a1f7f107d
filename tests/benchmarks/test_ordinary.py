"""The ordinary suite: what is in it, that looking at its loss changes nothing, and how alerts are judged."""

from __future__ import annotations

import dataclasses
import json
import platform
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from nfi_monitor.types import Alert, AlertKind, AlertState, Mechanism, Phase, Severity
from tests.benchmarks.detection import evaluate, generate, report
from tests.benchmarks.detection.families import (
    FROZEN,
    HELD_OUT,
    HELD_OUT_2,
    HELD_OUT_3,
    HELD_OUT_4,
    HELD_OUT_5,
    NEWEST_FIRST,
    TUNING,
    Family,
    suite,
)
from tests.benchmarks.detection.ordinary import __main__ as command
from tests.benchmarks.detection.ordinary.judged import comes_true, judge_run
from tests.benchmarks.detection.replay import readings
from tests.benchmarks.detection.score import Event, Truth, calls
from tests.benchmarks.detection.suites import digits
from tests.benchmarks.detection.suites.ordinary import ORDINARY
from tests.benchmarks.detection.suites.spiking import SPIKING
from tests.benchmarks.peers import PEERS

SHORT = Family("short", partial(digits.digits, dropout=0.2), 80, (0,), None, half=TUNING)


def alert(kind: AlertKind, first: int, last: int) -> Alert:
    return Alert(
        "a", kind, Severity.WARNING, AlertState.RESOLVED, Phase.HEALTHY, first, last, Mechanism.UNKNOWN, 0.5
    )


def test_the_suite_is_large_and_its_halves_share_no_module() -> None:
    assert len(ORDINARY) >= 60 and all(family.quiet for family in ORDINARY.values())
    assert sum(family.steps * len(family.seeds) for family in ORDINARY.values()) >= 600_000
    modules = {
        half: {family.module for family in ORDINARY.values() if family.half == half}
        for half in (TUNING, *NEWEST_FIRST)
    }
    assert all(modules.values()) and sum(map(len, modules.values())) == len(set().union(*modules.values()))
    assert all(name.replace("-", "").isalnum() for name in ORDINARY | SPIKING)


def test_the_frozen_spiking_families_are_a_suite_of_their_own() -> None:
    assert suite(FROZEN) == list(SPIKING.values()) and not set(SPIKING) & {
        item.name for item in suite("full")
    }
    frozen = [family for family in SPIKING.values() if family.half == FROZEN]
    abrupt = [family for family in frozen if family.abrupt]
    assert len(frozen) - len(abrupt) >= 24 and len(abrupt) >= 12


@pytest.mark.parametrize(
    ("half", "steps"),
    [
        (HELD_OUT, 120_000),
        (HELD_OUT_2, 120_000),
        (HELD_OUT_3, 120_000),
        (HELD_OUT_4, 60_000),
        (HELD_OUT_5, 48_000),
    ],
)
def test_a_held_out_half_is_large_and_cheap(half: str, steps: int) -> None:
    ordinary = [family for family in ORDINARY.values() if family.half == half]
    spiking = suite(half)
    assert len(ordinary) >= 20 and sum(family.steps for family in ordinary) >= steps
    assert all(family.half == half and family.steps <= 3000 for family in spiking)
    abrupt = [family for family in spiking if family.abrupt]
    assert len(abrupt) >= 8 and len(spiking) - len(abrupt) >= 8
    assert not {family.name for family in (*ordinary, *spiking)} & {family.name for family in suite("full")}


@pytest.mark.parametrize(
    "name",
    ["h-rare-columns", "h-accumulation", "h-sharpness-aware", "h-own-target", "h-tagging", "h-heat",
     "h-double-q", "h-opt-by-heart", "x-maxout", "w-teacher-leaky", "n-ranks", "n-pasted", "n-thawed",
     "n-naming", "n-numerals", "n-judge", "n-queue", "n-shares", "n-balancing", "n-gemma", "n-neox-autocast",
     "u-batches-shared", "u-float16", "t-pairs", "t-decayed-universal", "k-citations", "k-switched",
     "k-bfloat16-weights", "k-two-ahead", "k-drifting", "k-worst-group", "k-class-by-class", "k-private",
     "k-muon", "k-capsules", "k-attacked", "k-domains", "k-bandit", "k-energy", "k-choices", "k-directions",
     "k-prompt", "k-half", "k-olmo-bfloat16", "s-retained", "s-autocast", "r-three-apart", "r-late",
     "l-tropical", "l-matrix-products", "l-autocast-complex", "e-hinges-batches", "e-hinges-late", "e-angles",
     "e-decayed-folded", "e-growing-batches", "i-descent", "i-agreeing", "i-in-between", "i-more-classes",
     "i-categories", "i-painter", "i-foretold", "i-against-noise", "i-prices-bfloat16", "i-springs",
     "i-soft-agent", "i-groups", "i-starcoder-by-heart", "i-dino"],
)  # fmt: skip
def test_a_held_out_family_trains_under_the_monitor(name: str) -> None:
    recorded = generate.record((ORDINARY | SPIKING)[name], seed=0, steps=3)
    assert len(recorded.columns["loss"][0]) == 3
    assert not any(note.startswith("failed") for note in recorded.info["notes"])


def test_families_without_a_second_moment_are_a_suite_for_tuning() -> None:
    families = suite("edges")
    assert all(family.half == TUNING for family in families)
    assert len([f for f in families if f.quiet]) >= 12 and len([f for f in families if f.abrupt]) >= 12
    assert not {family.name for family in families} & set(ORDINARY | SPIKING)


@pytest.mark.parametrize(
    "name", ["g-reader", "g-edge-waves", "g-players", "d-growing-conv", "d-rmsprop-hinges"]
)
def test_a_family_without_a_second_moment_trains_under_the_monitor(name: str) -> None:
    recorded = generate.record(next(family for family in suite("edges") if family.name == name), 0, steps=3)
    assert {"gradient_alignment", "row_match", "secant_curvature"} <= set(recorded.columns)


def test_the_key_of_a_run_depends_on_what_its_set_up_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    families = ORDINARY["h-counts"], SPIKING["u-hills"], ORDINARY["f-wine"], SPIKING["s-mixed"]
    before = [generate.family_key(family) for family in families]
    code = generate._code
    for name, changed in (
        ("shared.py", [True, True, False, True]),
        ("networks.py", [False, True, False, True]),
        ("common.py", [True, True, False, True]),
    ):
        monkeypatch.setattr(generate, "_code", lambda path, name=name: code(path) + "x" * (path.name == name))
        after = [generate.family_key(family) for family in families]
        assert [one != other for one, other in zip(before, after, strict=True)] == changed


def test_families_whose_code_moved_keep_their_recordings() -> None:
    same = json.loads(generate.SAME_RUNS.read_text("utf-8"))
    assert len(set(same.values())) == len(same) and not set(same) & set(same.values())
    if platform.python_version_tuple()[:2] != ("3", "11") or torch.__version__ != "2.13.0+cpu":
        pytest.skip("other versions have other keys")
    families = [family for family in (ORDINARY | SPIKING).values() if family.half in (HELD_OUT, HELD_OUT_2)]
    assert {generate.family_key(family) for family in families} == set(same.values())


def test_a_look_at_the_whole_loss_changes_nothing_and_the_detector_does_not_see_it() -> None:
    def unchecked(seed: int, arm: object) -> object:
        training = digits.digits(seed, arm, dropout=0.2)  # type: ignore[arg-type]
        training.part = None
        return training

    with_it = generate.record(SHORT, 0)
    without = generate.record(dataclasses.replace(SHORT, build=unchecked), 0)  # type: ignore[arg-type]
    assert with_it.columns["truth_loss"][0].tolist() == list(range(5, 81, 5))
    assert set(with_it.columns) - set(without.columns) == {"truth_loss"}
    for name, (_, values) in without.columns.items():
        np.testing.assert_array_equal(values, with_it.columns[name][1], err_msg=name)
    assert all("truth_loss" not in reading.values for reading in readings(with_it))


def test_the_labels_are_those_of_the_whole_loss() -> None:
    run = generate.record(SHORT, 0, steps=5)
    steps = np.arange(1, 1001)
    hard = np.where((steps >= 500) & (steps < 520), 1.0, 1e-4)
    calm: generate.Column = (steps[::5], np.full(200, 1e-4))
    columns = {"loss": (steps, hard), "truth_loss": calm}
    judged = evaluate.truth_of_run(dataclasses.replace(run, steps=1000, columns=columns), SHORT)
    assert judged.slingshots == () and judged.steps == 1000
    columns = {"loss": (steps, hard)}
    judged = evaluate.truth_of_run(dataclasses.replace(run, steps=1000, columns=columns), SHORT)
    assert [event.start for event in judged.slingshots] == [500]


@pytest.mark.parametrize(
    ("first", "last", "right"),
    [(600, 610, True), (450, 460, False), (450, 1000, True), (1030, 1040, True), (1100, 1110, False)],
)
def test_an_imminent_alert_is_right_if_a_slingshot_follows_soon(first: int, last: int, right: bool) -> None:
    truth = Truth(3000, 1000.0, (Event(1000, 1050),), quiet=True, abrupt=True)
    assert comes_true(alert(AlertKind.IMMINENT, first, last), truth) is right


def test_a_slingshot_alert_is_about_an_event_that_it_begins_in() -> None:
    event = Event(1000, 1050)
    began = (979, 980, 1050, 1051)
    assert [calls(alert(AlertKind.SLINGSHOT, step, step + 5), event) for step in began] == [
        False, True, True, False,
    ]  # fmt: skip


def test_a_run_is_judged_at_both_cadences_and_so_are_the_peers() -> None:
    judged = judge_run(SHORT, generate.record(SHORT, 0))
    assert judged.every.read == 80 and 0 < judged.auto.read <= 80
    assert judged.every.false_imminent == () and set(PEERS) <= set(judged.peers)


def test_the_command_records_scores_and_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ORDINARY, "short", SHORT)
    monkeypatch.setitem(report.AFTER, HELD_OUT_5, "abc1234")
    out = tmp_path / "ORDINARY.md"
    options = ["--families", "short", "--cache", str(tmp_path), "--out", str(out)]
    assert command.main([*options, "--record-only"]) == 0 and not out.exists()
    assert command.main([*options, "--score-only"]) == 0
    text = out.read_text(encoding="utf-8")
    assert "trained after commit abc1234" in text
    assert "| short | 1 × 80 | 0 | – | 0 | 0 | 0 | 0 |" in text and "gradient norm, z > 3" in text
    assert command.main(["--families", "short", "--cache", str(tmp_path / "empty"), "--score-only"]) == 1
