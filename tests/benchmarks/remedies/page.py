"""Trials in, RESULTS.md out; and the verdicts back out of it, for the test that holds the advice to them."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from nfi_monitor.types import Thresholds
from tests.benchmarks.detection.families import NUMERIC
from tests.benchmarks.detection.sheet import NOTHING, Sheet, share
from tests.benchmarks.remedies.losscost import BASE, NOTHING_COMPUTED
from tests.benchmarks.remedies.matrix import MECHANISMS, PILOTS, REMEDIES, Case
from tests.benchmarks.remedies.trials import PLAIN, REPLAYS, WHENS, Record

START = "from the start"
AVERTS, HELPS, USELESS, WORSE = "averts", "helps", "useless", "worse"
"""At least 95% of the slingshots do not happen; at least half; fewer; a fifth more happen than without."""
ENOUGH, HALF, MORE = 0.95, 0.5, 1.2
DEAR = 0.02
"""Share of held-out rows: a larger loss of accuracy is a price worth a word."""
VERDICTS = "Verdicts"


class Found:
    """Every record, by family and seed."""

    def __init__(self) -> None:
        self.cases: dict[str, Case] = {}
        self._records: dict[str, dict[int, dict[str, Record]]] = {}
        self.steps: dict[str, Record] = {}
        self.losses: dict[str, dict[str, Record]] = {}

    def add(self, case: Case, seed: int, records: dict[str, Record]) -> None:
        self.cases[case.family.name] = case
        self._records.setdefault(case.family.name, {}).setdefault(seed, {}).update(records)

    def of(self, mechanism: str) -> list[str]:
        return [name for name, case in self.cases.items() if case.mechanism == mechanism]

    def pairs(self, family: str, key: str) -> list[tuple[Record, Record]]:
        """(the run as it was, with the remedy) for each seed that has both."""
        plain = f"live/{PLAIN}"
        runs = [self._records[family][seed] for seed in sorted(self._records[family])]
        return [(run[plain], run[key]) for run in runs if plain in run and key in run]

    def records(self, family: str, key: str) -> list[Record]:
        return [run[key] for _, run in sorted(self._records[family].items()) if key in run]

    def counts(self, families: Sequence[str], key: str) -> tuple[int, int]:
        """Slingshots of the runs as they were, and of the same seeds with the remedy."""
        pairs = [pair for family in families for pair in self.pairs(family, key)]
        return sum(len(a["slingshots"]) for a, _ in pairs), sum(len(b["slingshots"]) for _, b in pairs)

    def averted(self, families: Sequence[str], remedy: str, when: str) -> tuple[int, int, int]:
        """Slingshots that did not happen, of those warned of; and how many more were not warned of."""
        events = [
            event
            for family in families
            for record in self.records(family, f"alarms/{remedy}")
            for event in record["events"]
        ]
        warned = [event for event in events if when in event["leads"]]
        averted = sum(event["spiked_at"][when] is None for event in warned)
        return averted, len(warned), len(events) - len(warned)

    def accuracy(self, families: Sequence[str], key: str) -> tuple[float, float] | None:
        pairs = [pair for family in families for pair in self.pairs(family, key)]
        if not pairs:
            return None
        return (
            statistics.fmean(a["accuracy"] for a, _ in pairs),
            statistics.fmean(b["accuracy"] for _, b in pairs),
        )


# --- verdicts ----------------------------------------------------------------------------------------


def verdict_of_counts(without: int, with_it: int) -> str:
    if without == 0:
        return ""
    if with_it > MORE * without:
        return WORSE
    return verdict_of_share(without - with_it, without)


def verdict_of_share(averted: int, of: int) -> str:
    if of == 0:
        return ""
    return AVERTS if averted >= ENOUGH * of else HELPS if averted >= HALF * of else USELESS


def _verdicts(found: Found) -> Sheet:
    rows = []
    for mechanism in MECHANISMS:
        families = found.of(mechanism)
        for remedy in REMEDIES:
            cells = [_start_cell(found, families, remedy)]
            for when in WHENS:
                averted, of, unwarned = found.averted(families, remedy, when)
                word = verdict_of_share(averted, of)
                rest = f", {unwarned} not warned of" if unwarned else ""
                cells.append(f"{word}: {averted} of {of}{rest}" if word else NOTHING)
            if any(cell != NOTHING for cell in cells):
                rows.append([f"`{remedy}`", mechanism, *cells])
    return Sheet(
        VERDICTS,
        "From the start: slingshots of the runs without it → with it, same seeds. At an alarm: the run is "
        "repeated from there with the remedy switched on, and so many slingshots, of the first one or two of "
        "each run, did not come until 10 τ after they had come without it; those that were not warned of are "
        "left out. *At risk* is that of severity warning where rows absorb. "
        f"{AVERTS}: at least {ENOUGH:.0%}; {HELPS}: at least {HALF:.0%}; {WORSE}: more than {MORE:g} times "
        f"as many. Price: held-out accuracy falls by more than {DEAR:.0%} of the rows. What keeps the loss "
        "of the rows trained on above where a slingshot could be seen averts nothing: useless.",
        ["remedy", "mechanism", START, *WHENS],
        rows,
    )


def _start_cell(found: Found, families: Sequence[str], remedy: str) -> str:
    without, with_it = found.counts(families, f"start/{remedy}")
    word = verdict_of_counts(without, with_it)
    if not word:
        return NOTHING
    pairs = [pair for family in families for pair in found.pairs(family, f"start/{remedy}")]
    own, left = (
        statistics.median(math.inf if run["loss"] is None else run["loss"] for run in runs)
        for runs in zip(*pairs, strict=True)
    )
    if left > max(Thresholds().spike_high, own):
        return f"{USELESS}: does not fit the rows (train loss {left:.2g})"
    accuracy = found.accuracy(families, f"start/{remedy}")
    price = ""
    if accuracy is not None and accuracy[1] < accuracy[0] - DEAR:
        price = f", at a price: accuracy {accuracy[0]:.1%} → {accuracy[1]:.1%}"
    return f"{word}: {without} → {with_it}{price}"


def read_verdicts(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """(remedy, mechanism) → {"from the start" or a moment: verdict} of a page; what was not tried is absent.

    Raises ValueError for a text without the table.
    """
    _, _, after = text.partition(f"## {VERDICTS}\n")
    lines = [line for line in after.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    if not lines:
        raise ValueError(f"No table of verdicts: run python -m tests.benchmarks.remedies ({text[:60]!r} …).")
    header, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    found = {}
    for remedy, mechanism, *cells in rows:
        words = {
            when: match.group()
            for when, cell in zip(header[2:], cells, strict=True)
            if (match := re.match(f"{AVERTS}|{HELPS}|{USELESS}|{WORSE}", cell))
        }
        found[remedy.strip("`"), mechanism] = words
    return {key: words for key, words in found.items() if not set(key[0]) <= {"-"}}


# --- the other tables ----------------------------------------------------------------------------------


def _targets(found: Found) -> Sheet:
    rows = []
    families = found.of(NUMERIC)
    without, with_it = found.counts(families, "start/zero_sum_cross_entropy")
    if without:
        rows.append([
            "zero_sum_cross_entropy from the start averts", "100%",
            share(max(without - with_it, 0), without), "yes" if with_it == 0 else "**no**",
        ])  # fmt: skip
    for pilot in PILOTS:
        key = f"live/{pilot}"
        without, with_it = found.counts(families, key)
        accuracy = found.accuracy(families, key)
        if without and accuracy is not None:
            averted = max(without - with_it, 0)
            rows.append([
                f"{pilot}, live, averts", "≥ 95%", share(averted, without),
                "yes" if averted >= ENOUGH * without else "**no**",
            ])  # fmt: skip
            rows.append([
                "… at the same held-out accuracy or better", f"≥ {accuracy[0]:.2%}", f"{accuracy[1]:.2%}",
                "yes" if accuracy[1] >= accuracy[0] else "**no**",
            ])  # fmt: skip
    return Sheet(
        "Targets, numeric families",
        "Live: the whole run under a monitor with its defaults and the Autopilot as its on_alert; slingshots "
        "against the same seeds without it. [95% Wilson]",
        ["target", "wanted", "found", "reached"],
        rows,
    )


def _outcomes(found: Found) -> Iterator[Sheet]:
    for family, case in found.cases.items():
        keys = [
            f"live/{PLAIN}",
            *(f"start/{name}" for name in REMEDIES),
            *(f"live/{name}" for name in PILOTS),
        ]
        rows = []
        for key in keys:
            records = found.records(family, key)
            if not records:
                continue
            name = key.partition("/")[2]
            rows.append([
                name if name == PLAIN else f"`{name}`",
                ", ".join(str(len(record["slingshots"])) for record in records),
                _mean([record["loss"] for record in records], ".2e"),
                _mean([record["accuracy"] for record in records], ".1%"),
                _mean([record["weight_norm"] for record in records], ".1f"),
                _did(records),
            ])  # fmt: skip
        yield Sheet(
            f"{family} ({case.mechanism}), from the start",
            f"{case.family.steps:,} steps; slingshots of each seed; means over the seeds of the loss on the "
            "rows trained on (in float64), the accuracy on held-out rows and the weights' norm, at the end.",
            ["remedy", "slingshots", "train loss", "accuracy", "weight norm", "done by the Autopilot"],
            rows,
        )


def _did(records: Sequence[Record]) -> str:
    did = Counter(action.partition(": ")[2] for record in records for action in record.get("actions", ()))
    return ", ".join(f"{what} {count}" for what, count in did.items()) or NOTHING


def _leads(found: Found) -> Sheet:
    rows = []
    for family in found.cases:
        one = {  # every remedy was tried on the same ones
            (seed, event["start"], tuple(event["leads"].items()))
            for name in REMEDIES
            for seed, record in enumerate(found.records(family, f"alarms/{name}"))
            for event in record["events"]
        }
        cells = []
        for when in WHENS:
            leads = [dict(items)[when] for _, _, items in one if when in dict(items)]
            cells.append(f"{statistics.median(leads):.2f} ({len(leads)})" if leads else NOTHING)
        named = Counter(
            name for record in found.records(family, f"live/{PLAIN}") for name in record["mechanisms"]
        )
        replayed = Counter(
            name for record in found.records(family, f"alarms/{REPLAYS}") for name in record["mechanisms"]
        )
        rows.append([family, found.cases[family].mechanism, _tally(named), _tally(replayed), *cells])
    return Sheet(
        "Families",
        "What the slingshots are counted as here, what their alerts named, what replays of those gone back "
        "to found; and the median lead in τ of each moment (of so many).",
        ["family", "mechanism", "named", "replayed", *WHENS],
        rows,
    )


def _tally(counter: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.items()) or NOTHING


def _step_times(found: Found) -> Sheet:
    rows = [
        [f"`{name}`", item["family"], f"{item['ratio']:.2f} ({item['low']:.2f}–{item['high']:.2f})"]
        for name, item in found.steps.items()
    ]
    return Sheet(
        "Cost of a step",
        "Remedied over plain, paired and interleaved steps of one process on one thread: the geometric mean "
        "of the medians of both orders (and these: plain first or last). These networks are so small that "
        "each operation counts. Where the loss is another one, the plain run's is exchanged for itself, in "
        "the same way." + _taken(found.steps.values()),
        ["remedy", "family", "ratio"],
        rows,
    )


def _loss_costs(found: Found) -> Sheet:
    rows = []
    for shape, losses in found.losses.items():
        base = losses[BASE]
        for name, item in losses.items():
            low, middle, high = item["ratio"]
            rows.append([
                shape, f"`{name}`", f"{item['microseconds']:,.0f}", f"{middle:.2f} ({low:.2f}–{high:.2f})",
                f"{item['peak_bytes'] / 2**20:.3g}", f"{item['peak_bytes'] / base['peak_bytes']:.2f}",
            ])  # fmt: skip
    return Sheet(
        "Cost of the loss",
        "Forward and backward, float32 logits, one CPU thread: median time of interleaved passes, the median "
        "of the ratios of paired ones (their quartiles), and the most memory held at once. Targets beside "
        f"{BASE}: at 50,257 classes at most 0.8 of the time and 1.0 of the memory, at 10 classes at most 1.1 "
        f"of the time. `{NOTHING_COMPUTED}`, which is handed its value and gradient, is what any loss "
        "written in Python costs: it leaves the arithmetic of a few rows little room (what was tried: "
        "../LOG.md)." + _taken([item for losses in found.losses.values() for item in losses.values()]),
        ["rows × classes", "loss", "µs", "ratio", "peak MiB", "ratio"],
        rows,
    )


def _taken(records: Iterable[Record]) -> str:
    days = sorted({record["taken"] for record in records})
    return f" Taken {' and '.join(days)}." if days else ""


def render(found: Found, made: Mapping[str, str]) -> str:
    """The page, as Markdown."""
    head = (
        "# Remedies\n\n`python -m tests.benchmarks.remedies`: every remedy of `nfi_monitor.remedies` against "
        "slingshots of each mechanism, on families of the detection benchmark, paired by seed. "
        + "; ".join(f"{name} {value}" for name, value in made.items())
        + ".\n"
    )
    sheets = [_verdicts(found), _targets(found), _leads(found), *_outcomes(found), _step_times(found),
              _loss_costs(found)]  # fmt: skip
    return "\n".join([head, *(sheet.markdown() for sheet in sheets)])


def with_costs(text: str, found: Found) -> str:
    """The page ``text`` with the costs of ``found``, and the trials as they were."""
    for sheet in (_step_times(found), _loss_costs(found)):
        pattern = rf"^## {re.escape(sheet.title)}\n.*?(?=^## |\Z)"
        parts = re.split(pattern, text, flags=re.M | re.S)
        if len(parts) != 2:
            raise ValueError(f"No section {sheet.title!r}: run python -m tests.benchmarks.remedies.")
        text = (sheet.markdown() + "\n").join(parts)
    return text.rstrip("\n") + "\n"


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "not finite"
    odd = f" ({len(values) - len(known)} not finite)" if len(known) < len(values) else ""
    return format(statistics.fmean(known), form) + odd
