"""From scores to the page: leaving one family out, the best loss threshold, targets, experiments."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfi_monitor.types import Thresholds
from tests.benchmarks.detection import fit, outcomes, report, score, targets
from tests.benchmarks.detection.evaluate import IMMINENT, MONITOR, RULES, Named, Result, Scored
from tests.benchmarks.detection.families import EDGE, EXTERNAL, FAMILIES, NUMERIC, SECOND_MOMENT, Family
from tests.benchmarks.detection.fit import DEFAULT, GRID, candidates, group_of, leave_one_out
from tests.benchmarks.detection.outcomes import Experiments
from tests.benchmarks.detection.score import Score
from tests.benchmarks.detection.targets import best_threshold, contests
from tests.benchmarks.peers import FEWEST, LEVELS, loss_thresholds


def family(name: str, mechanism: str | None = NUMERIC) -> Family:
    return dataclasses.replace(FAMILIES["division-23"], name=name, mechanism=mechanism)


def outcome(warned: int = 0, slingshots: int = 0, false: int = 0, lead: float = 4.0, **more: Any) -> Result:
    """A result whose *imminent* came to this; every other rule to nothing."""
    leads = ((round(20 * lead), lead),) * warned
    soon = Score(
        slingshots, warned, in_time=warned * (lead >= 1.25), false_alarms=false, exposure=1000, leads=leads
    )
    scores = {name: Score(slingshots) for name in RULES} | {IMMINENT: soon}
    return Result(steps=1000, scores=scores, **more)


# --- leaving one family out ------------------------------------------------------------------------


def test_leaving_a_family_out_changes_its_constant() -> None:
    """Only family "a" gains by the candidate: everyone else is scored by it, "a" itself is not."""
    results = {
        "a": (family("a"), {DEFAULT: outcome(1, 4), "other": outcome(4, 4)}),
        "b": (family("b"), {DEFAULT: outcome(4, 4), "other": outcome(4, 4)}),
        "c": (family("c", None), {DEFAULT: outcome(), "other": outcome()}),
    }
    found = leave_one_out(results)
    assert found.chosen == {"a": DEFAULT, "b": "other", "c": "other"}
    assert found.in_sample == "other" and found.counts == {"other": 2, DEFAULT: 1}


def test_twins_and_long_variants_are_left_out_together() -> None:
    gains = {DEFAULT: outcome(1, 4), "other": outcome(4, 4)}
    same = {DEFAULT: outcome(4, 4), "other": outcome(4, 4)}
    results = {name: (family(name), by) for name, by in (("a-17", gains), ("a-23-long", gains), ("b", same))}
    found = leave_one_out(results)
    assert found.of("a-17") == found.of("a-23-long") == DEFAULT and found.of("b") == "other"


@pytest.mark.parametrize(
    ("default", "other", "wins"),
    [
        # An imminent alarm in a quiet family costs more than any recall is worth.
        ((outcome(1, 4), outcome()), (outcome(4, 4), outcome(false=1)), False),
        # Then recall, then being in time, then the lead, which is worth no more than 5 τ.
        ((outcome(3, 4, lead=9.0), outcome()), (outcome(4, 4, lead=0.5), outcome()), True),
        ((outcome(4, 4, lead=1.2), outcome()), (outcome(4, 4, lead=1.3), outcome()), True),
        ((outcome(4, 4, lead=3.0), outcome()), (outcome(4, 4, lead=3.2), outcome()), True),
        ((outcome(4, 4, lead=5.0), outcome()), (outcome(4, 4, lead=9.0), outcome()), False),
        # What is equal goes to the default, and so does what a standard error can be.
        ((outcome(4, 4), outcome()), (outcome(4, 4), outcome()), False),
        ((outcome(96, 100), outcome()), (outcome(97, 100), outcome()), False),
        ((outcome(90, 100), outcome()), (outcome(97, 100), outcome()), True),
        ((outcome(4, 4), outcome(false=3)), (outcome(4, 4), outcome(false=2)), False),
        ((outcome(4, 4), outcome(false=9)), (outcome(4, 4), outcome(false=1)), True),
        # A gain does not make up for a loss in what counts more, however small.
        ((outcome(97, 100, lead=2.0), outcome()), (outcome(96, 100, lead=4.0), outcome()), False),
    ],
)  # fmt: skip
def test_the_objective_counts_in_its_order(
    default: tuple[Result, Result], other: tuple[Result, Result], wins: bool
) -> None:
    results = {
        "numeric": (family("numeric"), {DEFAULT: default[0], "other": other[0]}),
        "quiet": (family("quiet", None), {DEFAULT: default[1], "other": other[1]}),
    }
    assert leave_one_out(results).in_sample == ("other" if wins else DEFAULT)


def test_a_single_group_is_scored_by_the_defaults() -> None:
    results = {"a-17": (family("a-17"), {DEFAULT: outcome(1, 4), "other": outcome(4, 4)})}
    assert leave_one_out(results).chosen == {"a": DEFAULT}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("division-23", "division"),
        ("division-23-beta-999", "division"),
        ("division-17-float64", "division"),
        ("vit-probe", "vit"),
        ("parity-ce-95", "parity-ce"),
        ("parity-hinge-decay", "parity-hinge"),
        ("survives-float64-quick", "survives"),
        ("decay-strong", "decay"),  # the first word is never taken off
        ("high-lr-early", "high-lr-early"),
    ],
)
def test_families_of_one_training_share_a_group(name: str, group: str) -> None:
    assert name in FAMILIES and group_of(name) == group


def test_a_family_and_its_variants_in_the_registry_are_one_group() -> None:
    for name in FAMILIES:
        for ending in ("-long", "-probe", "-float64", "-projected", "-quick"):
            if name.endswith(ending):
                assert group_of(name) == group_of(name.removesuffix(ending))


def test_candidates_move_one_constant_each_and_the_default_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = candidates()
    assert next(iter(found.items())) == (DEFAULT, Thresholds()) and len(found) <= 13
    default = Thresholds().to_json()
    for name, thresholds in list(found.items())[1:]:
        changed = [key for key, value in thresholds.to_json().items() if value != default[key]]
        assert changed == [name.split()[0]] and changed[0] in GRID
    # A step that the hysteresis forbids is no candidate.
    monkeypatch.setattr(fit, "GRID", {"absorbing_enter": (0.01, 2.0)})
    assert list(candidates()) == [DEFAULT, f"absorbing_enter {2 * Thresholds().absorbing_enter:g}"]


def test_each_family_is_laid_out_under_the_candidate_it_was_left_out_of() -> None:
    limits = {DEFAULT: Thresholds(), "other": Thresholds(imminent_displacement=0.3)}
    by_name = {"a": (outcome(1, 4), outcome(4, 4)), "b": (outcome(4, 4), outcome(3, 4))}
    scored = [
        Scored(name, 0, {}, Result(scores={"peer": Score(4)}), dict(zip(limits.values(), pair, strict=True)))
        for name, pair in by_name.items()
    ]
    book = report.bind([family("a"), family("b")], scored, limits)
    assert {name: result.scores[IMMINENT].warned for name, (_, result) in book.results.items()} == {
        "a": 1,
        "b": 3,
    }
    assert {name: result.scores[IMMINENT].warned for name, (_, result) in book.default.items()} == {
        "a": 1,
        "b": 4,
    }
    assert all("peer" in result.scores for _, result in book.results.values())


# --- the best loss threshold -----------------------------------------------------------------------


def test_a_loss_threshold_waits_until_the_running_loss_has_been_below_it() -> None:
    loss = np.concatenate([np.full(200, 1.0), np.full(300, 1e-4), np.full(10, 2e-2)])
    steps = np.arange(1, len(loss) + 1)
    found = loss_thresholds({"loss": (steps, loss)}.__getitem__)
    assert list(found) == list(LEVELS) and LEVELS[0] == 1e-6 and LEVELS[-1] == 0.1
    assert found[1e-2].tolist() == list(range(501, 511))  # not in the 200 steps before the descent
    assert found[0.1].size == 0
    assert found[1e-5].size == 0  # it was never below: there is nothing to rise from
    assert loss_thresholds({"loss": (steps[:FEWEST], loss[:FEWEST])}.__getitem__)[1e-2].size == 0


def scored(warned: int, false: int, lead: float, slingshots: int = 20) -> Score:
    leads = ((round(20 * lead), lead),) * warned
    return Score(slingshots, warned, in_time=warned, false_alarms=false, exposure=10_000, leads=leads)


def test_the_best_loss_threshold_is_as_good_as_ours_and_has_fewest_false_alarms() -> None:
    ours = scored(20, 1, lead=2.0)
    by_level = {
        0.1: scored(20, 0, lead=1.9),  # later than ours
        0.2: scored(18, 0, lead=3.0),  # warns of fewer, and of less than .95
        0.3: scored(19, 4, lead=2.0),
        0.4: scored(20, 2, lead=2.5),
        0.5: scored(20, 2, lead=3.0),
    }
    assert best_threshold(ours, by_level) == 0.5  # of two with two false alarms, the longer lead
    assert best_threshold(ours, by_level, {0.5: Score(false_alarms=1)}) == 0.4
    assert best_threshold(ours, {0.1: by_level[0.1]}) is None
    assert best_threshold(scored(10, 0, lead=2.0), by_level) == 0.2  # no more recall is asked than ours


@pytest.mark.parametrize(
    ("ours", "level", "quiet", "verdict"),
    [
        (scored(20, 1, 2.0), scored(20, 2, 2.0), 0, "yes"),
        (scored(20, 2, 2.0), scored(20, 2, 2.0), 0, "no: as few"),
        (scored(20, 2, 2.0), scored(20, 2, 2.0), 3, "yes: in the quiet families"),
        (scored(20, 3, 2.0), scored(20, 2, 2.0), 3, "no: false alarms"),
        (scored(18, 0, 2.0), scored(20, 2, 2.0), 0, "no: recall"),
        (scored(20, 9, 2.0), scored(20, 0, 1.0), 0, "yes: none is as early"),
        (scored(18, 0, 2.0), scored(20, 2, 1.0), 0, "no: recall"),
    ],
)
def test_a_family_is_won_by_recall_at_fewer_false_alarms(
    ours: Score, level: Score, quiet: int, verdict: str
) -> None:
    results = {
        "hinge": (
            family("hinge", SECOND_MOMENT),
            Result(scores={IMMINENT: ours}, by_level={1e-3: level}),
        ),
        "still": (
            family("still", None),
            Result(scores={IMMINENT: Score()}, by_level={1e-3: Score(false_alarms=quiet)}),
        ),
    }
    (found,) = contests(results)
    assert found.verdict == verdict and found.won == verdict.startswith("yes")
    sheet = targets.contest_sheet(results)
    assert [len(cells) for cells in sheet.rows] == [len(sheet.header)] and sheet.rows[0][-1] == verdict


def test_only_second_moment_and_edge_families_with_slingshots_are_contests() -> None:
    item = Result(scores={IMMINENT: scored(20, 0, 2.0)})
    none = Result(scores={IMMINENT: Score()})
    results = {
        "hinge-95": (family("hinge-95", SECOND_MOMENT), item),
        "hinge-99": (family("hinge-99", SECOND_MOMENT), item),
        "early": (family("early", EDGE), none),
        "numeric": (family("numeric"), item),
        "kick": (family("kick", EXTERNAL), item),
    }
    found = contests(results)
    assert [(item.family, item.ours.slingshots) for item in found] == [("hinge-95", 20), ("hinge-99", 20)]


# --- experiments -----------------------------------------------------------------------------------


def event(name: str, start: int, mechanism: str, *, reproduced: bool = True, **more: Any) -> dict[str, Any]:
    replayed = {"mechanism": mechanism, "reproduced": reproduced, "arms": {}}
    return {
        "family": name, "seed": 0, "alarm": "imminent", "alarm_step": start - 80, "slingshot_step": start,
        "lead_tau": 4.0, "remedies": {}, "replay": replayed, "twin": None, "named": mechanism, **more,
    }  # fmt: skip


MADE_UP: dict[str, Any] = {
    "events": [
        event("division-23", 900, NUMERIC, twin={"confirmed": True},
              remedies={"float64 loss": True, "float64 loss + lr × 0.1 for 2τ": True}),
        event("division-23", 1400, NUMERIC, twin={"confirmed": False},
              remedies={"float64 loss": False, "float64 loss + lr × 0.1 for 2τ": True}),
        event("parity-hinge", 500, SECOND_MOMENT, remedies={"lr × 0.1 for 2τ": False}),
        event("parity-hinge", 700, EDGE, reproduced=False),
    ],
    "at_risk": [{"family": "digits", "seed": 0, "step": 10, "twin": {"confirmed": True}}],
    "cadence": [
        {"family": "division-23", "seed": 0, "rule": "imminent", "recall_every": [4, 4],
         "recall_auto": [3, 4], "leads_every": [4.0, 5.0, 6.0], "leads_auto": [4.0, 4.7, 6.0]},
    ],
    "date": "2020-02-02",
}  # fmt: skip


@pytest.fixture
def experiments(tmp_path: Path) -> Experiments:
    (tmp_path / outcomes.FILE).write_text(json.dumps(MADE_UP), encoding="utf-8")
    found = Experiments.load(tmp_path)
    assert found is not None
    return found


def test_experiments_that_were_not_run_are_said_to_be_missing(tmp_path: Path) -> None:
    assert Experiments.load(tmp_path) is None
    (sheet,) = outcomes.sheets(None)
    assert "Not run" in sheet.markdown()


def test_averted_shares_are_counted_per_remedy_and_mechanism(experiments: Experiments) -> None:
    assert experiments.averted(NUMERIC, "float64 loss") == {"division-23": (1, 2)}
    assert experiments.averted(SECOND_MOMENT, "float64 loss") == {}
    assert experiments.averted(None, "lr × 0.1 for 2τ") == {"parity-hinge": (0, 1)}
    assert experiments.advised(NUMERIC) == "float64 loss"
    assert experiments.advised(EDGE) is None


def test_replays_that_did_not_reproduce_the_run_are_no_truth(experiments: Experiments) -> None:
    assert set(experiments.verdicts().values()) == {NUMERIC, SECOND_MOMENT}
    assert experiments.unreproduced() == 1


def test_twins_and_cadence_are_added_up(experiments: Experiments) -> None:
    assert outcomes.pool(experiments.twins()) == (2, 3)
    held = experiments.cadences()[IMMINENT]
    assert held.recall_lost == pytest.approx(25.0) and held.lead_lost == pytest.approx(0.3)


def test_unknown_is_no_answer_and_counted_apart() -> None:
    named = [
        Named("division-23", 0, step, mechanism)
        for step, mechanism in ((1, NUMERIC), (2, EDGE), (3, "unknown"), (4, "none"))
    ]
    found = outcomes.agreement(named)
    assert (found.right, found.judged, found.unknown) == (1, 3, 1)
    # Held against verdicts: those without one are left out, and a verdict "unknown" judges nothing.
    found = outcomes.agreement(named, {("division-23", 0, 2): EDGE, ("division-23", 0, 3): "unknown"})
    assert (found.right, found.judged, found.unknown) == (1, 1, 0)


# --- targets and page ------------------------------------------------------------------------------


def results_of(numeric: Result, quiet: Result) -> targets.Results:
    return {
        "division-23": (FAMILIES["division-23"], numeric),
        "gpt": (FAMILIES["gpt"], quiet),
    }


def row(found: list[targets.Target], start: str) -> targets.Target:
    (match,) = [item for item in found if item.what.startswith(start)]
    return match


def test_targets_are_reached_by_what_was_measured_and_by_nothing_else(experiments: Experiments) -> None:
    good = outcome(50, 50, forecasts={4: score.Forecasts(50, 50, (1.5,) * 9 + (3.0,))},
                   named=(Named("division-23", 0, 900, NUMERIC),))  # fmt: skip
    calm = outcome()
    found = targets.targets(results_of(good, calm), experiments)
    assert row(found, "numeric, imminent: recall").reached
    assert "50/50" in row(found, "numeric, imminent: recall").measured
    assert row(found, "numeric, imminent: lead, median").reached
    assert row(found, "quiet suite").reached and row(found, "numeric, imminent: false").reached
    assert row(found, "forecast within").reached and "0.900: 9/10" in row(found, "forecast within").measured
    assert row(found, "forecast inside").reached
    assert row(found, "mechanism: agreement with replay").reached
    averted = row(found, "numeric: averted")
    assert averted.reached is False and "1/2" in averted.measured and "float64 loss" in averted.what
    assert row(found, "numeric, at risk: confirmed").reached is False  # 2 of 3
    assert row(found, "sampled cadence: recall").reached is False
    assert row(found, "sampled cadence: median").reached
    assert row(found, "… families").reached is None  # no such family here

    bad = outcome(48, 50, lead=1.0, forecasts={4: score.Forecasts(50, 50, (3.0,))}, numbers_too_late=1)
    found = targets.targets(results_of(bad, outcome(false=1)), None)
    for what in ("numeric, imminent: recall", "numeric, imminent: lead, median", "quiet suite",
                 "numeric, imminent: lead, 10th", "numeric, imminent: false", "forecast within",
                 "forecast inside"):  # fmt: skip
        assert row(found, what).reached is False, what
    for what in ("numeric: averted", "sampled cadence: recall", "numeric, at risk: confirmed"):
        assert row(found, what).reached is None, what


def test_a_few_late_warnings_miss_the_tenth_percentile_and_not_the_median() -> None:
    late = outcome(40, 40, lead=4.0) + outcome(10, 10, lead=0.5)
    found = targets.targets(results_of(late, outcome()), None)
    assert row(found, "numeric, imminent: lead, median").reached
    missed = row(found, "numeric, imminent: lead, 10th")
    assert missed.reached is False and missed.measured.startswith("0.50 τ (n = 50")


def test_a_share_just_at_its_target_reaches_it() -> None:
    assert targets._at_least("x", 0.95, 95, 100).reached
    assert targets._at_least("x", 0.95, 94, 100).reached is False
    assert targets._at_least("x", 0.95, 0, 0).reached is None


def test_the_interval_of_a_median_holds_it_and_narrows_with_the_number() -> None:
    def width(n: int) -> float:
        low, high = map(float, re.findall(r"[\d.]+", targets._ranks([i / n for i in range(n)], 0.5)))
        assert low <= 0.5 <= high
        return high - low

    assert width(400) < width(40) < 0.5 and targets._ranks([], 0.5) == ""


def page_of(numeric: Result, quiet: Result, found: Experiments | None) -> str:
    results = results_of(numeric, quiet)
    chosen = {"division": "imminent_exit 0.1", "gpt": DEFAULT}
    book = report.Book(results, results, fit.Fit(chosen, DEFAULT), 3, found, [{"readings_by": "old"}])
    return report.page(book, "the command")


def test_the_page_begins_with_the_targets_and_says_what_was_left_out(experiments: Experiments) -> None:
    text = page_of(outcome(3, 4, named=(Named("division-23", 0, 900, NUMERIC),)), outcome(), experiments)
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles[0] == "## Targets" and "## Averted share" in titles
    assert "2 groups. Chosen how often: imminent_exit 0.1: 1, default: 1" in text
    assert "| imminent, defaults | 3/4" in text and "1 runs were recorded by another version" in text
    made = "of 2020-02-02, by an earlier version"
    assert f"Experiments: trials {made}; cadence {made}." in text
    assert all(f"| {rule} |" in text for rule in MONITOR)


def cells_of(text: str) -> dict[str, str]:
    """First cell → row, of the tables that the experiments do not decide."""
    lines = text.split("## Averted share")[0].splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


def test_no_result_on_the_page_is_typed_by_hand(experiments: Experiments) -> None:
    """Other scores change every row that they should decide; without any there is no number at all."""
    one = cells_of(page_of(outcome(3, 4), outcome(), experiments))
    two = cells_of(page_of(outcome(31, 47, 5, lead=7.3), outcome(false=2), experiments))
    for name in (
        "numeric, imminent: recall",
        "numeric, imminent: lead, median",
        "numeric, imminent: lead, 10th percentile",
        "quiet suite: imminent alarms",
        "imminent",
        "division-23",
        "gpt",
    ):
        assert one[name] != two[name], name
    empty = Result(runs=0, scores={name: Score() for name in RULES})
    nothing = page_of(empty, empty, None)
    rows = nothing.split("## Targets")[1].split("## Slingshots")[0].splitlines()
    measured = [line.split("|")[3] for line in rows if line.startswith("| ")][2:]
    assert len(measured) == len(targets.targets({}, None))
    assert not any(re.search(r"\d", cell) for cell in measured)
