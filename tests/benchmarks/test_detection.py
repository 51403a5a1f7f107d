"""The proving ground's own arithmetic, on made-up series and on one tiny training."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from nfi_monitor import Monitor
from nfi_monitor.types import Alert, AlertKind, AlertState, Mechanism, Outcome, Phase, Severity, Thresholds
from tests.benchmarks.detection import __main__ as command
from tests.benchmarks.detection import evaluate as evaluating
from tests.benchmarks.detection import generate, peers_installed, report, score, setups
from tests.benchmarks.detection.evaluate import RULES, evaluate, evaluate_file, total
from tests.benchmarks.detection.families import FAMILIES, Family, suite
from tests.benchmarks.detection.replay import readings, replay
from tests.benchmarks.detection.score import Event, Score, Truth, alarms_of, judge, truth_of
from tests.benchmarks.detection.sparse import replay_sparsely
from tests.benchmarks.detection.training import LogitChange
from tests.benchmarks.peers import PEERS

TAU = 20.0
LIVELY = Family(
    "lively",
    partial(setups.modular_mlp, p=7, width=32, depth=2, beta2=0.9, lr=5e-3),
    steps=600,
    seeds=(0,),
    mechanism="numerical_feature_inflation",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> generate.Run:
    """600 steps of a network small enough for a test, through the cache's files."""
    directory = tmp_path_factory.mktemp("detection")
    return generate.load(generate.ensure(LIVELY, 0, directory))


def losses(steps: int, *spikes: tuple[int, float]) -> tuple[list[int], list[float]]:
    """A loss at 1e-5 that jumps to ``height`` for ten steps."""
    values = [1e-5] * steps
    for start, height in spikes:
        values[start - 1 : start + 9] = [height] * len(values[start - 1 : start + 9])
    return list(range(1, steps + 1)), values


def truth(*starts: int, steps: int = 3000, quiet: bool = False, near: tuple[int, ...] = ()) -> Truth:
    return Truth(
        steps,
        TAU,
        tuple(Event(start, start + 50) for start in starts),
        tuple(Event(start, start + 50) for start in near),
        quiet,
    )


# --- truth ---------------------------------------------------------------------------------------


def test_slingshots_and_near_misses_are_told_apart_by_height() -> None:
    found = truth_of(*losses(2000, (500, 0.5), (1000, 0.008), (1500, 0.00008)), TAU)
    assert [event.start for event in found.slingshots] == [500]
    assert [event.start for event in found.near_misses] == [1000]


def test_an_event_lasts_until_it_is_recovered_and_the_last_is_cut_off_by_the_end() -> None:
    found = truth_of(*losses(1000, (500, 0.5), (995, 0.5)), TAU)
    assert found.slingshots == (Event(500, 500 + 10 + 40 - 1), Event(995, 1000))


# --- alarms ----------------------------------------------------------------------------------------


def test_pauses_shorter_than_the_refractory_time_make_no_new_alarm() -> None:
    assert alarms_of([100, 110, 130, 151], truth()) == [Event(100, 130), Event(151, 151)]


def test_an_alarm_carried_over_from_a_slingshot_is_not_a_new_one() -> None:
    sounded = [*range(510, 580), 700]
    assert alarms_of(sounded, truth(500)) == [Event(700, 700)]


def test_an_alarm_right_after_a_slingshot_that_was_silent_in_it_is_a_new_one() -> None:
    assert alarms_of([499, 551], dataclasses.replace(truth(500), tau=200.0)) == [
        Event(499, 499),
        Event(551, 551),
    ]


@pytest.mark.parametrize(
    ("sounded", "warned", "early", "in_time", "false"),
    [
        ([], 0, 0, 0, 0),
        (range(900, 1000), 1, 0, 1, 0),
        ([990], 1, 0, 0, 0),  # too late for the cure
        (range(300, 1000), 1, 1, 1, 0),  # began before the horizon, still sounds: early
        ([300], 0, 0, 0, 1),  # began and ended before it
        ([300, 950], 1, 0, 1, 1),
        ([1000, 1020], 1, 0, 0, 0),  # at its first loss: too late for the cure, yet before it is named
        ([1001, 1020], 0, 0, 0, 0),  # with the slingshot: no warning, no false alarm
    ],
)
def test_a_slingshot_is_warned_of_by_an_alarm_that_reaches_it(
    sounded: list[int], warned: int, early: int, in_time: int, false: int
) -> None:
    found = judge(sounded, truth(1000))
    assert (found.warned, found.early, found.in_time, found.false_alarms) == (warned, early, in_time, false)


def test_the_lead_counts_from_the_first_alarm_within_the_horizon() -> None:
    assert judge([850, 950], truth(1000)).leads == ((150, 7.5),)


def test_an_alarm_before_a_near_miss_is_neither_hit_nor_false() -> None:
    found = judge([900], truth(2000, near=(1000,)))
    assert (found.near_alarms, found.false_alarms, found.warned) == (1, 0, 0)


def test_an_alarm_at_the_end_of_a_run_is_censored_but_false_in_a_quiet_family() -> None:
    for sounded in ([2900], list(range(1000, 3000))):
        assert (judge(sounded, truth()).censored, judge(sounded, truth()).false_alarms) == (1, 0)
        quiet = judge(sounded, truth(quiet=True))
        assert (quiet.censored, quiet.false_alarms) == (0, 1)


def test_false_alarms_are_counted_over_the_steps_at_which_one_could_be_false() -> None:
    assert judge([], truth(quiet=True)).exposure == 3000
    # Not: the 200 steps before the slingshot, the 51 of it, the last 200 (censored) and the end itself.
    assert judge([], truth(1000)).exposure == 3000 - 200 - 51 - 201
    assert judge(range(101, 201), truth(quiet=True)).sounding == 100


def test_a_rule_that_always_sounds_is_early_never_right() -> None:
    found = judge(range(1, 3001), truth(1000, 2000))
    assert (found.warned, found.early) == (1, 1)  # at the second it is carried over


def test_scores_add_up() -> None:
    one, two = judge([900], truth(1000)), judge([300], truth(1000))
    assert (one + two).slingshots == 2 and (one + two).warned == 1 and (one + two).false_alarms == 1
    assert (one + two).lead(0.5, in_tau=True) == 5.0 and math.isnan(Score().lead(0.5, in_tau=True))


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (7, 7), (3, 10), (98, 100), (1, 100_000)])
def test_wilson_intervals_are_those_of_scipy(successes: int, trials: int) -> None:
    known = binomtest(successes, trials).proportion_ci(method="wilson")
    assert score.wilson(successes, trials) == pytest.approx((known.low, known.high), abs=1e-12)


# --- mechanism and forecast ----------------------------------------------------------------------


def alert(kind: AlertKind, first: int, last: int, mechanism: Mechanism = Mechanism.UNKNOWN) -> Alert:
    return Alert("a", kind, Severity.INFO, AlertState.RESOLVED, Phase.HEALTHY, first, last, mechanism, 0.5)


def test_each_slingshot_is_counted_under_the_mechanism_its_alert_named() -> None:
    alerts = [
        alert(AlertKind.SLINGSHOT, 1000, 1010, Mechanism.SECOND_MOMENT),
        alert(AlertKind.IMMINENT, 1950, 2000, Mechanism.EDGE_OF_STABILITY),
    ]
    assert score.mechanisms(alerts, truth(1000, 2000)) == {1000: "second_moment", 2000: "none"}


def test_a_forecast_is_held_against_the_steps_that_were_left() -> None:
    said, warned = np.full(3001, math.nan), np.zeros(3001, dtype=bool)
    said[1000 - 80], warned[1000 - 80] = 120.0, True
    found = score.forecasts(said, warned, truth(1000))
    assert found[4] == score.Forecasts(1, 1, (1.5,)) and found[4].within(2.0) == 1
    assert found[2] == score.Forecasts(1, 0, ())


def test_no_forecast_is_asked_for_where_the_last_slingshot_was_not_over() -> None:
    found = score.forecasts(np.full(3001, 1.0), np.ones(3001, dtype=bool), truth(1000, 1120))
    assert found[10].slingshots == 1 and found[3].slingshots == 2


def test_a_number_counts_as_too_late_only_with_less_than_a_tau_left() -> None:
    for left, expected in ((20, 0), (19, 1), (1, 1)):
        said = np.full(3001, math.nan)
        said[1000 - left] = 30.0
        assert score.numbers_in_the_last_tau(said, truth(1000, 2000)) == expected


# --- recorded runs -------------------------------------------------------------------------------


def test_the_tiny_run_gives_alerts_to_compare(run: generate.Run) -> None:
    assert {item.kind for item in run.alerts} >= {AlertKind.AT_RISK, AlertKind.IMMINENT}


def when_the_run_ended(alerts: list[Alert], step: int) -> list[dict[str, Any]]:
    """Return the alerts of a replay as a monitor keeps them that closed at ``step``."""
    return [
        dataclasses.replace(item, outcome=Outcome.OPEN, outcome_step=step, last_step=step).to_json()
        if item.state is AlertState.FIRING
        else item.to_json()
        for item in alerts
    ]


def test_a_replay_gives_the_live_alerts_bit_for_bit(run: generate.Run) -> None:
    assert when_the_run_ended(replay(run).alerts, run.steps) == [item.to_json() for item in run.alerts]


def test_a_replay_with_other_thresholds_gives_other_alerts(run: generate.Run) -> None:
    said = replay(run, Thresholds(imminent_displacement=50.0, imminent_rise=1e9))
    assert not any(item.kind is AlertKind.IMMINENT for item in said.alerts)


def test_a_replay_over_a_kept_stream_is_the_same_replay(run: generate.Run) -> None:
    stream, other = list(readings(run)), Thresholds(imminent_displacement=0.3)
    for limits in (None, other, None):
        one, two = replay(run, limits), replay(run, limits, stream)
        assert one.alerts == two.alerts and one.changes == two.changes
        np.testing.assert_array_equal(one.forecasts, two.forecasts)


def test_a_sparse_replay_gives_the_alerts_of_a_monitor_that_reads_sparsely(run: generate.Run) -> None:
    training = LIVELY.build(0, LIVELY.arm)
    watch = {**training.watch, "every": "auto", "overhead_budget": None}
    with Monitor(training.model, training.optimizer, console=False, **watch) as monitor:
        for number in range(1, run.steps + 1):
            training.step(number, monitor)
    said = replay_sparsely(run)
    live = [item.to_json() for item in monitor.alerts]
    assert when_the_run_ended(said.alerts, run.steps) == live
    assert said.read == monitor.history["weight_norm"][0].tolist()
    assert len(said.read) < run.steps


def test_a_sparse_replay_that_asks_for_every_step_is_the_replay(run: generate.Run) -> None:
    said = replay_sparsely(run, every=1)
    assert said.alerts == replay(run).alerts
    assert said.read == list(range(1, run.steps + 1))


def test_forecasts_and_warnings_are_what_the_firing_alerts_say(run: generate.Run) -> None:
    said = replay(run)
    expected = np.zeros(run.steps + 1, dtype=bool)
    for item in said.alerts:
        if item.kind in (AlertKind.AT_RISK, AlertKind.IMMINENT):
            expected[item.first_step : item.last_step + (item.state is AlertState.FIRING)] = True
    np.testing.assert_array_equal(said.warned, expected)
    assert np.isfinite(said.forecasts).any() and not np.isfinite(said.forecasts[~expected]).any()


def test_a_context_holds_from_its_step_on(run: generate.Run) -> None:
    first = run.contexts[0][1]
    changed = dataclasses.replace(run, contexts=[(1, first), (300, dataclasses.replace(first, layer="late"))])
    layers = {item.layer for item in replay(changed).alerts if item.first_step < 300}
    later = {item.layer for item in replay(changed).alerts if item.first_step >= 300}
    assert layers <= {first.layer} and later == {"late"}


def test_files_keep_every_number_of_a_run(run: generate.Run, tmp_path: Path) -> None:
    generate.save(run, tmp_path / "run.json")
    again = generate.load(tmp_path / "run.json")
    assert list(map(repr, readings(again))) == list(map(repr, readings(run)))
    assert (again.contexts, again.alerts, again.steps) == (run.contexts, run.alerts, run.steps)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npz"]  # nothing temporary


def test_a_recorded_run_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(LIVELY, steps=5)
    path = generate.ensure(short, 0, tmp_path)

    def forbidden(*_: object) -> None:
        raise AssertionError("the run is there already")

    monkeypatch.setattr(generate, "record", forbidden)
    assert generate.ensure(short, 0, tmp_path) == path
    path.with_suffix(".npz").unlink()  # killed before the pair was whole
    with pytest.raises(AssertionError):
        generate.ensure(short, 0, tmp_path)


def test_the_key_of_a_run_changes_with_its_set_up_and_not_with_its_seeds() -> None:
    key = generate.family_key(LIVELY)
    assert key == generate.family_key(dataclasses.replace(LIVELY, seeds=(0, 1, 2), quick=True))
    others = [
        dataclasses.replace(LIVELY, steps=601),
        dataclasses.replace(LIVELY, arm=LogitChange("float64")),
        dataclasses.replace(LIVELY, build=partial(setups.modular_mlp, p=7, width=33)),
    ]
    assert len({key, *map(generate.family_key, others)}) == 4


def test_monitor_and_peers_are_scored_by_the_same_function(run: generate.Run) -> None:
    found = evaluate(run, LIVELY)
    assert tuple(found.scores)[: len(RULES)] == RULES and set(PEERS) < set(RULES)
    assert len({item.slingshots for item in found.scores.values()}) == 1
    assert total([found, found]).steps == 2 * run.steps


# --- families and the command --------------------------------------------------------------------


def test_names_of_families_fit_a_file_and_the_quick_suite_is_part_of_the_full_one() -> None:
    assert all(name.replace("-", "").isalnum() for name in FAMILIES)
    quick, full = suite("quick"), suite("full")
    assert set(family.name for family in quick) < set(family.name for family in full)
    assert sum(len(family.seeds) * family.steps for family in full if family.quiet) >= 200_000


@pytest.mark.parametrize(
    "name", ["parity-hinge-99", "two-heads", "contrastive", "accumulation", "distillation"]
)
def test_a_family_trains_under_the_monitor(name: str) -> None:
    recorded = generate.record(FAMILIES[name], seed=0, steps=3)
    assert len(recorded.columns["loss"][0]) == 3 and not any(
        note.startswith("failed") for note in recorded.info["notes"]
    )


def test_the_command_writes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(LIVELY, steps=60)
    monkeypatch.setitem(FAMILIES, "lively", short)
    out = tmp_path / "PAGE.md"
    options = ["--families", "lively", "--jobs", "1", "--cache", str(tmp_path / "cache"), "--out", str(out)]
    assert command.main([*options, "--record-only"]) == 0 and not out.exists()
    assert command.main(options) == 0
    text = out.read_text(encoding="utf-8")
    assert "| lively | 1 × 60 |" in text and all(f"| {rule} |" in text for rule in RULES)
    assert command.main([*options, "--score-only"]) == 0


def test_the_command_says_which_families_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--families", "divison-23"])
    assert "division-23" in capsys.readouterr().err


def test_a_cell_of_the_table_cannot_break_its_row() -> None:
    sheet = report.Sheet("t", "", ["a", "b"], [["x | y", "1"]])
    assert sheet.markdown().splitlines()[-1] == "| x \\| y | 1 |"


# --- kept scores -----------------------------------------------------------------------------------


def test_what_was_scored_once_is_read_back_and_not_made_again(
    run: generate.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lively-0-x.json"
    generate.save(run, path)
    first = evaluate_file(LIVELY, path, tmp_path / "kept")
    assert first.result == evaluate(run, LIVELY)

    replays: list[object] = []
    monkeypatch.setattr(evaluating, "replay", lambda run: replays.append(run.family) or replay(run))
    assert evaluate_file(LIVELY, path, tmp_path / "kept") == first and not replays
    evaluate_file(dataclasses.replace(LIVELY, mechanism=None), path, tmp_path / "kept")
    assert len(replays) == 1  # in a quiet family every alarm is false: another score


def test_another_detector_is_scored_anew_and_its_peers_are_not(
    run: generate.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lively-0-x.json"
    generate.save(run, path)
    first = evaluate_file(LIVELY, path, tmp_path)
    of_peers, made = evaluating.of_peers, []
    monkeypatch.setattr(evaluating, "of_peers", lambda *given: made.append("peers") or of_peers(*given))
    monkeypatch.setattr(evaluating, "replay", lambda *given: made.append("detector") or replay(*given))
    monkeypatch.setattr(generate, "detector_key", lambda: "another")
    assert evaluate_file(LIVELY, path, tmp_path) == first and made == ["detector"]
    monkeypatch.setattr(evaluating.np, "__version__", "another")  # as another truth would
    assert evaluate_file(LIVELY, path, tmp_path) == first
    assert made == ["detector", "peers", "detector"]


def test_a_torn_or_foreign_file_of_scores_is_made_anew(run: generate.Run, tmp_path: Path) -> None:
    path = tmp_path / "lively-0-x.json"
    generate.save(run, path)
    first = evaluate_file(LIVELY, path, tmp_path)
    kept = path.with_suffix(".pickle")
    for content in (b"", b"\x80\x04not a pickle", kept.read_bytes()[:-20]):
        kept.write_bytes(content)
        assert evaluate_file(LIVELY, path, tmp_path) == first


def test_installed_packages_are_scored_beside_the_other_rules(run: generate.Run) -> None:
    if not peers_installed.installed():
        pytest.skip("; ".join(f"{name}: {reason}" for name, reason in peers_installed.missing().items()))
    names = list(evaluate(run, LIVELY).scores)[len(RULES) :]
    assert {name.split(",")[0] for name in names} == set(peers_installed.installed())
