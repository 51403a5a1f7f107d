"""The targets, each with what was measured: computed from the scores, so that no row can flatter."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from tests.benchmarks.detection.evaluate import AT_RISK, IMMINENT, Result, total
from tests.benchmarks.detection.families import EDGE, NUMERIC, SECOND_MOMENT, Family
from tests.benchmarks.detection.outcomes import Experiments, agreement, pool
from tests.benchmarks.detection.score import FORECAST_AT, TOO_LATE, Forecasts, Score, wilson
from tests.benchmarks.detection.sheet import NOTHING, Sheet, leads, rate, share

Results = Mapping[str, tuple[Family, Result]]
"""Family name → the family and the sum over its runs."""

RECALL, AT_RISK_RECALL, OTHER_RECALL = 0.98, 0.99, 0.95
FALSE_ALARMS = 0.1  # per 10k quiet steps
LEAD, AT_RISK_LEAD = 3.0, 10.0  # τ, median
AVERTED, AGREEMENT, WITHIN = 0.95, 0.95, 0.85
WON = 0.75  # of the second-moment and edge-of-stability families
RECALL_LOST, LEAD_LOST = 2.0, 0.5  # points, τ
FORECAST_FROM = 3  # τ: where a number is held to it


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


def _lead(what: str, wanted: float, score: Score, quantile: float) -> Target:
    """A quantile of the leads in τ; its interval is by ranks, which needs no shape of the distribution."""
    n = f" (n = {len(score.leads)}{_ranks(sorted(tau for _, tau in score.leads), quantile)})"
    return _number(what, wanted, score.lead(quantile, in_tau=True), " τ", operator.ge, n)


def _ranks(values: list[float], quantile: float) -> str:
    """95% interval of a quantile: Wilson's of the share below it, read off at those ranks."""
    if not values:
        return ""
    low, high = wilson(round(quantile * len(values)), len(values))
    first = values[math.floor(low * (len(values) - 1))]
    last = values[math.ceil(high * (len(values) - 1))]
    return f", [{first:.2f}, {last:.2f}]"


# --- the best loss threshold -------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """*Imminent* against the best loss threshold of one family."""

    family: str
    ours: Score
    ours_quiet: Score
    level: float | None  # None: no threshold has our recall and lead
    theirs: Score = field(default_factory=Score)
    theirs_quiet: Score = field(default_factory=Score)

    @property
    def verdict(self) -> str:
        """Recall as wanted, at fewer false alarms than the threshold has at the same lead."""
        if self.ours.warned < OTHER_RECALL * self.ours.slingshots - 1e-9:
            return "no: recall"
        if self.level is None:
            return "yes: none is as early"
        ours, theirs = self.ours.false_alarms, self.theirs.false_alarms
        if ours != theirs:
            return "yes" if ours < theirs else "no: false alarms"
        # Neither gives a false alarm more here: what each says where nothing happens decides.
        if self.ours_quiet.false_alarms < self.theirs_quiet.false_alarms:
            return "yes: in the quiet families"
        return "no: as few"

    @property
    def won(self) -> bool:
        return self.verdict.startswith("yes")


def best_threshold(
    ours: Score, by_level: Mapping[float, Score], quiet: Mapping[float, Score] | None = None
) -> float | None:
    """The level with fewest false alarms among those that warn of as many and as early.

    As many: our recall, or OTHER_RECALL where that is less.  As early: our median lead in τ.  Of several,
    fewest false alarms in the quiet families, then the longest lead.  It is picked on the very runs that it
    is scored on: the strongest a loss threshold can be.  None where no level is as good.
    """
    lead = ours.lead(0.5, in_tau=True)
    needed = min(ours.warned, OTHER_RECALL * ours.slingshots) - 1e-9

    def as_good(score: Score) -> bool:
        return score.warned >= needed and (math.isnan(lead) or score.lead(0.5, in_tau=True) >= lead - 1e-9)

    def order(level: float) -> tuple[float, float, float]:
        longest = by_level[level].lead(0.5, in_tau=True)
        calm = (quiet or {}).get(level, Score())
        return by_level[level].false_alarms, calm.false_alarms, 0.0 if math.isnan(longest) else -longest

    able = [level for level, score in by_level.items() if as_good(score)]
    return min(able, key=order) if able else None


def contests(results: Results) -> list[Contest]:
    """One for each second-moment and edge-of-stability family that had a slingshot."""
    pooled: dict[str, Result] = {}
    for family, result in results.values():
        if family.mechanism in (SECOND_MOMENT, EDGE):
            pooled[family.name] = pooled.get(family.name, Result(runs=0)) + result
    calm = _quiet(results)
    ours_calm = calm.scores.get(IMMINENT, Score())
    found = []
    for name, result in pooled.items():
        ours = result.scores.get(IMMINENT, Score())
        if not ours.slingshots:
            continue
        level = best_threshold(ours, result.by_level, calm.by_level)
        if level is None:
            found.append(Contest(name, ours, ours_calm, None))
        else:
            theirs_calm = calm.by_level.get(level, Score())
            found.append(Contest(name, ours, ours_calm, level, result.by_level[level], theirs_calm))
    return found


def contest_sheet(results: Results) -> Sheet:
    rows = []
    for item in contests(results):
        peer = ["none reaches it", *[NOTHING] * 4]
        if item.level is not None:
            peer = [f"loss > {item.level:g}", *_judged(item.theirs, item.theirs_quiet)]
        rows.append([item.family, *_judged(item.ours, item.ours_quiet), *peer, item.verdict])
    judged = ["warned", "lead in τ", "false /10k", "false /10k quiet"]
    return Sheet(
        "Against the best loss threshold",
        "Per second-moment or edge-of-stability family that had slingshots: imminent, and among "
        f"the loss thresholds that warn of as many (or {OTHER_RECALL:g} of them) and as early (median) the "
        "one with fewest false alarms in the same runs, picked afterwards for each family. Won: recall "
        f"≥ {OTHER_RECALL:g} at fewer false alarms in the same runs, or as few there and fewer in the quiet "
        "families, or no threshold is as early.",
        ["family", *(f"imminent: {name}" for name in judged), "best threshold",
         *(f"its {name}" for name in judged), "won"],
        rows,
    )  # fmt: skip


def _judged(score: Score, quiet: Score) -> list[str]:
    return [
        share(score.warned, score.slingshots),
        leads(score),
        rate(score.false_alarms, score.exposure),
        rate(quiet.false_alarms, quiet.exposure),
    ]


# --- the table ---------------------------------------------------------------------------------------


def targets(results: Results, found: Experiments | None) -> list[Target]:
    return [
        *_numeric(results, found),
        *_others(results),
        _mechanism(results, found),
        *_forecast(results),
        _silence(results),
        *_cadence(found),
    ]


def sheet(results: Results, found: Experiments | None) -> Sheet:
    rows = targets(results, found)
    missed = sum(row.reached is False for row in rows)
    unknown = sum(row.reached is None for row in rows)
    return Sheet(
        "Targets",
        f"{len(rows) - missed - unknown} of {len(rows)} reached, {missed} missed, {unknown} not measured. "
        "The measured share or number decides; [95% Wilson] says how far it can be trusted.",
        ["", "target", "measured", "reached"],
        [row.cells for row in rows],
    )


def _numeric(results: Results, found: Experiments | None) -> Iterator[Target]:
    pooled = total(result for family, result in results.values() if family.mechanism == NUMERIC)
    soon, risk = (pooled.scores.get(name, Score()) for name in (IMMINENT, AT_RISK))
    calm = _quiet(results).scores.get(IMMINENT, Score())
    yield _at_least("numeric, imminent: recall", RECALL, soon.warned, soon.slingshots)
    per_10k = 1e4 * calm.false_alarms / calm.exposure if calm.exposure else math.nan
    yield _number(
        "numeric, imminent: false alarms per 10k quiet steps", FALSE_ALARMS, per_10k, "", operator.le,
        f": {calm.false_alarms} in {calm.exposure:,} steps, {rate(calm.false_alarms, calm.exposure)}",
    )  # fmt: skip
    yield _lead("numeric, imminent: lead, median", LEAD, soon, 0.5)
    yield _lead("numeric, imminent: lead, 10th percentile", TOO_LATE, soon, 0.1)
    yield _at_least("numeric, at risk: recall", AT_RISK_RECALL, risk.warned, risk.slingshots)
    yield _lead("numeric, at risk: lead, median", AT_RISK_LEAD, risk, 0.5)
    confirmed, twins = pool(found.twins()) if found else (0, 0)
    yield _at_least("numeric, at risk: confirmed by the float64 twin", 1.0, confirmed, twins)
    remedy = found.advised(NUMERIC) if found else None
    averted, tried = pool(found.averted(NUMERIC, remedy)) if found and remedy else (0, 0)
    yield _at_least(f"numeric: averted share{f' ({remedy})' if remedy else ''}", AVERTED, averted, tried)


def _others(results: Results) -> Iterator[Target]:
    held = contests(results)
    warned, slingshots = sum(item.ours.warned for item in held), sum(item.ours.slingshots for item in held)
    yield _at_least("second moment, edge of stability, imminent: recall", OTHER_RECALL, warned, slingshots)
    won = [item.family for item in held if item.won]
    yield _at_least(
        f"… families with recall ≥ {OTHER_RECALL:g} at fewer false alarms than the best loss threshold",
        WON, len(won), len(held), f" {', '.join(won)}" if won else "",
    )  # fmt: skip


def _mechanism(results: Results, found: Experiments | None) -> Target:
    """Held against replays; without any, what is registered stands in, and the row says so."""
    named = [item for _, result in results.values() for item in result.named]
    verdicts = found.verdicts() if found else {}
    held = agreement(named, verdicts or None)
    source = "replay" if verdicts else "what is registered; no replay"
    return _at_least(
        f"mechanism: agreement with {source}", AGREEMENT, held.right, held.judged,
        f", unknown {held.unknown}",
    )  # fmt: skip


def _forecast(results: Results) -> Iterator[Target]:
    numeric = total(result for family, result in results.values() if family.mechanism == NUMERIC)
    far = [distance for distance in FORECAST_AT if distance >= FORECAST_FROM]
    pooled = sum((numeric.forecasts.get(distance, Forecasts()) for distance in far), start=Forecasts())
    yield _at_least(
        f"forecast within 2×, {min(far)}–{max(far)} τ before", WITHIN, pooled.within(2.0), len(pooled.ratios),
        f", a number for {len(pooled.ratios)} of {pooled.slingshots}",
    )  # fmt: skip
    slingshots = numeric.scores.get(IMMINENT, Score()).slingshots
    spoken = numeric.numbers_too_late
    yield Target(
        "forecast inside the last τ: slingshots with a number", "0",
        f"{spoken} of {slingshots}" if slingshots else NOTHING, spoken == 0 if slingshots else None,
    )  # fmt: skip


def _silence(results: Results) -> Target:
    calm = _quiet(results)
    score = calm.scores.get(IMMINENT, Score())
    # Before a near miss too: a quiet family has nothing to be imminent.  Before a real one it is right.
    heard = score.false_alarms + score.near_alarms
    if not calm.runs:
        return Target("quiet suite: imminent alarms", "0", NOTHING, None)
    return Target("quiet suite: imminent alarms", "0", f"{heard} in {calm.steps:,} steps", heard == 0)


def _cadence(found: Experiments | None) -> Iterator[Target]:
    held = found.cadences().get(IMMINENT) if found else None
    lost = held.recall_lost if held else math.nan
    n = f" ({share(*held.auto)} sampled, {share(*held.every)} every step)" if held else ""
    yield _number("sampled cadence: recall lost", RECALL_LOST, lost, " points", operator.le, n)
    lost = held.lead_lost if held else math.nan
    yield _number("sampled cadence: median lead lost", LEAD_LOST, lost, " τ", operator.le)


def _quiet(results: Results) -> Result:
    return total(result for family, result in results.values() if family.quiet)
