"""A table before anybody decided how it looks, and how shares, leads and rates are written in its cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from tests.benchmarks.detection.score import Score, wilson

NOTHING = "–"
"""A cell for which there was nothing to count."""


@dataclass(frozen=True)
class Sheet:
    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", self.note, ""] if self.note else [f"## {self.title}", ""]
        if self.rows:
            lines += [_line(self.header), _line(["---"] * len(self.header)), *map(_line, self.rows)]
        return "\n".join(lines) + "\n"

    def rich(self) -> Table:
        table = Table(title=self.title, caption=self.note, title_justify="left", caption_justify="left")
        for index, name in enumerate(self.header if self.rows else ()):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
        for row in self.rows:
            table.add_row(*row)
        return table


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# --- cells -----------------------------------------------------------------------------------------


def share(successes: int, trials: int) -> str:
    if trials == 0:
        return NOTHING
    low, high = wilson(successes, trials)
    return f"{successes}/{trials} [{low:.2f}, {high:.2f}]"


def count(score: Score) -> str:
    """Warned of (in time) of all."""
    return f"{score.warned} ({score.in_time}) of {score.slingshots}" if score.slingshots else NOTHING


def alarms(score: Score) -> str:
    return f"{score.false_alarms}/{score.near_alarms}/{score.censored}"


def leads(score: Score, *, steps: bool = False) -> str:
    if not score.leads:
        return NOTHING
    tau = f"{score.lead(0.5, in_tau=True):.1f} ({score.lead(0.1, in_tau=True):.1f})"
    if not steps:
        return tau
    return f"{score.lead(0.5, in_tau=False):.0f} ({score.lead(0.1, in_tau=False):.0f}) steps, {tau} τ"


def rate(false_alarms: int, exposure: int) -> str:
    """False alarms per 10k steps."""
    if exposure == 0:
        return NOTHING
    low, high = wilson(min(false_alarms, exposure), exposure)
    return f"{1e4 * false_alarms / exposure:.2f} [{1e4 * low:.2f}, {1e4 * high:.2f}]"


def portion(part: int, whole: int) -> str:
    """A share of the steps."""
    return f"{part / whole:.1%}" if whole else NOTHING


def sounded(score: Score) -> str:
    if not score.false_alarms:
        return "0"
    part = score.sounding / score.exposure if score.exposure else math.nan
    return f"{score.false_alarms} ({part:.0%})"
