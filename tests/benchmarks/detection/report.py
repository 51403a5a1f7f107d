"""Scores → tables: on the terminal through rich, in RESULTS.md as Markdown; no number typed by hand."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nfi_monitor.types import Thresholds
from tests.benchmarks.detection.evaluate import AT_RISK, AT_RISK_WARNING, IMMINENT, RULES, Result, total
from tests.benchmarks.detection.families import EDGE, EXTERNAL, NUMERIC, SECOND_MOMENT, Family
from tests.benchmarks.detection.generate import detector_key, readings_key, versions
from tests.benchmarks.detection.score import (
    FORECAST_AT,
    HORIZON,
    REFRACTORY,
    TOO_LATE,
    Forecasts,
    Score,
    wilson,
)  # fmt: skip

RESULTS = Path(__file__).parent / "RESULTS.md"


@dataclass(frozen=True)
class Sheet:
    """A table before anybody decided how it looks."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", self.note, ""] if self.note else [f"## {self.title}", ""]
        lines += [_line(self.header), _line(["---"] * len(self.header)), *map(_line, self.rows)]
        return "\n".join(lines) + "\n"

    def rich(self) -> Table:
        table = Table(title=self.title, caption=self.note, title_justify="left", caption_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
        for row in self.rows:
            table.add_row(*row)
        return table


Results = dict[str, tuple[Family, Result]]
"""Family name → the family and the sum over its runs."""

_GROUPS: dict[str, tuple[str | None, ...]] = {
    "numeric": (NUMERIC,),
    "second moment, edge of stability": (SECOND_MOMENT, EDGE),
    "from outside": (EXTERNAL,),
}


def sheets(results: Results) -> list[Sheet]:
    return [*_rules(results), _families(results), _quiet(results), _mechanisms(results), _forecasts(results)]


def _rules(results: Results) -> Iterable[Sheet]:
    """Monitor and peers side by side, pooled over the families of a kind."""
    quiet = total(result for family, result in results.values() if family.quiet)
    for title, mechanisms in _GROUPS.items():
        chosen = [result for family, result in results.values() if family.mechanism in mechanisms]
        if not chosen:
            continue
        pooled = total(chosen)
        rows = []
        for name in RULES:
            score, calm = pooled.scores[name], quiet.scores.get(name, Score())
            rows.append(
                [name, _share(score.warned, score.slingshots), str(score.early),
                 _share(score.in_time, score.slingshots), _leads(score), _rate(score), _rate(calm)]
            )  # fmt: skip
        slingshots = pooled.scores[IMMINENT].slingshots
        yield Sheet(
            f"Slingshots, {title}",
            f"{slingshots} slingshots in {len(chosen)} families, {pooled.runs} runs, {pooled.steps:,} steps; "
            f"quiet families: {quiet.steps:,} steps. Warned: an alarm began within {HORIZON:g} τ before, or "
            f"an older one still sounded (early). In time: at least {TOO_LATE:g} τ ahead. False alarms per "
            "10k steps in the same runs and in the quiet families. [95% Wilson]",
            ["rule", "warned", "early", "in time", "lead in τ: median (10th pct)", "false /10k here",
             "false /10k quiet"],
            rows,
        )  # fmt: skip


def _families(results: Results) -> Sheet:
    rows = []
    for family, result in results.values():
        if family.quiet:
            continue
        soon, risk = result.scores[IMMINENT], result.scores[AT_RISK_WARNING]
        best = max(
            (name for name in RULES if name not in (AT_RISK, AT_RISK_WARNING, IMMINENT)),
            key=lambda name: (result.scores[name].in_time, -result.scores[name].false_alarms),
        )
        peer = result.scores[best]
        rows.append(
            [family.name, f"{result.runs} × {family.steps}", f"{soon.slingshots} + {soon.near_misses}",
             _count(soon), _leads(soon, steps=True), _alarms(soon), _count(risk), _leads(risk),
             f"{best}: {_count(peer)}, {_alarms(peer)}"]
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
        cells = [_sounded(result.scores[name]) for name in (AT_RISK, AT_RISK_WARNING, IMMINENT)]
        peers = [name for name in RULES if name not in (AT_RISK, AT_RISK_WARNING, IMMINENT)]
        rows.append(
            [family.name, f"{result.runs} × {family.steps}",
             f"{soon.slingshots} + {soon.near_misses}", *cells,
             " ".join(str(result.scores[name].false_alarms) for name in peers)]
        )  # fmt: skip
    return Sheet(
        "Quiet families",
        "False alarms, and the share of steps under them. *At risk* is a state: where rows do absorb it is "
        "true, though nothing follows. Peers in the order of the first table.",
        ["family", "runs × steps", "slingshots + near misses", "at risk", "at risk, warning", "imminent",
         "peers"],
        rows,
    )  # fmt: skip


_EXPECTED = (NUMERIC, SECOND_MOMENT, EDGE, EXTERNAL)
_RIGHT = {EXTERNAL: "unknown"}
"""Where the right answer is another word than the registered one."""


def _mechanisms(results: Results) -> Sheet:
    by_truth: dict[str, Counter[str]] = {}
    for family, result in results.values():
        by_truth.setdefault(family.mechanism or "none expected", Counter()).update(result.named)
    names = [NUMERIC, SECOND_MOMENT, EDGE, "unknown", "none"]
    rows = [
        [
            truth,
            *(str(counter[name]) for name in names),
            _share(counter[_RIGHT.get(truth, truth)], counter.total()) if truth in _EXPECTED else "–",
        ]
        for truth, counter in by_truth.items()
        if counter
    ]
    return Sheet(
        "Mechanism named",
        "Rows: what the family is registered as (not yet a replay's verdict). Columns: what the slingshot's "
        "alert said. For a cause from outside, unknown is the right answer.",
        ["registered as", *names, "agreement"],
        rows,
    )


def _forecasts(results: Results) -> Sheet:
    numeric = total(result for family, result in results.values() if family.mechanism == NUMERIC)
    rows = []
    for distance in FORECAST_AT:
        found = numeric.forecasts.get(distance, Forecasts())
        said = sorted(found.ratios)
        middle = f"{said[len(said) // 2]:.2f}" if said else "–"
        rows.append(
            [f"{distance} τ", str(found.slingshots), _share(found.warned, found.slingshots), str(len(said)),
             middle, _share(found.within(2.0), len(said))]
        )  # fmt: skip
    return Sheet(
        "Forecast, numeric families",
        "At so many τ before a slingshot: how many had been warned of, how many with a number of steps, the "
        "median of said / true, and the share within a factor of 2.",
        ["before", "slingshots", "warned", "numbers", "said / true", "within 2×"],
        rows,
    )


# --- cells -----------------------------------------------------------------------------------------


def _share(successes: int, trials: int) -> str:
    if trials == 0:
        return "–"
    low, high = wilson(successes, trials)
    return f"{successes}/{trials} [{low:.2f}, {high:.2f}]"


def _count(score: Score) -> str:
    """Warned of (in time) of all."""
    return f"{score.warned} ({score.in_time}) of {score.slingshots}" if score.slingshots else "–"


def _alarms(score: Score) -> str:
    return f"{score.false_alarms}/{score.near_alarms}/{score.censored}"


def _leads(score: Score, *, steps: bool = False) -> str:
    if not score.leads:
        return "–"
    tau = f"{score.lead(0.5, in_tau=True):.1f} ({score.lead(0.1, in_tau=True):.1f})"
    if not steps:
        return tau
    return f"{score.lead(0.5, in_tau=False):.0f} ({score.lead(0.1, in_tau=False):.0f}) steps, {tau} τ"


def _rate(score: Score) -> str:
    if score.exposure == 0:
        return "–"
    low, high = wilson(min(score.false_alarms, score.exposure), score.exposure)
    return f"{1e4 * score.false_alarms / score.exposure:.2f} [{1e4 * low:.2f}, {1e4 * high:.2f}]"


def _sounded(score: Score) -> str:
    if not score.false_alarms:
        return "0"
    share = score.sounding / score.exposure if score.exposure else math.nan
    return f"{score.false_alarms} ({share:.0%})"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# --- the page --------------------------------------------------------------------------------------


def page(results: Results, command: str, infos: Iterable[dict[str, Any]]) -> str:
    """RESULTS.md."""
    made = versions()
    stale = sum(info.get("readings_by") != readings_key() for info in infos)
    recorded = total(result for _, result in results.values())
    seeds = {family.name: len(family.seeds) for family, _ in results.values()}
    changed = {
        name: value
        for name, value in Thresholds().to_json().items()
        if name in ("absorbing_enter", "inflating_growth", "imminent_growth", "imminent_displacement")
    }
    lines = [
        "# What the warnings are worth",
        "",
        f"Written by `{command}` on {datetime.date.today().isoformat()}; do not edit.",
        "",
        "Versions: "
        + ", ".join(f"{name} {value}" for name, value in made.items())
        + f"; detector code {detector_key()}.",
        f"{len(results)} families, {recorded.runs} runs, {recorded.steps:,} optimizer steps, each one read; "
        f"{recorded.seconds:,.0f} s of training on one core in all.",
        f"Seeds: 0 to n − 1, n = {min(seeds.values())} to {max(seeds.values())} a family (column *runs*).",
        f"Horizon {HORIZON:g} τ, refractory {REFRACTORY:g} τ, too late below {TOO_LATE:g} τ; "
        "τ = 1/(1 − β2) optimizer steps. "
        f"Thresholds: the defaults ({', '.join(f'{name} {value:g}' for name, value in changed.items())}).",
        "No constant was fitted on these runs by this command; several of the defaults were chosen on runs "
        "like them, so this is no left-out test.",
    ]
    if stale:
        lines.append(f"{stale} runs were recorded by an older version of the measuring code (--refresh).")
    return "\n".join(lines) + "\n\n" + "\n".join(sheet.markdown() for sheet in sheets(results))


def show(results: Results, console: Console) -> None:
    for sheet in sheets(results):
        console.print(sheet.rich())
        console.print()
