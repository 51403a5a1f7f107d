"""Scores → tables: on the terminal through rich, in RESULTS.md as Markdown; no number typed by hand."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from nfi_monitor.types import Thresholds
from tests.benchmarks.detection import outcomes, peers_installed, targets
from tests.benchmarks.detection.evaluate import (
    AT_RISK,
    AT_RISK_WARNING,
    IMMINENT,
    MONITOR,
    RULES,
    Result,
    Scored,
    total,
)
from tests.benchmarks.detection.families import EDGE, EXTERNAL, NUMERIC, SECOND_MOMENT, Family
from tests.benchmarks.detection.fit import DEFAULT, GRID, Fit, leave_one_out
from tests.benchmarks.detection.generate import detector_key, readings_key, versions
from tests.benchmarks.detection.outcomes import Experiments
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
from tests.benchmarks.detection.sheet import Sheet, alarms, count, leads, rate, share, sounded
from tests.benchmarks.detection.targets import Results

RESULTS = Path(__file__).parent / "RESULTS.md"


@dataclass(frozen=True)
class Book:
    """All that the page is made of."""

    results: Results
    """Each family under the constants fitted without it."""
    default: Results
    """The same families under the default constants."""
    fit: Fit
    candidates: int = 1
    experiments: Experiments | None = None
    infos: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


def bind(
    families: Iterable[Family],
    scored: Sequence[Scored],
    candidates: Mapping[str, Thresholds],
    experiments: Experiments | None = None,
) -> Book:
    """Fit with each family left out, and lay its runs' scores under what was chosen."""
    by_family: dict[str, tuple[Family, dict[str, Result]]] = {}
    for family in families:
        runs = [run for run in scored if run.family == family.name]
        if runs:
            sums = {
                name: total(run.result(thresholds) for run in runs) for name, thresholds in candidates.items()
            }
            by_family[family.name] = (family, sums)
    fit = leave_one_out(by_family)

    def under(chosen: Callable[[str], str]) -> Results:
        return {name: (family, sums[chosen(name)]) for name, (family, sums) in by_family.items()}

    return Book(
        under(fit.of),
        under(lambda _: DEFAULT),
        fit,
        len(candidates),
        experiments,
        [run.info for run in scored],
    )


_GROUPS: dict[str, tuple[str | None, ...]] = {
    "numeric": (NUMERIC,),
    "second moment, edge of stability": (SECOND_MOMENT, EDGE),
    "from outside": (EXTERNAL,),
}


def sheets(book: Book) -> list[Sheet]:
    results = book.results
    return [
        targets.sheet(results, book.experiments),
        *_rules(book),
        targets.contest_sheet(results),
        _families(results),
        _quiet(results),
        *_mechanisms(book),
        _forecasts(results),
        *outcomes.sheets(book.experiments),
    ]


def _names(results: Results) -> list[str]:
    """The rules, and after them whatever package was installed when the runs were scored."""
    scored = (name for _, result in results.values() for name in result.scores)
    return list(dict.fromkeys([*RULES, *scored]))


def _peers(results: Results) -> list[str]:
    return [name for name in _names(results) if name not in MONITOR]


def _rules(book: Book) -> Iterable[Sheet]:
    """Monitor and peers side by side, pooled over the families of a kind."""
    for title, mechanisms in _GROUPS.items():
        names = [name for name, (family, _) in book.results.items() if family.mechanism in mechanisms]
        if not names:
            continue
        pooled = total(book.results[name][1] for name in names)
        calm = total(result for family, result in book.results.values() if family.quiet)
        rows = [_rule(name, pooled, calm) for name in _names(book.results)]
        # In one line, how much of it was having seen the family: the constants as they are shipped.
        shipped = total(book.default[name][1] for name in names)
        shipped_calm = total(result for family, result in book.default.values() if family.quiet)
        rows.append([f"{IMMINENT}, defaults", *_rule(IMMINENT, shipped, shipped_calm)[1:]])
        slingshots = pooled.scores.get(IMMINENT, Score()).slingshots
        yield Sheet(
            f"Slingshots, {title}",
            f"{slingshots} slingshots in {len(names)} families, {pooled.runs} runs, {pooled.steps:,} steps; "
            f"quiet families: {calm.steps:,} steps. Warned: an alarm began within {HORIZON:g} τ before, or "
            f"an older one still sounded (early). In time: at least {TOO_LATE:g} τ ahead. False alarms per "
            "10k steps in the same runs and in the quiet families. The first three rows left out the family "
            "they are scored on; the last has the default constants for all. [95% Wilson]",
            ["rule", "warned", "early", "in time", "lead in τ: median (10th pct)", "false /10k here",
             "false /10k quiet"],
            rows,
        )  # fmt: skip


def _rule(name: str, pooled: Result, quiet: Result) -> list[str]:
    score, calm = pooled.scores.get(name, Score()), quiet.scores.get(name, Score())
    return [
        name,
        share(score.warned, score.slingshots),
        str(score.early),
        share(score.in_time, score.slingshots),
        leads(score),
        rate(score.false_alarms, score.exposure),
        rate(calm.false_alarms, calm.exposure),
    ]


def _families(results: Results) -> Sheet:
    rows = []
    for family, result in results.values():
        if family.quiet:
            continue
        soon, risk = result.scores[IMMINENT], result.scores[AT_RISK_WARNING]
        best = max(
            (name for name in result.scores if name not in MONITOR),
            key=lambda name: (result.scores[name].in_time, -result.scores[name].false_alarms),
        )
        peer = result.scores[best]
        rows.append(
            [family.name, f"{result.runs} × {family.steps}", f"{soon.slingshots} + {soon.near_misses}",
             count(soon), leads(soon, steps=True), alarms(soon), count(risk), leads(risk),
             f"{best}: {count(peer)}, {alarms(peer)}"]
        )  # fmt: skip
    return Sheet(
        "Spiking families",
        "Warned of (in time) by *imminent* and by *at risk* of severity warning, with leads: median (10th "
        "percentile) in steps and τ; alarms: false, before a near miss, censored. Best peer: the one with "
        "most slingshots warned of in time.",
        ["family", "runs × steps", "slingshots + near misses", "imminent", "lead", "alarms f/n/c",
         "at risk", "lead in τ", "best peer: warned, alarms f/n/c"],
        rows,
    )  # fmt: skip


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


def _mechanisms(book: Book) -> Iterable[Sheet]:
    named = [item for _, result in book.results.values() for item in result.named]
    words = "Columns: what the slingshot's alert said. Unknown is no answer: the share is of the others."
    if book.experiments is not None:
        verdicts = book.experiments.verdicts()
        failed = book.experiments.unreproduced()
        yield outcomes.mechanism_sheet(
            "Mechanism named, against replay",
            f"Rows: the verdict of a replay from a snapshot before the slingshot ({len(verdicts)} replayed; "
            f"{failed} more whose baseline did not reproduce the run bit for bit are left out). What tells "
            f"kicks from swings was chosen on these slingshots. {words}",
            outcomes.agreement(named, verdicts),
        )
    yield outcomes.mechanism_sheet(
        "Mechanism named, against what is registered",
        f"Rows: what the family is registered as. {words}",
        outcomes.agreement(named),
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
             middle, share(found.within(2.0), len(said))]
        )  # fmt: skip
    return Sheet(
        "Forecast, numeric families",
        "At so many τ before a slingshot: how many had been warned of, how many with a number of steps, the "
        "median of said / true, and the share within a factor of 2. Inside the last τ no number should be "
        f"given: before {numeric.numbers_too_late} slingshots there was one.",
        ["before", "slingshots", "warned", "numbers", "said / true", "within 2×"],
        rows,
    )


# --- the page --------------------------------------------------------------------------------------


def page(book: Book, command: str) -> str:
    """RESULTS.md."""
    results = book.results
    stale = sum(info.get("readings_by") != readings_key() for info in book.infos)
    recorded = total(result for _, result in results.values())
    seeds = [len(family.seeds) for family, _ in results.values()]
    quiet = total(result for family, result in results.values() if family.quiet)
    lines = [
        "# What the warnings are worth",
        "",
        f"Written by `{command}` on {datetime.date.today().isoformat()}; do not edit.",
        "",
        "Versions: "
        + ", ".join(f"{name} {value}" for name, value in versions().items())
        + f"; detector code {detector_key()}.",
        f"{len(results)} families, {recorded.runs} runs, {recorded.steps:,} optimizer steps ({quiet.steps:,} "
        f"of them in quiet families), each one read; {recorded.seconds:,.0f} s of training on one core in "
        "all.",
        f"Seeds: 0 to n − 1, n = {min(seeds)} to {max(seeds)} a family (column *runs*).",
        f"Horizon {HORIZON:g} τ, refractory {REFRACTORY:g} τ (second moment and edge of stability: at most "
        f"{ABRUPT_HORIZON:g} and {ABRUPT_REFRACTORY:g} steps), too late below {TOO_LATE:g} τ; "
        "τ = 1/(1 − β2) optimizer steps.",
        "Packages: " + "; ".join(_packages()) + ".",
        "",
        _fitted(book.fit, book.candidates),
    ]
    if stale:
        lines.append(
            f"{stale} runs were recorded by another version of the measuring code (--refresh renews them)."
        )
    if book.experiments is not None:
        lines.append(_made(book.experiments.made))
    return "\n".join(lines) + "\n\n" + "\n".join(sheet.markdown() for sheet in sheets(book))


def _made(made: Mapping[str, Any]) -> str:
    """When the experiments were made, and whether by the code that is here."""
    from tests.benchmarks.detection.experiments.results import current_code

    code, told = made.get("code", {}), []
    for kind, current in current_code().items():
        date = made.get("dates", {}).get(kind) or made.get("date", "unknown date")
        told.append(f"{kind} of {date}" + ("" if code.get(kind) == current else ", by an earlier version"))
    return f"Experiments: {'; '.join(told)}."


def _packages() -> list[str]:
    there = [f"{name} {version}" for name, version in peers_installed.installed().items()]
    return there + [f"{name}: {reason}" for name, reason in peers_installed.missing().items()]


def _fitted(fit: Fit, candidates: int) -> str:
    """What the leaving out came to, in words."""
    default = Thresholds()
    constants = ", ".join(f"{name} {getattr(default, name):g}" for name in GRID)
    counts = ", ".join(f"{name}: {times}" for name, times in fit.counts.most_common())
    groups = len(fit.chosen)
    if groups < 2:
        return f"Fitted on nothing: there is one group of families. Constants: the defaults ({constants})."
    return (
        f"Leave one family out: every number of the monitor below is of constants chosen on the other "
        f"families, out of {candidates} candidates (the defaults {constants}, and each of these moved by "
        "itself; fit.py says by what objective). Families of one task, its twins and its variants are left "
        f"out together: {groups} groups. Chosen how often: {counts}. On all families together: "
        f"{fit.in_sample}. The other constants, and the default values around which the candidates lie, are "
        "the shipped ones; those of kicks, swings, swells and forecasts were chosen on these very runs."
    )


def show(book: Book, console: Console) -> None:
    for sheet in sheets(book):
        console.print(sheet.rich())
        console.print()
