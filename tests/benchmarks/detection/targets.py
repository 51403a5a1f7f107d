"""The targets, each with what was measured: computed from the scores, so that no row can flatter."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tests.benchmarks.detection.evaluate import AUTO, EVERY, IMMINENT, Result, at, total
from tests.benchmarks.detection.families import EDGE, NUMERIC, SECOND_MOMENT, Family
from tests.benchmarks.detection.score import TOO_LATE, Score, wilson
from tests.benchmarks.detection.sheet import NOTHING, Sheet, portion, rate, share
from tests.benchmarks.detection.told import Told

Results = Mapping[str, tuple[Family, Result]]
"""Family name → the family and the sum over its runs."""

RECALL, LEAD = 0.98, 3.0  # numeric; τ, median
OTHER_RECALL, OTHER_FALSE = 0.95, 0.5  # second moment, edge of stability; per 10,000 steps of the same runs
WARNING_RIGHT, IMMINENT_RIGHT = 0.8, 0.9
CALLED = 0.99
RECALL_LOST = 1.0  # points


@dataclass(frozen=True)
class Target:
    what: str
    wanted: str
    measured: str
    reached: bool | None  # None: nothing to judge

    @property
    def cells(self) -> list[str]:
        word = "not measured" if self.reached is None else "yes" if self.reached else "**no**"
        return [self.what, self.wanted, self.measured, word]


# --- shares, numbers --------------------------------------------------------------------------------


def _at_least(what: str, wanted: float, successes: int, trials: int, apart: str = "") -> Target:
    """A share that is to be at least so much; the interval is shown, the share itself decides."""
    reached = successes >= wanted * trials - 1e-9 if trials else None
    measured = f"{successes / trials:.3f}: {share(successes, trials)}{apart}" if trials else NOTHING
    return Target(what, f"≥ {wanted:g}", measured, reached)


def _number(
    what: str, wanted: float, value: float, unit: str, holds: Callable[[float, float], bool], n: str = ""
) -> Target:
    sign = "≥" if holds is operator.ge else "≤"
    if math.isnan(value):
        return Target(what, f"{sign} {wanted:g}{unit}", NOTHING, None)
    return Target(what, f"{sign} {wanted:g}{unit}", f"{value:.2f}{unit}{n}", holds(value, wanted))


def _lead(what: str, wanted: float, score: Score, quantile: float, under: str) -> Target:
    """A quantile of the leads in τ; its interval is by ranks, which needs no shape of the distribution."""
    interval = _ranks(sorted(tau for _, tau in score.leads), quantile)
    n = f" (n = {len(score.leads)}{interval}); {under} of the steps under this alarm"
    return _number(what, wanted, score.lead(quantile, in_tau=True), " τ", operator.ge, n)


def _ranks(values: list[float], quantile: float) -> str:
    """95% interval of a quantile: Wilson's of the share below it, read off at those ranks."""
    if not values:
        return ""
    low, high = wilson(round(quantile * len(values)), len(values))
    first = values[math.floor(low * (len(values) - 1))]
    last = values[math.ceil(high * (len(values) - 1))]
    return f", [{first:.2f}, {last:.2f}]"


# --- the table ---------------------------------------------------------------------------------------


def numeric(results: Results) -> Result:
    """Return the sum over the families whose slingshots come from rounding."""
    return total(result for family, result in results.values() if family.mechanism == NUMERIC)


def others(results: Results) -> Result:
    """Return the sum over the families of the second moment and of the edge of stability."""
    return total(result for family, result in results.values() if family.mechanism in (SECOND_MOMENT, EDGE))


def targets(results: Results) -> list[Target]:
    return [*_numeric(results), *_others(results), *_told(results), *_cadence(results)]


def sheet(results: Results) -> Sheet:
    rows = targets(results)
    missed = sum(row.reached is False for row in rows)
    unknown = sum(row.reached is None for row in rows)
    return Sheet(
        "Targets",
        f"{len(rows) - missed - unknown} of {len(rows)} reached, {missed} missed, {unknown} not measured. "
        'Every step is read, except where `every="auto"` stands. The measured share or number decides; '
        "[95% Wilson] says how far it can be trusted.",
        ["", "target", "measured", "reached"],
        [row.cells for row in rows],
    )


def _numeric(results: Results) -> Iterator[Target]:
    pooled = numeric(results)
    soon = pooled.scores.get(IMMINENT, Score())
    under = portion(pooled.under.get(IMMINENT, 0), pooled.steps)
    yield _at_least("numeric, imminent: recall", RECALL, soon.warned, soon.slingshots)
    yield _lead("numeric, imminent: lead, median", LEAD, soon, 0.5, under)
    yield _lead("numeric, imminent: lead, 10th percentile", TOO_LATE, soon, 0.1, under)


def _others(results: Results) -> Iterator[Target]:
    pooled = others(results)
    soon = pooled.scores.get(IMMINENT, Score())
    under = f"; {portion(pooled.under.get(IMMINENT, 0), pooled.steps)} of the steps under this alarm"
    yield _at_least(
        "second moment, edge of stability, imminent: recall", OTHER_RECALL, soon.warned, soon.slingshots,
        under,
    )  # fmt: skip
    per_10k = 1e4 * soon.false_alarms / soon.exposure if soon.exposure else math.nan
    yield _number(
        "second moment, edge of stability, imminent: false alarms per 10,000 steps of the same runs",
        OTHER_FALSE, per_10k, "", operator.le,
        f": {soon.false_alarms} in {soon.exposure:,} steps, {rate(soon.false_alarms, soon.exposure)}",
    )  # fmt: skip


def counted(results: Results, cadence: str = EVERY) -> Told:
    """Return the alerts of all families, counted one by one."""
    return sum((result.told.get(cadence, Told()) for _, result in results.values()), Told())


def _told(results: Results) -> Iterator[Target]:
    found = counted(results)
    yield _at_least(
        "P(slingshot within 40 τ | warning)", WARNING_RIGHT, found.warnings_right,
        found.warnings - found.warnings_cut, _cut(found.warnings_cut),
    )  # fmt: skip
    yield _at_least(
        "P(slingshot within 10 τ, at least 50 steps | imminent)", IMMINENT_RIGHT, found.imminent_right,
        found.imminent - found.imminent_cut, _cut(found.imminent_cut),
    )  # fmt: skip
    yield _at_least("slingshots called, of those in the truth", CALLED, found.called, found.slingshots)
    near = f", {found.near_calls} of them at a rise too small for a slingshot" if found.near_calls else ""
    yield Target(
        "slingshots called that are none", "0",
        f"{found.false_calls}{near}" if found.steps else NOTHING,
        found.false_calls == 0 if found.steps else None,
    )  # fmt: skip


def _cut(count: int) -> str:
    return f", {count} more cut off by the end of the run" if count else ""


def _cadence(results: Results) -> Iterator[Target]:
    """Of all slingshots that were warned of, those that sparse reading misses."""
    pooled = total(result for family, result in results.values() if not family.quiet)
    each, auto = (pooled.scores.get(at(IMMINENT, cadence), Score()) for cadence in (EVERY, AUTO))
    lost = 100.0 * (each.warned - auto.warned) / each.slingshots if each.slingshots else math.nan
    found = counted(results, AUTO)
    yield _number(
        '`every="auto"`, imminent: recall lost', RECALL_LOST, lost, " points", operator.le,
        f": {share(auto.warned, auto.slingshots)} for {share(each.warned, each.slingshots)}; "
        f"{portion(found.read, found.steps)} of the steps read",
    )  # fmt: skip
