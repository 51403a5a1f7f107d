"""Turn results into verdicts: a number, its interval, and whether the claim holds here.

Every judgement has an interval: Wilson's for shares of runs, a bootstrap's for medians.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from examples.reference.results import NotTested, Result, Results

__all__ = [
    "Claim",
    "Estimate",
    "Judgement",
    "NotTested",
    "Verdict",
    "agrees_if",
    "announced",
    "compared",
    "count_of",
    "decided",
    "grouped_median",
    "median",
    "number",
    "quantiles",
    "quiet",
    "share",
    "spiking",
    "stays",
    "without",
]

_Z = 1.959963984540054  # 97.5% point of the normal


class Verdict(str, Enum):
    AGREES = "agrees"
    DISAGREES = "disagrees"
    NOT_TESTED = "not tested at this scale"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Estimate:
    """Hold a number with its 95% interval."""

    value: float
    low: float
    high: float
    n: int
    ours: str
    interval: str


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    ours: str
    interval: str = ""


@dataclass(frozen=True)
class Claim:
    """Hold a source's claim, and the function that judges our results by it."""

    text: str
    source: str
    judge: Callable[[Results], Judgement]

    def judged(self, results: Results) -> Judgement:
        try:
            return self.judge(results)
        except NotTested as missing:
            return Judgement(Verdict.NOT_TESTED, str(missing))


def agrees_if(condition: bool, estimate: Estimate, unit: str = "", note: str = "") -> Judgement:
    """Return the estimate in words and the condition's verdict; ``note`` follows in brackets."""
    ours = f"{estimate.ours} {unit}".strip() + (f" ({note})" if note else "")
    return Judgement(Verdict.AGREES if condition else Verdict.DISAGREES, ours, estimate.interval)


def decided(estimate: Estimate, expected: str, than: float, unit: str = "", note: str = "") -> Judgement:
    """Agree if the whole interval is "below" or "above" ``than``, as expected.

    Disagree if the whole interval is on the other side. Otherwise, and for fewer than five values, the runs
    are too few for a verdict.
    """
    ours = f"{estimate.ours} {unit}".strip() + (f" ({note})" if note else "")
    below, above = estimate.high < than, estimate.low > than
    if estimate.n < 5 or not (below or above):
        return Judgement(Verdict.NOT_TESTED, f"{ours}: too few to tell", estimate.interval)
    held = below if expected == "below" else above
    return Judgement(Verdict.AGREES if held else Verdict.DISAGREES, ours, estimate.interval)


def number(value: float) -> str:
    """Format a number with three significant digits."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-2 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def share(k: int, n: int) -> Estimate:
    """Return k of n with Wilson's score interval (Wilson 1927). Raises NotTested for n = 0."""
    if n == 0:
        raise NotTested("nothing to count")
    p = k / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    low, high = (0.0 if k == 0 else low), (1.0 if k == n else high)
    return Estimate(p, low, high, n, f"{k} of {n}", f"{low:.0%}–{high:.0%}")


def median(values: Sequence[float], unit: str = "") -> Estimate:
    """Return the median with the bootstrap's percentile interval (2,000 resamples, seed 0).

    Raises NotTested without values.
    """
    sample = np.asarray([value for value in values if value is not None and math.isfinite(value)], float)
    if not len(sample):
        raise NotTested("nothing was measured")
    draws = np.random.default_rng(0).choice(sample, (2_000, len(sample)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    value = float(np.median(sample))
    ours = f"median {number(value)}{unit} of {len(sample)}"
    return Estimate(
        value, float(low), float(high), len(sample), ours, f"{number(low)} to {number(high)}{unit}"
    )


def grouped_median(groups: Sequence[Sequence[float]], unit: str = "") -> Estimate:
    """Return the median of values nested in runs; the bootstrap draws whole runs.

    Of a single run the bootstrap draws the values: the interval then says nothing about other runs. Raises
    NotTested without values.
    """
    filled = [np.asarray(group, float) for group in groups if len(group)]
    if not filled:
        raise NotTested("nothing was measured")
    if len(filled) == 1:
        alone = median(filled[0].tolist(), unit)
        return replace(alone, ours=f"{alone.ours} in 1 run")
    generator = np.random.default_rng(0)
    drawn = [
        float(
            np.median(np.concatenate([filled[i] for i in generator.integers(len(filled), size=len(filled))]))
        )
        for _ in range(2_000)
    ]
    pooled = np.concatenate(filled)
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = float(np.median(pooled))
    ours = f"median {number(value)}{unit} of {len(pooled)} in {len(filled)} runs"
    return Estimate(
        value, float(low), float(high), len(pooled), ours, f"{number(low)} to {number(high)}{unit}"
    )


def quantiles(values: Sequence[float], unit: str = "") -> Estimate:
    """Return the median with the smallest and the largest value, for a few values that are not a sample."""
    sample = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not sample:
        raise NotTested("nothing was measured")
    value, low, high = float(np.median(sample)), min(sample), max(sample)
    ours = f"median {number(value)}{unit} of {len(sample)}"
    return Estimate(value, low, high, len(sample), ours, f"all in {number(low)} to {number(high)}{unit}")


# --- claims of every study ---------------------------------------------------------------------------


def spiking(arm: str) -> Callable[[Results], Judgement]:
    """Judge whether most runs of the arm slingshot, by Wu's rule."""

    def judge(results: Results) -> Judgement:
        runs = results[arm]
        hit = sum(bool(run.episodes) for run in runs)
        return agrees_if(2 * hit > len(runs), share(hit, len(runs)), "runs slingshot", count_of(runs))

    return judge


def quiet(arm: str) -> Callable[[Results], Judgement]:
    """Judge whether no run of the arm slingshots, by Wu's rule."""

    def judge(results: Results) -> Judgement:
        runs = results[arm]
        clean = sum(not run.episodes for run in runs)
        estimate = share(clean, len(runs))
        return agrees_if(clean == len(runs), estimate, "runs without a slingshot", count_of(runs))

    return judge


def compared(arm: str, than: str, more: bool) -> Callable[[Results], Judgement]:
    """Judge whether an arm slingshots more (or less) often than another in as many steps of the same seeds.

    The slingshots are the monitor's, which count no aftershock again. Given their sum, the counts of two
    equally long Poisson processes are binomial. So the interval is Wilson's for the arm's share; a share of
    one half is no difference.
    """

    def judge(results: Results) -> Judgement:
        pairs = results.pairs(arm, than)
        length = {run.seed: min(run.steps, base.steps) for run, base in pairs}
        ours, theirs = (
            sum(s["start"] <= length[run.seed] for run in runs for s in run.slingshots)
            for runs in zip(*pairs, strict=True)
        )
        note = f"{ours} slingshots against {theirs} in {sum(length.values()):,} steps each"
        estimate = share(ours, ours + theirs)
        estimate = replace(estimate, ours=f"{number(estimate.value)} of all")
        return decided(estimate, "above" if more else "below", 0.5, note=note)

    return judge


def shared(results: Results, arm: str, than: str) -> list[tuple[int, int]]:
    """Count (slingshots of the arm, of its pair) in as many steps, on the seeds whose pair has any.

    Raises NotTested if there is no such seed.
    """
    counts = []
    for run, base in results.pairs(arm, than):
        length = min(run.steps, base.steps)
        counts.append(tuple(sum(first <= length for first, _, _ in r.episodes) for r in (run, base)))
    found = [(ours, theirs) for ours, theirs in counts if theirs]
    if not found:
        raise NotTested(f"no run of {than} slingshots in as many steps")
    return found


def without(arm: str, than: str) -> Callable[[Results], Judgement]:
    """Judge whether no run of the arm slingshots on the seeds where its pair does, by Wu's rule."""

    def judge(results: Results) -> Judgement:
        counts = shared(results, arm, than)
        clean = sum(not ours for ours, _ in counts)
        return agrees_if(
            clean == len(counts), share(clean, len(counts)), "runs without a slingshot", _against(counts)
        )

    return judge


def stays(arm: str, than: str) -> Callable[[Results], Judgement]:
    """Judge whether the arm slingshots on every seed where its pair does, by Wu's rule."""

    def judge(results: Results) -> Judgement:
        counts = shared(results, arm, than)
        hit = sum(bool(ours) for ours, _ in counts)
        return agrees_if(
            hit == len(counts), share(hit, len(counts)), "runs slingshot all the same", _against(counts)
        )

    return judge


def _against(counts: Sequence[tuple[int, int]]) -> str:
    ours, theirs = (sum(column) for column in zip(*counts, strict=True))
    return f"{ours} slingshots against {theirs}"


def announced(*arms: str) -> Callable[[Results], Judgement]:
    """Judge whether an alert began before every slingshot of these arms."""

    def judge(results: Results) -> Judgement:
        runs = [run for arm in arms for run in results[arm]]
        every = [s for run in runs for s in run.slingshots]
        warned = [s for run in runs for s in run.announced]
        if not every:
            raise NotTested("no slingshot to announce")
        leads = [max(s["at_risk_lead"] or 0, s["imminent_lead"] or 0) for s in warned]
        note = f"median lead {number(float(np.median(leads)))} steps" if leads else ""
        return agrees_if(
            len(warned) == len(every), share(len(warned), len(every)), "slingshots announced", note
        )

    return judge


def count_of(runs: Sequence[Result]) -> str:
    return f"{_episodes(runs)} slingshots in {sum(run.steps for run in runs):,} steps"


def _episodes(runs: Sequence[Result]) -> int:
    return sum(len(run.episodes) for run in runs)
