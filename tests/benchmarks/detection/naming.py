"""The mechanisms that alerts named, held against those that the families are registered as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tests.benchmarks.detection.evaluate import Named
from tests.benchmarks.detection.families import EDGE, EXTERNAL, NUMERIC, SECOND_MOMENT
from tests.benchmarks.detection.sheet import NOTHING, Sheet, share

UNKNOWN = "unknown"
MECHANISMS = (NUMERIC, SECOND_MOMENT, EDGE, EXTERNAL)
"""What a slingshot can come from; "unknown" is no answer and counted apart."""


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


def agreement(named: Iterable[Named], registered: Mapping[str, str | None]) -> Agreement:
    """Count what was named; ``registered``: family → the mechanism that its slingshots should have."""
    table: dict[str, Counter[str]] = {}
    for item in named:
        truth = registered.get(item.family) or "none expected"
        table.setdefault(truth, Counter())[item.mechanism] += 1
    return Agreement(table)


def mechanism_sheet(title: str, note: str, found: Agreement) -> Sheet:
    seen = dict.fromkeys(name for counter in found.table.values() for name in counter)
    names = list(dict.fromkeys([*MECHANISMS, UNKNOWN, "none", *seen]))
    rows = []
    for truth, counter in found.table.items():
        judged = counter.total() - counter[UNKNOWN]
        told = share(counter[truth], judged) if truth in MECHANISMS else NOTHING
        rows.append([truth, *(str(counter[name]) for name in names), told])
    return Sheet(title, note, ["truth", *names, "agreement"], rows)
