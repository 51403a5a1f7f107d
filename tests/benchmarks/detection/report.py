"""Scores → tables on the terminal and on the page of a suite; no number is typed by hand."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from tests.benchmarks.detection import naming, peers_installed, targets
from tests.benchmarks.detection.evaluate import (
    AT_RISK,
    AT_RISK_WARNING,
    AUTO,
    EVERY,
    IMMINENT,
    MONITOR,
    RULES,
    Result,
    Scored,
    at,
    total,
)
from tests.benchmarks.detection.families import (
    EDGE,
    EXTERNAL,
    FROZEN,
    HELD_OUT,
    HELD_OUT_2,
    HELD_OUT_3,
    HELD_OUT_4,
    HELD_OUT_5,
    NEWEST_FIRST,
    NUMERIC,
    SECOND_MOMENT,
    Family,
)
from tests.benchmarks.detection.generate import detector_key, readings_key, versions
from tests.benchmarks.detection.score import (
    ABRUPT_HORIZON,
    ABRUPT_REFRACTORY,
    FORECAST_AT,
    HORIZON,
    REFRACTORY,
    TOO_LATE,
    Forecasts,
    Score,
)
from tests.benchmarks.detection.sheet import (
    Sheet,
    alarms,
    count,
    leads,
    portion,
    rate,
    share,
    sounded,
)
from tests.benchmarks.detection.targets import Results
from tests.benchmarks.detection.told import Told

PAGES = {"quick": "QUICK.md", FROZEN: "FROZEN.md"}
"""Suite → its page beside this file. The full suite has none: it takes hours."""
CHANGED_SINCE = (
    "After the frozen halves had been read, rules were changed and added: the level of a kick between "
    "minibatches, warnings that led to nothing raise their rule's level, growing oscillations are a risk, "
    "slow rises and collapses are slingshots, an unread corrupt gradient is found in the second moment, and "
    "what a slingshot of a loss in other units is. The frozen halves were looked at since, so they are no "
    "blind test any more."
)
SINCE = (
    ", but for four conditions of the rule *overreaching*: they came after it had been read once, and were "
    "chosen on other families. tests/benchmarks/LOG.md has the figures of that first reading"
)
"""What has changed since the newest half was read; empty: nothing."""
AFTER = {
    HELD_OUT_5: "9c37c0c",
    HELD_OUT_4: "3dbc208",
    HELD_OUT_3: "9e4b874",
    HELD_OUT_2: "523ae21",
    HELD_OUT: "7a02bd4",
}
"""Half → the commit with the rules and constants that it was to test; trained after it. "": not yet."""


def held_out(half: str) -> str:
    """Return what a page says of a half that was trained after rules had changed."""
    if not AFTER[half]:
        return f"The {half} half is not trained yet."
    trained = (
        f"The {half} half has other architectures, tasks and losses than the halves before it. It was "
        f"trained after commit {AFTER[half]}"
    )
    if half == NEWEST_FIRST[0]:
        return f"{trained}, in which all rules and constants of the alarms stand that are scored here{SINCE}."
    return f"{trained}. Rules were changed after it had been read, so it is no blind test any more."


ABOUT = {
    "quick": "Some of these families were looked at while the constants were chosen.",
    FROZEN: "These families are of architecture classes and tasks on which no constant was fitted. The "
    "constants were fitted on the tuning half and fixed in commit 8df60af, before any of these families was "
    "trained. " + CHANGED_SINCE,
}


@dataclass(frozen=True)
class Book:
    """All that the page is made of."""

    results: Results
    suite: str = ""
    missing: Sequence[str] = ()
    """Families of the suite without a recorded run."""
    infos: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


def bind(families: Iterable[Family], scored: Sequence[Scored], suite: str = "") -> Book:
    """Add up the runs of each family."""
    results: dict[str, tuple[Family, Result]] = {}
    missing = []
    for family in families:
        runs = [run.result for run in scored if run.family == family.name]
        if runs:
            results[family.name] = family, total(runs)
        if len(runs) < len(family.seeds):
            missing.append(family.name)
    return Book(results, suite, missing, [run.info for run in scored if run.family in results])


def bind_halves(families: Sequence[Family], scored: Sequence[Scored], suite: str = "") -> list[Book]:
    """Return a book for each half that has a recorded run, the newest half first; one if nothing has."""
    halves = [half for half in NEWEST_FIRST if any(family.half == half for family in families)]
    if suite != FROZEN or not halves:
        return [bind(families, scored, suite)]
    books = [bind([family for family in families if family.half == half], scored, half) for half in halves]
    return [book for book in books if book.results] or books[-1:]


_GROUPS: dict[str, tuple[str | None, ...]] = {
    "numeric": (NUMERIC,),
    "second moment, edge of stability": (SECOND_MOMENT, EDGE),
    "from outside": (EXTERNAL,),
}


def sheets(book: Book) -> list[Sheet]:
    results = book.results
    quiet = [_quiet(results)] if any(family.quiet for family, _ in results.values()) else []
    return [
        targets.sheet(results),
        *_rules(book),
        _alerts(results),
        _families(results),
        *quiet,
        _mechanisms(results),
        _forecasts(results),
    ]


def _names(results: Results) -> list[str]:
    """The rules, and after them whatever package was installed when the runs were scored."""
    scored = (name for _, result in results.values() for name in result.scores)
    return list(dict.fromkeys([*RULES, *scored]))


def _peers(results: Results) -> list[str]:
    return [name for name in _names(results) if name not in MONITOR]


def _of(results: Results, mechanisms: Iterable[str | None]) -> list[Result]:
    return [result for family, result in results.values() if family.mechanism in mechanisms]


def _rules(book: Book) -> Iterable[Sheet]:
    """Monitor and peers side by side, pooled over the families of a kind."""
    calm = total(_of(book.results, (None,)))
    for title, mechanisms in _GROUPS.items():
        found = _of(book.results, mechanisms)
        if not found:
            continue
        pooled = total(found)
        slingshots = pooled.scores.get(IMMINENT, Score()).slingshots
        header = [
            "rule", "slingshots warned of", "of them early", f"≥ {TOO_LATE:g} τ ahead",
            "lead: median (10th pct)", "steps under this alarm", "false /10k, same runs",
        ]  # fmt: skip
        if calm.runs:
            header.append("false /10k, quiet families")
        yield Sheet(
            f"Slingshots, {title}",
            f"{slingshots} slingshots in {len(found)} families, {pooled.runs} runs, {pooled.steps:,} steps"
            + (f"; quiet families: {calm.steps:,} steps" if calm.runs else "")
            + f". Warned: an alarm began within {HORIZON:g} τ before, or still sounded (early). False alarms "
            "per 10,000 steps at which one would be false, [95%].",
            header,
            [_rule(name, pooled, calm) for name in _names(book.results)],
        )


def _rule(name: str, pooled: Result, quiet: Result) -> list[str]:
    score, calm = (result.scores.get(name, Score()) for result in (pooled, quiet))
    cells = [
        name,
        share(score.warned, score.slingshots),
        str(score.early),
        share(score.in_time, score.slingshots),
        leads(score, steps=True),
        portion(pooled.under.get(name, 0), pooled.steps),
        rate(score.false_alarms, score.exposure),
    ]
    return [*cells, rate(calm.false_alarms, calm.exposure)] if quiet.runs else cells


def _alerts(results: Results) -> Sheet:
    rows = []
    groups = _GROUPS | {"quiet": (None,)}
    for title, mechanisms in groups.items():
        pooled = total(_of(results, mechanisms))
        if not pooled.runs:
            continue
        for cadence in (EVERY, AUTO):
            rows.append([title, cadence, *_counted(pooled.told.get(cadence, Told()))])
    return Sheet(
        "Alerts one by one",
        "Right: a slingshot begins within 10 τ (at least 50 steps) after *imminent*, within 40 τ after *at "
        "risk* became a warning. Those that the end of the run cut off are left out; their number stands "
        "after the +. Called: slingshots of the truth with an alert *slingshot*. Read: steps read in full.",
        ["families", "cadence", "imminent, right", "warnings, right", "slingshots called",
         "called that are none", "read"],
        rows,
    )  # fmt: skip


def _counted(found: Told) -> list[str]:
    def right(good: int, all_: int, cut: int) -> str:
        return share(good, all_ - cut) + (f" + {cut}" if cut else "")

    near = f" ({found.near_calls} near)" if found.near_calls else ""
    return [
        right(found.imminent_right, found.imminent, found.imminent_cut),
        right(found.warnings_right, found.warnings, found.warnings_cut),
        share(found.called, found.slingshots),
        f"{found.false_calls}{near}",
        portion(found.read, found.steps),
    ]


def _families(results: Results) -> Sheet:
    rows = []
    for family, result in results.values():
        if family.quiet:
            continue
        soon, risk = result.scores[IMMINENT], result.scores[AT_RISK_WARNING]
        sparse = result.told.get(AUTO, Told())
        best = max(_peers({family.name: (family, result)}), key=lambda name: _order(result.scores[name]))
        peer = result.scores[best]
        rows.append(
            [family.name, f"{result.runs} × {family.steps}", f"{soon.slingshots} + {soon.near_misses}",
             count(soon), leads(soon, steps=True), portion(result.under.get(IMMINENT, 0), result.steps),
             alarms(soon), count(risk), leads(risk),
             portion(result.under.get(AT_RISK_WARNING, 0), result.steps),
             f"{count(result.scores.get(at(IMMINENT, AUTO), Score()))}, "
             f"read {portion(sparse.read, sparse.steps)}",
             f"{best}: {count(peer)}, {alarms(peer)}"]
        )  # fmt: skip
    return Sheet(
        "Spiking families",
        "Warned of (in time) by *imminent* and by *at risk* of severity warning, with leads: median (10th "
        "percentile) in steps and τ, and the share of the steps under that alarm; alarms: false, before a "
        "near miss, censored. Best peer: the one with most slingshots warned of in time.",
        ["family", "runs × steps", "slingshots + near misses", "imminent", "lead", "under it",
         "alarms f/n/c", "at risk, warning", "lead in τ", "under it", "imminent, auto",
         "best peer: warned, alarms f/n/c"],
        rows,
    )  # fmt: skip


def _order(score: Score) -> tuple[int, int]:
    return score.in_time, -score.false_alarms


def _quiet(results: Results) -> Sheet:
    rows = []
    for family, result in results.values():
        if not family.quiet:
            continue
        soon = result.scores[IMMINENT]
        cells = [sounded(result.scores[name]) for name in (AT_RISK, AT_RISK_WARNING, IMMINENT)]
        rows.append(
            [family.name, f"{result.runs} × {family.steps}",
             f"{soon.slingshots} + {soon.near_misses}", *cells,
             " ".join(str(result.scores.get(name, Score()).false_alarms) for name in _peers(results))]
        )  # fmt: skip
    return Sheet(
        "Quiet families",
        "False alarms, and the share of steps under them. *At risk* is a state: where rows do absorb it is "
        "true, though nothing follows. Peers in the order of the first table.",
        ["family", "runs × steps", "slingshots + near misses", "at risk", "at risk, warning", "imminent",
         "peers"],
        rows,
    )  # fmt: skip


def _mechanisms(results: Results) -> Sheet:
    named = [item for _, result in results.values() for item in result.named]
    registered = {name: family.mechanism for name, (family, _) in results.items()}
    return naming.mechanism_sheet(
        "Mechanism named, against what is registered",
        "Rows: what the family is registered as. Columns: what the slingshot's alert said. Unknown is no "
        "answer: the share is of the others. proofs/PROOFS.md holds the names against replays.",
        naming.agreement(named, registered),
    )


def _forecasts(results: Results) -> Sheet:
    numeric = total(result for family, result in results.values() if family.mechanism == NUMERIC)
    rows = []
    for distance in FORECAST_AT:
        found = numeric.forecasts.get(distance, Forecasts())
        said = sorted(found.ratios)
        middle = f"{said[len(said) // 2]:.2f}" if said else "–"
        rows.append(
            [f"{distance} τ", str(found.slingshots), share(found.warned, found.slingshots), str(len(said)),
             middle, share(found.within(2.0), len(said)), share(found.within(3.0), len(said))]
        )  # fmt: skip
    return Sheet(
        "Forecast, numeric families",
        "At so many τ before a slingshot: how many had been warned of, how many with a number of steps, the "
        "median of said / true, and the shares within a factor of 2 and of 3 (the ends of an *imminent* "
        "alert's interval). In the last τ a number is too high: "
        f"before {numeric.numbers_too_late} slingshots there was one.",
        ["before", "slingshots", "warned", "numbers", "said / true", "within 2×", "within 3×"],
        rows,
    )


# --- the page --------------------------------------------------------------------------------------


def page(books: Sequence[Book], command: str) -> str:
    """Return the page of a suite, or of some families; ``books`` are the halves that it shows one by one."""
    title = f" on the {books[-1].suite} families" if books[-1].suite else ""
    lines = [
        f"# What the warnings are worth{title}",
        "",
        f"Written by `{command}` on {datetime.date.today().isoformat()}; do not edit.",
        "",
        "Versions: "
        + ", ".join(f"{name} {value}" for name, value in versions().items())
        + f"; detector code {detector_key()}.",
        f"Horizon {HORIZON:g} τ, refractory {REFRACTORY:g} τ (second moment and edge of stability: at most "
        f"{ABRUPT_HORIZON:g} and {ABRUPT_REFRACTORY:g} steps), too late below {TOO_LATE:g} τ; "
        "τ = 1/(1 − β2) optimizer steps. Slingshots are found in the recorded loss by truth.py, without the "
        "monitor's own detector.",
        "Packages: " + "; ".join(_packages()) + ".",
    ]
    parts = [_part(book, alone=len(books) == 1) for book in books]
    return "\n".join(lines) + "\n\n" + "\n".join(parts)


def _part(book: Book, *, alone: bool) -> str:
    results = book.results
    stale = sum(info.get("readings_by") != readings_key() for info in book.infos)
    recorded = total(result for _, result in results.values())
    quiet = total(_of(results, (None,)))
    calm = f" ({quiet.steps:,} of them in quiet families)" if quiet.runs else ""
    lines = [] if alone else [f"# {book.suite.capitalize()} half", ""]
    lines.append(
        f"{len(results)} families, {recorded.runs} runs, {recorded.steps:,} optimizer steps{calm}; "
        f"{recorded.seconds:,.0f} s of training on one core in all."
    )
    if about := held_out(book.suite) if book.suite in AFTER else ABOUT.get(book.suite):
        lines += ["", about]
    if book.missing:
        lines += ["", f"Not recorded, or not all seeds: {', '.join(book.missing)}."]
    if stale:
        lines += ["", f"{stale} runs were recorded by another version of the measuring code (--refresh "
                  "renews them)."]  # fmt: skip
    return "\n".join(lines) + "\n\n" + "\n".join(sheet.markdown() for sheet in sheets(book))


def _packages() -> list[str]:
    there = [f"{name} {version}" for name, version in peers_installed.installed().items()]
    return there + [f"{name}: {reason}" for name, reason in peers_installed.missing().items()]


def show(books: Sequence[Book], console: Console) -> None:
    for book in books:
        if len(books) > 1:
            console.rule(f"{book.suite} half")
        for sheet in sheets(book):
            console.print(sheet.rich())
            console.print()
