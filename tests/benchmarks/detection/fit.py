"""Leave one family out: each family is scored by constants that were chosen on all the others.

**What is fitted.** The constants that *imminent* begins and ends by (``GRID``), each moved by itself around
its default, everything else as it is: the default and one candidate per step of the grid.  Combinations are
not tried: on so few families their number would fit the noise.  *At risk* and the names of mechanisms have
constants of their own, which this objective says nothing about; they stay at their defaults.

**The objective** (``worth``), in the order that counts: fewest *imminent* alarms in quiet families; the share
of numeric slingshots that were warned of; the share warned of in time; the median lead, up to 5 τ; the share
of the other mechanisms' slingshots warned of, up to the target; fewest false alarms in their families.

**One standard error** (Breiman et al. 1984): a candidate is chosen where one of these numbers is better than
the default's by more than its standard error and none that counts more is worse.  Less is noise, and the
default was there first.  Taking any gain at all chose candidates for one more slingshot in three hundred and
paid for it in the family that was left out.

**What is left out together.** Families that share a training or a task differ in width, length, β2, precision
or a probe, and say so at the end of their names: ``group_of`` strips those words.  Twins and long variants
are therefore never fitted on when the family itself is scored.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nfi_monitor.types import Thresholds
from tests.benchmarks.detection.evaluate import IMMINENT, Result
from tests.benchmarks.detection.families import EDGE, NUMERIC, SECOND_MOMENT, Family
from tests.benchmarks.detection.score import Score

GRID: dict[str, tuple[float, ...]] = {
    "absorbing_enter": (0.5, 2.0),
    "imminent_displacement": (0.75, 2.0),
    "rms_t_imminent": (1.5,),
}
"""Field of Thresholds → factors on its default."""
DEFAULT = "default"
ENOUGH_LEAD = 5.0  # τ; more is worth nothing to the cure
ENOUGH_RECALL = 0.95  # of second-moment and edge-of-stability slingshots: the target
VARIATIONS = frozenset({
    "beta", "decay", "deep", "eps", "float64", "half", "inside", "long", "memorising", "norm", "probe",
    "projected", "quick", "shallow", "strong", "wide",
})  # fmt: skip
"""Last words of a family's name that vary a training, numbers besides."""


def candidates() -> dict[str, Thresholds]:
    """Name → thresholds, the default first; a step that the gaps of the hysteresis forbid is left out."""
    default = Thresholds()
    found = {DEFAULT: default}
    for name, factors in GRID.items():
        for factor in factors:
            value = factor * getattr(default, name)
            try:
                found[f"{name} {value:g}"] = replace(default, **{name: value})
            except ValueError:
                continue
    return found


def group_of(name: str) -> str:
    """The families that are left out together, by the name they share."""
    words = name.split("-")
    while len(words) > 1 and (words[-1] in VARIATIONS or words[-1].isdigit()):
        words.pop()
    return "-".join(words)


# --- the objective -----------------------------------------------------------------------------------

QUIET, OTHER = "quiet", "other"


def kind_of(family: Family) -> str | None:
    """Which part of the objective a family counts in; None: in no part (kicks from outside)."""
    if family.quiet:
        return QUIET
    if family.mechanism == NUMERIC:
        return NUMERIC
    return OTHER if family.mechanism in (SECOND_MOMENT, EDGE) else None


@dataclass(frozen=True)
class Worth:
    """Something to maximise, first entry first, and the standard error of each entry."""

    entries: tuple[float, ...]
    errors: tuple[float, ...]

    def beats(self, default: Worth) -> bool:
        for mine, its, error in zip(self.entries, default.entries, default.errors, strict=True):
            if mine < its or mine > its + error:
                return mine > its
        return False


def worth(imminent: Mapping[str, Score]) -> Worth:
    """What *imminent* came to on families of each kind."""
    quiet, numeric, other = (imminent.get(kind, Score()) for kind in (QUIET, NUMERIC, OTHER))
    leads = sorted(tau for _, tau in numeric.leads)
    alarms = quiet.false_alarms + quiet.near_alarms
    found = [
        (-float(alarms), _count_error(alarms)),
        _share(numeric.warned, numeric.slingshots),
        _share(numeric.in_time, numeric.slingshots),
        (min(numeric.lead(0.5, in_tau=True), ENOUGH_LEAD) if leads else 0.0, _median_error(leads)),
        _share(other.warned, other.slingshots, ENOUGH_RECALL),
        (-float(other.false_alarms), _count_error(other.false_alarms)),
    ]
    entries, errors = zip(*found, strict=True)
    return Worth(entries, errors)


def _count_error(count: int) -> float:
    """Of a count that is Poisson's; none seen still leaves one unseen."""
    return math.sqrt(max(count, 1))


def _share(successes: int, trials: int, enough: float = 1.0) -> tuple[float, float]:
    """With its error by the rule of succession, which is not 0 at a share of 0 or 1."""
    p = (successes + 1) / (trials + 2)
    return min(share(successes, trials), enough), math.sqrt(p * (1 - p) / (trials + 2))


def _median_error(values: list[float]) -> float:
    """Of the median: half of what lies between the ranks one standard error below and above it."""
    n = len(values)
    if n < 2:
        return math.inf
    reach = 0.5 / math.sqrt(n)
    low, high = (values[round((n - 1) * (0.5 + sign * reach))] for sign in (-1, 1))
    return 0.5 * (high - low)


def share(successes: int, trials: int) -> float:
    """0 without trials: a share nobody saw speaks for no candidate."""
    return successes / trials if trials else 0.0


# --- leaving out -------------------------------------------------------------------------------------

ByCandidate = Mapping[str, Result]


@dataclass(frozen=True)
class Fit:
    """Which candidate each group is scored by, and which one all families together would choose."""

    chosen: dict[str, str]  # group → candidate
    in_sample: str

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.chosen.values())

    def of(self, family: str) -> str:
        return self.chosen[group_of(family)]


def leave_one_out(results: Mapping[str, tuple[Family, ByCandidate]]) -> Fit:
    """Choose for each group by the families outside it; family name → (family, candidate → its score).

    With a single group there is nothing to fit on, and every candidate is worth the same: the default.
    """
    names = dict.fromkeys(name for _, by_candidate in results.values() for name in by_candidate)
    per_group: dict[str, dict[str, dict[str, Score]]] = {}  # group → candidate → kind → score
    for family, by_candidate in results.values():
        group = per_group.setdefault(group_of(family.name), {name: {} for name in names})
        kind = kind_of(family)
        if kind is None:
            continue
        for name, result in by_candidate.items():
            group[name][kind] = group[name].get(kind, Score()) + result.scores.get(IMMINENT, Score())
    chosen = {left_out: _best(per_group, names, without=left_out) for left_out in per_group}
    return Fit(chosen, _best(per_group, names))


def _best(
    per_group: Mapping[str, Mapping[str, Mapping[str, Score]]],
    names: Mapping[str, object],
    without: str | None = None,
) -> str:
    worths: dict[str, Worth] = {}
    for name in names:
        pooled: dict[str, Score] = {}
        for group, by_candidate in per_group.items():
            if group != without:
                for kind, score in by_candidate[name].items():
                    pooled[kind] = pooled.get(kind, Score()) + score
        worths[name] = worth(pooled)
    able = [name for name in worths if worths[name].beats(worths[DEFAULT])]
    return max(able, key=lambda name: worths[name].entries, default=DEFAULT)
