"""From scores to the page: alerts counted one by one, names of mechanisms, targets."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nfi_monitor.types import Alert, AlertKind, AlertState, Change, Mechanism, Phase, Severity
from tests.benchmarks.detection import naming, readme, report, score, targets
from tests.benchmarks.detection.evaluate import (
    AUTO,
    EVERY,
    IMMINENT,
    MONITOR,
    RULES,
    Named,
    Result,
    Scored,
    at,
)
from tests.benchmarks.detection.families import (
    EDGE,
    EXTERNAL,
    FAMILIES,
    FROZEN,
    NEWEST_FIRST,
    NUMERIC,
    SECOND_MOMENT,
    Family,
)
from tests.benchmarks.detection.score import Event, Score, Truth
from tests.benchmarks.detection.told import Told, told

TAU = 20.0


def family(name: str, mechanism: str | None = NUMERIC) -> Family:
    return dataclasses.replace(FAMILIES["division-23"], name=name, mechanism=mechanism)


def outcome(warned: int = 0, slingshots: int = 0, false: int = 0, lead: float = 4.0, **more: Any) -> Result:
    """A result whose *imminent* came to this at both cadences; every other rule to nothing."""
    leads = ((round(20 * lead), lead),) * warned
    soon = Score(
        slingshots, warned, in_time=warned * (lead >= 1.25), false_alarms=false, exposure=1000, leads=leads
    )
    scores = {name: Score(slingshots) for name in RULES}
    scores |= {IMMINENT: soon, at(IMMINENT, AUTO): soon}
    counted = Told(1000, 1000, warned, warned, 0, warned, warned, 0, slingshots, slingshots)
    given: dict[str, Any] = {
        "steps": 1000,
        "under": {IMMINENT: 70},
        "told": {EVERY: counted, AUTO: dataclasses.replace(counted, read=150)},
    }
    return Result(scores=scores, **(given | more))


# --- alerts, one by one ------------------------------------------------------------------------------


def alert(
    kind: AlertKind, first: int, last: int, severity: Severity = Severity.WARNING, id_: str = "a"
) -> Alert:
    named = Mechanism.UNKNOWN
    return Alert(id_, kind, severity, AlertState.RESOLVED, Phase.HEALTHY, first, last, named, 0.5)


def truth(*starts: int, near: tuple[int, ...] = ()) -> Truth:
    events, misses = (tuple(Event(start, start + 50) for start in given) for given in (starts, near))
    return Truth(3000, TAU, events, misses)


@pytest.mark.parametrize(
    ("first", "right", "cut"),
    [
        (800, 1, 0),  # 10 τ before
        (799, 0, 0),
        (1001, 1, 0),  # at its second loss
        (1040, 1, 0),  # in it
        (2000, 0, 0),
        (2850, 0, 1),  # 10 τ would reach beyond the end
    ],
)
def test_an_imminent_alert_is_right_if_a_slingshot_begins_within_ten_tau(
    first: int, right: int, cut: int
) -> None:
    found = told([alert(AlertKind.IMMINENT, first, first + 5)], [], truth(1000), 3000)
    assert (found.imminent, found.imminent_right, found.imminent_cut) == (1, right, cut)


def test_a_warning_counts_from_the_step_at_which_it_became_one_even_if_its_severity_falls() -> None:
    info = alert(AlertKind.AT_RISK, 100, 100, Severity.INFO)
    warning = dataclasses.replace(info, severity=Severity.WARNING)
    for step, right in ((200, 1), (199, 0)):
        changes = [(100, Change.BEGIN, info), (step, Change.UPDATE, warning), (700, Change.UPDATE, info)]
        found = told([dataclasses.replace(info, last_step=900)], changes, truth(1000), 3000)
        assert (found.warnings, found.warnings_right) == (1, right)
    assert told([info], [(100, Change.BEGIN, info)], truth(1000), 3000).warnings == 0


def test_the_time_under_a_warning_ends_where_the_severity_falls() -> None:
    info = alert(AlertKind.AT_RISK, 100, 100, Severity.INFO)
    warning = dataclasses.replace(info, severity=Severity.WARNING)
    changes = [
        (100, Change.BEGIN, info),
        (200, Change.UPDATE, warning),
        (210, Change.UPDATE, info),
        (300, Change.UPDATE, warning),
        (320, Change.END, warning),
    ]
    ended = dataclasses.replace(warning, last_step=320)
    other = alert(AlertKind.IMMINENT, 305, 310, id_="b")
    steps = score.warning_steps([ended, other], changes)
    assert steps == [*range(200, 210), *range(300, 320)]


def test_slingshots_are_called_by_alerts_that_are_about_them() -> None:
    calls = [alert(AlertKind.SLINGSHOT, first, first + 9) for first in (1004, 1990, 2500)]
    found = told(calls, [], truth(1000, near=(2495,)), 3000)
    assert (found.slingshots, found.called, found.false_calls, found.near_calls) == (1, 1, 2, 1)
    two = told([alert(AlertKind.SLINGSHOT, 1004, 1100)], [], truth(1000, 1060), 3000)
    assert (two.called, two.false_calls) == (2, 0)  # it still fired when the second began
    assert told([], [], truth(1000), 7) + found == dataclasses.replace(
        found, steps=6000, read=3007, slingshots=2
    )


# --- names -------------------------------------------------------------------------------------------


def test_unknown_is_no_answer_and_counted_apart() -> None:
    named = [
        Named("division-23", 0, step, mechanism)
        for step, mechanism in ((1, NUMERIC), (2, EDGE), (3, "unknown"), (4, "none"))
    ]
    found = naming.agreement(named, {"division-23": NUMERIC})
    assert (found.right, found.judged, found.unknown) == (1, 3, 1)
    assert naming.agreement(named, {}).judged == 0


# --- targets and page ------------------------------------------------------------------------------


def results_of(numeric: Result, quiet: Result, kicks: Result | None = None) -> targets.Results:
    found = {"division-23": (FAMILIES["division-23"], numeric), "gpt": (FAMILIES["gpt"], quiet)}
    return found if kicks is None else found | {"hinge": (family("hinge", SECOND_MOMENT), kicks)}


def row(found: list[targets.Target], start: str) -> targets.Target:
    (match,) = [item for item in found if item.what.startswith(start)]
    return match


def test_targets_are_reached_by_what_was_measured_and_by_nothing_else() -> None:
    found = targets.targets(results_of(outcome(50, 50), outcome(), outcome(19, 20)))
    assert all(item.reached for item in found)
    assert "50/50" in row(found, "numeric, imminent: recall").measured
    assert "7.0% of the steps under this alarm" in row(found, "numeric, imminent: lead, median").measured
    assert "15.0% of the steps read" in row(found, "`every").measured

    many = Told(1000, 1000, 10, 8, 0, 10, 7, 0, 50, 49, 2, 1)
    blind = outcome(48, 50, lead=1.0, told={EVERY: many, AUTO: many})
    blind = dataclasses.replace(blind, scores=blind.scores | {at(IMMINENT, AUTO): Score(50, 40)})
    found = targets.targets(results_of(blind, outcome(), outcome(18, 20, false=1, told={})))
    assert not any(item.reached for item in found)
    assert row(found, "slingshots called that").measured.startswith("2, 1 of them at a rise too small")


def test_alerts_that_the_end_cut_off_are_no_trials() -> None:
    cut = Told(1000, 1000, 10, 9, 1, 5, 4, 1)
    found = targets.targets(results_of(outcome(told={EVERY: cut}), Result(runs=0)))
    for start in ("P(slingshot within 10", "P(slingshot within 40"):
        assert row(found, start).reached
        assert row(found, start).measured.endswith("1 more cut off by the end of the run")


def test_a_few_late_warnings_miss_the_tenth_percentile_and_not_the_median() -> None:
    late = outcome(40, 40, lead=4.0) + outcome(10, 10, lead=0.5)
    found = targets.targets(results_of(late, outcome()))
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


def test_runs_of_a_family_are_added_up_and_missing_ones_are_named() -> None:
    scored = [
        Scored("a", seed, {}, Result(scores={"peer": Score(4)}), outcome(warned, 4))
        for seed, warned in enumerate((1, 4))
    ]
    others = [dataclasses.replace(family(name), seeds=(0, 1)) for name in ("a", "b")]
    book = report.bind(others, scored, "frozen")
    ((_, result),) = book.results.values()
    assert result.scores[IMMINENT].warned == 5 and result.scores["peer"].slingshots == 8
    assert result.runs == 2 and list(book.missing) == ["b"]


def page_of(numeric: Result, quiet: Result) -> str:
    book = report.Book(results_of(numeric, quiet), "frozen", ["z-late"], [{"readings_by": "old"}])
    return report.page([book], "the command")


def test_the_page_begins_with_the_targets_and_says_what_is_missing() -> None:
    text = page_of(outcome(3, 4, named=(Named("division-23", 0, 900, NUMERIC),)), outcome())
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles[0] == "## Targets" and "## Alerts one by one" in titles
    assert "Not recorded, or not all seeds: z-late." in text and "commit 8df60af" in text
    assert "1 runs were recorded by another version" in text
    assert all(f"| {rule} |" in text for rule in MONITOR)


def cells_of(text: str) -> dict[str, str]:
    """First cell → row."""
    return {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}


def test_no_result_on_the_page_is_typed_by_hand() -> None:
    """Other scores change every row that they should decide; without any there is no number at all."""
    one = cells_of(page_of(outcome(3, 4), outcome()))
    two = cells_of(page_of(outcome(31, 47, 5, lead=7.3), outcome(false=2)))
    for name in (
        "numeric, imminent: recall",
        "numeric, imminent: lead, median",
        "numeric, imminent: lead, 10th percentile",
        "imminent",
        "division-23",
        "gpt",
    ):
        assert one[name] != two[name], name
    empty = Result(runs=0, scores={name: Score() for name in RULES})
    nothing = page_of(empty, empty)
    rows = nothing.split("## Targets")[1].split("## Slingshots")[0].splitlines()
    measured = [line.split("|")[-3] for line in rows if line.startswith("| ")][2:]
    assert len(measured) == len(targets.targets({}))
    assert not any(re.search(r"\d", cell) for cell in measured)


def test_the_halves_have_their_own_tables_on_the_page_the_newest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest, *others = NEWEST_FIRST
    monkeypatch.setitem(report.AFTER, newest, "abc1234")
    names = [f"{letter}-a" for letter in "abcdefgh"[: len(NEWEST_FIRST)]]
    found = {name: outcome(place + 1, 10) for place, name in enumerate(names)}
    families = [
        dataclasses.replace(family(name), half=half, seeds=(0,))
        for name, half in zip(names, NEWEST_FIRST, strict=True)
    ]
    known = [Scored(name, 0, {}, outcomes) for name, outcomes in found.items()]
    books = report.bind_halves(families[::-1], known, FROZEN)
    text = report.page(books, "the command")
    assert [book.suite for book in books] == list(NEWEST_FIRST)
    first, *rest = text.split("\n# ")[1:]
    assert first.startswith(f"{newest.capitalize()} half") and "after commit abc1234, in which" in first
    for place, (half, part) in enumerate(zip(others, rest, strict=True), start=2):
        assert part.startswith(f"{half.capitalize()} half") and f"{place}/10" in part
        assert ("commit 8df60af" if half == FROZEN else "no blind test any more") in part
    shown = io.StringIO()
    report.show(books, Console(file=shown, width=200))
    assert shown.getvalue().index(f"{newest} half") < shown.getvalue().index("frozen half")
    path = tmp_path / "FROZEN.md"
    path.write_text(text, "utf-8")
    assert readme.Page(path).rows("Targets")["numeric, imminent: recall"][1].startswith("0.100: 1/10")
    assert [book.suite for book in report.bind_halves(families, known[-1:], FROZEN)] == [FROZEN]
    assert [book.suite for book in report.bind_halves(families[:4], known, "")] == [""]


def test_kicks_from_outside_are_shown_apart() -> None:
    kicked = {"kick": (family("kick", EXTERNAL), outcome(1, 2))}
    titles = [sheet.title for sheet in report.sheets(report.Book(kicked))]
    assert "Slingshots, from outside" in titles and targets.others(kicked).runs == 0
