"""The frame that all studies stand on: pairing, resume, result files, the command, the statistics."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from examples.reference import judge, verdicts
from examples.reference.judge import Claim, Judgement, Verdict
from examples.reference.results import NotTested, Result, Results, digest, episodes, fingerprint
from examples.reference.study import Plan, Preset, Study, Variant, command, load_study, run_rows
from examples.reference.training import CHECKPOINT, run_one
from nfi_monitor import Monitor

DIVISION = {
    "mlp": {"p": 7, "width": 16, "depth": 2, "measure_every": 10, "zero_share": 0.0},
    "transformer": {"p": 5, "width": 8, "depth": 1, "heads": 2, "measure_every": 10},
    "transformer2": {"p": 5, "width": 8, "depth": 2, "heads": 2, "measure_every": 10},
}
PARITY = {name: {"bits": 12, "rows": 64, "test_rows": 64, "width": 16} for name in ("hinge", "ce")}
SMALL = {"modular_division": DIVISION, "parity": PARITY}
TRAINED = [(name, arm.name) for name in SMALL for arm in load_study(name).arms if arm.compute is None]


def small(name: str, steps: int = 12, checkpoint_every: int = 5_000) -> tuple[Study, Preset]:
    """The study in a form of milliseconds, with every arm in its preset."""
    study = load_study(name)
    preset = study.preset("quick").changed(SMALL[name], checkpoint_every)
    plans = {arm.name: Plan(steps) for arm in study.arms if arm.compute is None}
    return study, replace(preset, plans=plans)


def losses(study: Study, preset: Preset, arm: str, steps: int) -> tuple[list[float], dict[str, str], str]:
    """(loss of each step, fingerprint of the beginning, digest of the data)."""
    torch.manual_seed(3)
    training = study.build(study.config(preset, study.arm(arm)), 3, torch.device("cpu"))
    start = dict(training.start or fingerprint(training.model))
    with Monitor(training.model, training.optimizer, console=False, **training.watch) as monitor:
        made = [float(training.step(number, monitor)) for number in range(1, steps + 1)]
    return made, start, digest(*training.data)


# --- pairing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arm"), TRAINED)
def test_an_arm_begins_as_its_pair_does(name: str, arm: str) -> None:
    study, preset = small(name)
    baseline = next(a.name for a in study.arms if a.pair == study.arm(arm).pair)
    own, start, data = losses(study, preset, arm, 1)
    expected, pair_start, pair_data = losses(study, preset, baseline, 1)
    shared = start.keys() & pair_start.keys()
    assert {key: start[key] for key in shared} == {key: pair_start[key] for key in shared}
    assert data == pair_data
    assert {"head.weight"} <= shared
    changed_loss = {"head_norm", "label_smoothing", "z_loss", "norm", "gradient_descent", "head_bias"}
    options = study.arm(arm).options.keys()
    if not options & changed_loss:
        # Another arithmetic may show in the last digit; nothing else of these arms is before the first step.
        exact = not options & {"dtype", "loss_dtype", "exact"}
        assert own[0] == expected[0] if exact else own[0] == pytest.approx(expected[0], rel=1e-6)


@pytest.mark.parametrize("what", ["state", "count"])
def test_arms_agree_to_the_last_bit_until_the_arm_acts(what: str) -> None:
    study, preset = small("parity")
    config = {"hinge": {"reset_every": 9}}
    arm = next(a for a in study.arms if a.name == f"hinge-reset-{what}")
    patched = replace(study, arms=[replace(arm, options={**arm.options, "reset_every": 9})])
    acted, _, _ = losses(patched, preset.changed(config), arm.name, 12)
    plain, _, _ = losses(study, preset, "hinge-float32", 12)
    assert acted[:9] == plain[:9], "the loss of step 9 is of the weights before it"
    assert acted[9:] != plain[9:]


def test_a_run_that_did_not_begin_as_its_pair_is_named_and_left_out(tmp_path: Path) -> None:
    study, preset = small("modular_division", steps=2)
    for arm in ("mlp-float32", "mlp-float64-loss", "mlp-zero-sum"):
        run_one(study, preset, arm, 0, results=tmp_path, runs=tmp_path / "runs")
    where = tmp_path / "modular_division" / "quick"
    path = where / "mlp-zero-sum-0.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["start"]["head.weight"] = "00000000"
    path.write_text(json.dumps(record), encoding="utf-8")
    results = Results.load(where)
    assert results.arms() == ["mlp-float32", "mlp-float64-loss"]
    assert results.problems == [
        "mlp-zero-sum-0.json did not begin as its pair did and was left out (head.weight differs)"
    ]


# --- resume -------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


ABSORBING = {"mlp": {"width": 64, "depth": 3, "lr": 1e-2, "every": "auto"}}
"""At risk after some 150 steps."""


@pytest.mark.parametrize(
    ("name", "arm", "configs", "steps", "cut"),
    [
        ("modular_division", "mlp-float32", ABSORBING, 260, 250),
        ("modular_division", "mlp-zero-sum", {"mlp": {"batch": 8}}, 120, 100),  # its rows are drawn at random
        ("parity", "hinge-reset-count", {}, 120, 100),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_result_bit_for_bit(
    name: str, arm: str, configs: Any, steps: int, cut: int, tmp_path: Path
) -> None:
    study, preset = small(name, steps, checkpoint_every=60)
    preset = preset.changed(configs)

    def stop(done: int) -> None:
        if done == cut:
            raise Interrupted

    def run(where: str, told: Any = None) -> Result:
        places = {"results": tmp_path / where, "runs": tmp_path / where / "runs"}
        return run_one(study, preset, arm, 1, told=told, **places)

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("cut", stop)
    checkpoint = tmp_path / "cut" / "runs" / name / "quick" / f"{arm}-1" / CHECKPOINT
    assert checkpoint.exists(), "there is something to resume from"
    assert torch.load(checkpoint, weights_only=True)["record"]["steps"] == cut // 60 * 60
    steps_made: list[int] = []
    resumed = run("cut", steps_made.append)
    assert steps_made[0] > cut // 60 * 60, "it went on from the checkpoint"
    expected, found = whole.to_json(), resumed.to_json()
    assert expected.pop("made") and found.pop("made")
    assert found == expected
    assert not checkpoint.exists()
    if configs is ABSORBING:
        assert min(alert.first_step for alert in whole.alerts) < cut // 60 * 60, "alerts were resumed, too"


def test_a_checkpoint_of_another_configuration_is_not_resumed(tmp_path: Path) -> None:
    study, preset = small("parity", 60, checkpoint_every=20)
    places = {"results": tmp_path, "runs": tmp_path / "runs"}

    def stop(done: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        run_one(study, preset, "hinge-adam", 0, told=stop, **places)
    other = preset.changed({"hinge": {"lr": 5e-3}})
    fresh = run_one(study, other, "hinge-adam", 0, **places)
    direct = run_one(study, other, "hinge-adam", 0, results=tmp_path / "direct", runs=tmp_path / "direct")
    assert fresh.loss_final == direct.loss_final


# --- result files ---------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A directory with two whole results."""
    study, preset = small("parity", steps=3)
    for seed in (0, 1):
        run_one(study, preset, "ce-float32", seed, results=tmp_path, runs=tmp_path / "runs")
    return tmp_path / "parity" / "quick"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "Expecting value"),
        ('{"study": "parity", "arm"', "Expecting ':' delimiter"),
        ("[]", "it holds no object"),
        ("{}", "alerts is missing"),
    ],
)
def test_a_corrupt_result_is_named_and_left_out(recorded: Path, content: str, why: str) -> None:
    (recorded / "ce-float32-1.json").write_text(content, encoding="utf-8")
    results = Results.load(recorded)
    assert [run.seed for run in results["ce-float32"]] == [0]
    (problem,) = results.problems
    assert problem.startswith("ce-float32-1.json is not a whole result and was left out") and why in problem


def test_a_result_under_another_name_is_left_out(recorded: Path) -> None:
    (recorded / "ce-float32-0.json").rename(recorded / "ce-float32-7.json")
    results = Results.load(recorded)
    assert [run.seed for run in results["ce-float32"]] == [1]
    assert "it is the result of ce-float32-0.json" in results.problems[0]


def test_a_result_holds_config_seed_versions_and_date(recorded: Path) -> None:
    run = Results.load(recorded)["ce-float32"][1]
    assert (run.seed, run.config["width"], run.steps) == (1, 16, 3)
    assert run.made["versions"]["torch"] == torch.__version__
    assert run.made["date"].count("-") == 2
    assert not list(recorded.glob(".*")), "nothing half-written is left behind"


def test_a_run_on_record_is_not_made_again_unless_its_configuration_changed(recorded: Path) -> None:
    study, preset = small("parity", steps=3)
    places = {"results": recorded.parents[1], "runs": recorded.parents[1] / "runs"}
    told: list[int] = []
    path = recorded / "ce-float32-0.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"loss_final": ', '"loss_final": 9'))
    marked = run_one(study, preset, "ce-float32", 0, told=told.append, **places)
    assert str(marked.loss_final).startswith("9"), "read from its file"
    anew = run_one(study, preset.changed({"ce": {"lr": 0.5}}), "ce-float32", 0, **places)
    assert anew.config["lr"] == 0.5 and not str(anew.loss_final).startswith("9")


# --- episodes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ([1.0, 0.5, 0.2], []),  # it has never been low
        ([0.005, 0.05, 0.005], []),  # it does not exceed 1e-1
        ([1.0, 0.005, 0.05, 0.2, 0.7, 0.05, 0.009, 0.3], [(4, 7, 0.7), (8, None, 0.3)]),
        ([0.0, 0.1, 0.11, 0.01, 0.00999], [(3, 5, 0.11)]),  # both levels are strict
    ],
)
def test_episodes_follow_wus_rule(loss: list[float], expected: list[Any]) -> None:
    assert episodes(np.array(loss)) == expected


# --- statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 3), (1, 1), (2, 7), (95, 100), (0, 1)])
def test_the_interval_of_a_share_is_wilsons(k: int, n: int) -> None:
    ours = judge.share(k, n)
    theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_the_interval_of_a_median_is_the_bootstraps() -> None:
    sample = np.random.default_rng(5).lognormal(size=40)
    ours = judge.median(sample)
    theirs = stats.bootstrap((sample,), np.median, method="percentile", rng=1).confidence_interval
    assert ours.value == np.median(sample)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.1)


def test_values_of_one_run_do_not_count_as_many() -> None:
    groups = [[0.0] * 50, [1.0] * 50, [2.0] * 50]
    nested, flat = judge.grouped_median(groups), judge.median([x for group in groups for x in group])
    assert (nested.low, nested.high) == (0.0, 2.0)
    assert flat.high - flat.low < 2.0


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([-3.0, -2.0, -2.5, -1.0, -2.0], Verdict.AGREES),
        ([3.0, 2.0, 2.5, 1.0, 2.0], Verdict.DISAGREES),
        ([-3.0, 2.0, 2.5, -1.0, 0.1], Verdict.NOT_TESTED),
        ([-3.0, -2.0], Verdict.NOT_TESTED),
    ],
)
def test_a_claim_is_decided_only_by_an_interval_on_one_side(values: list[float], verdict: Verdict) -> None:
    assert judge.decided(judge.median(values), "below", 0.0).verdict is verdict


def test_a_claim_about_arms_that_were_not_run_is_not_tested() -> None:
    claim = Claim("x", "y", judge.without("a", "b"))
    assert claim.judged(Results([])) == Judgement(Verdict.NOT_TESTED, "no result of arm b")


def test_nothing_is_removed_where_nothing_was(recorded: Path) -> None:
    results = Results.load(recorded)
    with pytest.raises(NotTested, match="no run of ce-float32 slingshots in as many steps"):
        judge.without("ce-float32", "ce-float32")(results)


# --- the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arm", "hinge"], "unknown arm 'hinge'; there are: hinge-float32, hinge-float64-model"),
        (["--preset", "fast"], "unknown preset 'fast'; there are: quick, paper"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--jobs", "many"], "argument --jobs: invalid int value: 'many'"),
    ],
)
def test_bad_input_is_answered_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("parity", arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert said in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


def test_the_command_runs_what_is_missing_and_prints_table_verdicts_and_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--arm", "kick", "--jobs", "1", "--results", str(tmp_path / "r"), "--runs", str(tmp_path)]
    assert command("parity", arguments) == 0
    first = capsys.readouterr().out
    assert "1 runs made" in first and "3.16 lr at β2 = 0.999" in first
    assert first.count("no result of arm") > 5, "what was not run is not judged"
    assert command("parity", arguments) == 0
    assert "1 of 1 runs are on record" in capsys.readouterr().out


# --- the page -------------------------------------------------------------------------------------------


def test_the_page_is_made_of_result_files_alone(recorded: Path) -> None:
    study, _ = small("parity")
    text = verdicts.page([study], recorded.parents[1])
    rows = {row[0]: row for row in run_rows(study, Results.load(recorded))}
    assert "| " + " | ".join(rows["ce-float32"]) + " |" in text
    assert "Not run at this scale: `python -m examples.reference.parity --preset paper`." in text
    (recorded / "ce-float32-1.json").write_text("", encoding="utf-8")
    assert "Left out: ce-float32-1.json is not a whole result" in verdicts.page([study], recorded.parents[1])


def test_numbers_are_printed_as_people_read_them() -> None:
    shown = [judge.number(x) for x in (0.0, 1234.5, 3.14159, -0.5, 2e-7, math.inf, 1e9)]
    assert shown == ["0", "1,234", "3.14", "-0.5", "2.00e-07", "inf", "1.00e+09"]


def test_an_arm_overrides_its_pair_and_the_command_line_overrides_both() -> None:
    study, preset = small("parity")
    arm = Variant("a", "", "hinge", {"lr": 1.0, "rows": 5})
    config = study.config(preset, arm, {"rows": 6})
    assert (config["lr"], config["rows"], config["bits"]) == (1.0, 6, 12)
