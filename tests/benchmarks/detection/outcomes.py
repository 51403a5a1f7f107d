"""What the experiments found: averted shares, replays, float64 twins, sampled cadence.

``python -m tests.benchmarks.detection.experiments`` writes them to ``experiments.json`` in the cache; here
they are read and laid out.  What is not there was not tried, and the page says so.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.detection.evaluate import Named
from tests.benchmarks.detection.families import EDGE, EXTERNAL, FAMILIES, NUMERIC, SECOND_MOMENT
from tests.benchmarks.detection.sheet import NOTHING, Sheet, rate, share

FILE = "experiments.json"
Record = Mapping[str, Any]
UNKNOWN = "unknown"
MECHANISMS = (NUMERIC, SECOND_MOMENT, EDGE, EXTERNAL)
"""What a slingshot can come from; "unknown" is no answer and counted apart."""


@dataclass(frozen=True)
class Experiments:
    events: Sequence[Record] = ()  # one per slingshot that was gone back to
    at_risk: Sequence[Record] = ()  # *at risk* states that no slingshot followed
    cadence: Sequence[Record] = ()  # one per run and rule, sampled beside every step
    differs: Sequence[Record] = ()  # runs that did not come out as recorded when made again
    made: Mapping[str, Any] = field(default_factory=dict)  # date, versions

    @classmethod
    def load(cls, directory: Path) -> Experiments | None:
        """None where they have not been run. Raises ValueError for a file that is no JSON."""
        path = directory / FILE
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: found.pop(name, ()) for name in ("events", "at_risk", "cadence", "differs")}
        return cls(**lists, made=found)

    # --- averted -------------------------------------------------------------------------------

    def averted(self, mechanism: str | None, remedy: str) -> dict[str, tuple[int, int]]:
        """Family → (slingshots averted, tried) with a remedy switched on at *imminent*.

        ``mechanism``: of slingshots that a replay says come from it; where no replay tells, those of
        families that are registered as such.  (The first spikes of vision transformers are not numeric.)
        """
        found: dict[str, tuple[int, int]] = {}
        for event in self._imminent(mechanism):
            if remedy in event["remedies"]:
                hits, tried = found.get(event["family"], (0, 0))
                found[event["family"]] = hits + bool(event["remedies"][remedy]), tried + 1
        return found

    def remedies(self, mechanism: str | None) -> list[str]:
        return list(dict.fromkeys(name for event in self._imminent(mechanism) for name in event["remedies"]))

    def advised(self, mechanism: str | None) -> str | None:
        """The remedy nearest to what *imminent* advises, among those tried; None where none was.

        Before numeric slingshots: exchange the loss, here for float64's.
        """
        tried = self.remedies(mechanism)
        wanted = (lambda name: "float64" in name and "lr" not in name, lambda name: "float64" in name)
        return next((name for fits in wanted for name in tried if fits(name)), tried[0] if tried else None)

    def _imminent(self, mechanism: str | None) -> Iterator[Record]:
        verdicts = self.verdicts()
        for event in self.events:
            family = FAMILIES.get(event["family"])
            cause = verdicts.get((event["family"], event["seed"], event["slingshot_step"]), UNKNOWN)
            if cause == UNKNOWN and family is not None:
                cause = family.mechanism or UNKNOWN
            wanted = mechanism is None or cause == mechanism
            if wanted and event.get("alarm") == "imminent" and event.get("remedies"):
                yield event

    # --- replays and twins ---------------------------------------------------------------------

    def verdicts(self) -> dict[tuple[str, int, int], str]:
        """(family, seed, start) → mechanism, of replays whose baseline reproduced the run bit for bit."""
        return {
            (event["family"], event["seed"], event["slingshot_step"]): event["replay"]["mechanism"]
            for event in self.events
            if event.get("replay") and event["replay"].get("reproduced") is not False
        }

    def unreproduced(self) -> int:
        return len(
            {
                (event["family"], event["seed"], event["slingshot_step"])
                for event in self.events
                if event.get("replay") and event["replay"].get("reproduced") is False
            }
        )

    def twins(self) -> dict[str, tuple[int, int]]:
        """Family → (*at risk* states whose float64 twin grows less, states with a twin)."""
        found: dict[str, tuple[int, int]] = {}
        for record in (*self.events, *self.at_risk):
            if record.get("twin"):
                confirmed, of = found.get(record["family"], (0, 0))
                found[record["family"]] = confirmed + bool(record["twin"]["confirmed"]), of + 1
        return found

    # --- cadence -------------------------------------------------------------------------------

    def cadences(self) -> dict[str, Cadence]:
        """Rule → what reading at a sampled cadence costs, over all runs tried."""
        found: dict[str, Cadence] = {}
        for record in self.cadence:
            found[record["rule"]] = found.get(record["rule"], Cadence()) + Cadence(
                _pair(record["recall_every"]),
                _pair(record["recall_auto"]),
                tuple(record["leads_every"]),
                tuple(record["leads_auto"]),
                _pair(record.get("false_every", ())),
                _pair(record.get("false_auto", ())),
                tuple([record["read_share"]] if "read_share" in record else ()),
            )
        return found


def _pair(numbers: Sequence[int]) -> tuple[int, int]:
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 else (0, 0)


@dataclass(frozen=True)
class Cadence:
    every: tuple[int, int] = (0, 0)  # warned of, slingshots
    auto: tuple[int, int] = (0, 0)
    leads_every: tuple[float, ...] = ()  # τ
    leads_auto: tuple[float, ...] = ()
    false_every: tuple[int, int] = (0, 0)  # false alarms, steps at which one could be false
    false_auto: tuple[int, int] = (0, 0)
    read: tuple[float, ...] = ()  # share of the steps that were read, per run

    def __add__(self, other: Cadence) -> Cadence:
        return Cadence(
            (self.every[0] + other.every[0], self.every[1] + other.every[1]),
            (self.auto[0] + other.auto[0], self.auto[1] + other.auto[1]),
            self.leads_every + other.leads_every,
            self.leads_auto + other.leads_auto,
            (self.false_every[0] + other.false_every[0], self.false_every[1] + other.false_every[1]),
            (self.false_auto[0] + other.false_auto[0], self.false_auto[1] + other.false_auto[1]),
            self.read + other.read,
        )

    @property
    def recall_lost(self) -> float:
        """In points; NaN where nothing was tried."""
        if not (self.every[1] and self.auto[1]):
            return math.nan
        return 100.0 * (self.every[0] / self.every[1] - self.auto[0] / self.auto[1])

    @property
    def lead_lost(self) -> float:
        """Of the median, in τ; NaN where nothing was warned of."""
        if not (self.leads_every and self.leads_auto):
            return math.nan
        return statistics.median(self.leads_every) - statistics.median(self.leads_auto)


# --- mechanisms ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """What the monitor named, held against one kind of truth."""

    table: Mapping[str, Counter[str]]  # truth → what was named

    @property
    def right(self) -> int:
        return sum(self.table[truth][truth] for truth in MECHANISMS if truth in self.table)

    @property
    def judged(self) -> int:
        """Truth known, and something named: "unknown" is no answer on either side."""
        return sum(
            counter.total() - counter[UNKNOWN] for truth, counter in self.table.items() if truth in MECHANISMS
        )

    @property
    def unknown(self) -> int:
        """Truth known, none named."""
        return sum(counter[UNKNOWN] for truth, counter in self.table.items() if truth in MECHANISMS)


def agreement(named: Iterable[Named], truths: Mapping[tuple[str, int, int], str] | None = None) -> Agreement:
    """By replays' verdicts, slingshots without one left out; without ``truths`` by what is registered."""
    table: dict[str, Counter[str]] = {}
    for item in named:
        if truths is None:
            family = FAMILIES.get(item.family)
            truth = family.mechanism if family is not None and family.mechanism else "none expected"
        else:
            truth = truths.get(item[:3], "")
        if truth:
            table.setdefault(truth, Counter())[item.mechanism] += 1
    return Agreement(table)


# --- sheets ----------------------------------------------------------------------------------------


def mechanism_sheet(title: str, note: str, found: Agreement) -> Sheet:
    seen = dict.fromkeys(name for counter in found.table.values() for name in counter)
    names = list(dict.fromkeys([*MECHANISMS, UNKNOWN, "none", *seen]))
    rows = []
    for truth, counter in found.table.items():
        judged = counter.total() - counter[UNKNOWN]
        told = share(counter[truth], judged) if truth in MECHANISMS else NOTHING
        rows.append([truth, *(str(counter[name]) for name in names), told])
    return Sheet(title, note, ["truth", *names, "agreement"], rows)


def sheets(found: Experiments | None) -> list[Sheet]:
    """Averted shares, twins and cadence; one sheet that says so where nothing was run."""
    if found is None:
        return [
            Sheet(
                "Experiments",
                f"Not run: no {FILE} in the cache (python -m tests.benchmarks.detection.experiments).",
                [],
                [],
            )
        ]
    return [*_averted(found), _twins(found), _cadence(found)]


def _averted(found: Experiments) -> Iterator[Sheet]:
    remedies = found.remedies(None)
    advised = found.advised(NUMERIC)
    rows = []
    for label, mechanism in (("all numeric", NUMERIC), ("all second moment", SECOND_MOMENT),
                             ("all edge of stability", EDGE)):  # fmt: skip
        cells = [_pooled(found.averted(mechanism, remedy)) for remedy in remedies]
        if any(cell != NOTHING for cell in cells):
            rows.append([label, *cells])
    by_family = {remedy: found.averted(None, remedy) for remedy in remedies}
    for family in dict.fromkeys(event["family"] for event in found.events):
        cells = [share(*by_family[remedy].get(family, (0, 0))) for remedy in remedies]
        if any(cell != NOTHING for cell in cells):
            rows.append([family, *cells])
    yield Sheet(
        "Averted share",
        "The run is repeated from its imminent alarm with a remedy switched on there: how many slingshots do "
        "not happen. One that was not warned of counts as not averted. The first rows go by the mechanism "
        "that replay found, where it found one, and by the registered one elsewhere."
        + (f" Advised first before numeric slingshots: {advised}." if advised else " None was tried.")
        + " Before the others alerts advise a tenth of the learning rate for good, which "
        "tests/benchmarks/remedies/RESULTS.md tries; what stands here is shorter.",
        ["family", *remedies],
        rows,
    )


def _twins(found: Experiments) -> Sheet:
    by_family = found.twins()
    rows = [["all", _pooled(by_family)]] if by_family else []
    rows += [[family, share(*pair)] for family, pair in by_family.items()]
    return Sheet(
        "At risk, held against its float64 twin",
        "From the at risk alarm the run goes on as it was and with its loss in float64: confirmed where the "
        "feature mean or the weight norm grows less in the twin, up to the slingshot (40 τ at most) or, "
        "where none comes, for 10 τ." + ("" if rows else " None was tried."),
        ["family", "confirmed"],
        rows,
    )


def _cadence(found: Experiments) -> Sheet:
    rows = [
        [rule, share(*item.every), share(*item.auto), _number(item.recall_lost), _number(item.lead_lost),
         rate(*item.false_every), rate(*item.false_auto),
         f"{statistics.median(item.read):.0%}" if item.read else NOTHING]
        for rule, item in found.cadences().items()
    ]  # fmt: skip
    differs = (
        f" {len(found.differs)} runs did not come out as recorded and are left out." if found.differs else ""
    )
    return Sheet(
        'Sampled cadence, every="auto"',
        f"{len({(record['family'], record['seed']) for record in found.cadence})} runs made once more with "
        "the cadence that users have by default, beside the same runs read at every step; the last column is "
        f"the median share of steps whose head and optimizer were read.{differs}",
        ["rule", "warned, every step", "warned, sampled", "recall lost, points", "median lead lost, τ",
         "false /10k, every step", "false /10k, sampled", "steps read"],
        rows,
    )  # fmt: skip


def _pooled(by_family: Mapping[str, tuple[int, int]]) -> str:
    return share(*pool(by_family))


def pool(by_family: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    return sum(hit for hit, _ in by_family.values()), sum(tried for _, tried in by_family.values())


def _number(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.1f}"
