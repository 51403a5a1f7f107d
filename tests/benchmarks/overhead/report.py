"""The record of what was timed, and the page made of it."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tests.benchmarks.detection.sheet import NOTHING, Sheet
from tests.benchmarks.overhead import costs
from tests.benchmarks.overhead.cases import CASES
from tests.benchmarks.overhead.timing import Result, Spread
from tests.benchmarks.overhead.trainings import (
    NULL,
    OTHERS,
    OURS,
    AllRows,
    Default,
    EveryStep,
    Everything,
    Jsonl,
    version,
)


@dataclass
class Costs:
    """What :mod:`tests.benchmarks.overhead.costs` found."""

    bandwidth: float
    readings: list[costs.Reading]
    sizes: list[costs.Reading]
    vocabularies: list[costs.Reading]
    peaks: list[costs.Peak]
    imports: dict[str, float]

    @classmethod
    def measured(cls, names: list[str], console: Console) -> Costs:
        with console.status("memory bandwidth, readings, memory, imports"):
            speed = costs.bandwidth()
            return cls(
                bandwidth=speed,
                readings=costs.readings({name: CASES[name] for name in names}, speed),
                sizes=costs.readings(costs.by_size(), speed),
                vocabularies=costs.readings(costs.by_vocabulary(), speed),
                peaks=costs.peaks(names),
                imports={
                    "nfi_monitor": costs.import_seconds("import nfi_monitor"),
                    "the TensorBoard plugin, above tensorboard's own": costs.import_seconds(
                        PLUGIN, TENSORBOARD
                    ),
                },
            )


TENSORBOARD = "import tensorboard.plugin_util, tensorboard.plugins.base_plugin"
PLUGIN = f"{TENSORBOARD}; import nfi_monitor.integrations.tensorboard.plugin"


@dataclass
class Record:
    environment: dict[str, str] = field(default_factory=dict)
    results: list[tuple[str, Result]] = field(default_factory=list)
    """(device, result)"""
    costs: Costs | None = None

    def has(self, case: str, threads: int, device: str, arm: str) -> bool:
        return any(
            (where, result.case, result.threads, result.arm) == (device, case, threads, arm)
            for where, result in self.results
        )

    def add(self, result: Result, device: str) -> None:
        key = (device, result.case, result.threads, result.arm)
        self.results = [
            (where, known)
            for where, known in self.results
            if (where, known.case, known.threads, known.arm) != key
        ]
        self.results.append((device, result))
        self.environment = {
            "date": datetime.now(UTC).date().isoformat(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cores": str(os.cpu_count()),
            "vectors": torch.backends.cpu.get_cpu_capability(),
            **{arm.package: version(arm.package) or "not installed" for arm in OTHERS},
        }


def save(record: Record, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Record:
    if not path.exists():
        return Record()
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    results = [
        (where, Result(**{**result, "wall": Spread(**result["wall"]), "cpu": Spread(**result["cpu"])}))
        for where, result in found["results"]
    ]
    told = found["costs"]
    known = None
    if told is not None:
        known = Costs(
            bandwidth=told["bandwidth"],
            readings=[costs.Reading(**item) for item in told["readings"]],
            sizes=[costs.Reading(**item) for item in told["sizes"]],
            vocabularies=[costs.Reading(**item) for item in told["vocabularies"]],
            peaks=[costs.Peak(**item) for item in told["peaks"]],
            imports=told["imports"],
        )
    return Record(found["environment"], results, known)


# --- the page ---------------------------------------------------------------------------------------------

_ORDER = [NULL, *(arm.name for arm in (*OURS, *OTHERS))]


def _spread(spread: Spread) -> str:
    return f"{spread.median:.3f} ({spread.low:.3f}–{spread.high:.3f})"


def _place(device: str, threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else device


def _place_on_page(item: tuple[str, Result]) -> tuple[str, int, int, int]:
    where, result = item
    case = list(CASES).index(result.case) if result.case in CASES else len(CASES)
    return where, result.threads, case, _ORDER.index(result.arm) if result.arm in _ORDER else len(_ORDER)


def _times(record: Record, device: str, threads: int, case: str) -> Sheet | None:
    found = [
        result
        for where, result in record.results
        if (where, result.threads, result.case) == (device, threads, case) and result.arm in _ORDER
    ]
    if not found:
        return None
    found.sort(key=lambda result: _ORDER.index(result.arm))
    rows = [
        [
            result.arm,
            _spread(result.wall),
            _spread(result.cpu),
            NOTHING if result.read is None else f"{result.read:.1%}",
            NOTHING if result.own is None else f"{result.own:.2%}",
        ]
        for result in found
    ]
    what = CASES[case].what
    title = f"{case}, {_place(device, threads)}"
    note = (
        f"{what}; {found[0].parameters:,} parameters; a bare step takes {found[0].bare_ms:.3g} ms; "
        f"{found[0].rounds} rounds of {min(r.block for r in found)}–{max(r.block for r in found)} steps."
    )
    stride = costs.stride(CASES[case])
    if stride > 1:
        note += f" A reading holds one row in {stride}, but where all rows are asked for."
    return Sheet(title, note, ("arm", "wall", "CPU", "steps read", "own clock"), rows)


def _verdict(measured: Spread, own: float | None, limit: float, null: Spread | None) -> str:
    """Reached by the paired ratio, by the monitor's own clock where noise hides what is asked, or missed."""
    if own is not None and own > limit:
        return "missed"  # whatever a noisy ratio says: the clock counts only what is the monitor's
    if measured.median <= 1.0 + limit:
        return "reached"
    # Only a bare copy that seems slower excuses one that seems slower.
    noise = 0.0 if null is None else max(null.high - 1.0, 0.0)
    if own is not None and own <= limit and measured.low - 1.0 <= max(noise, limit):
        return "reached by its own clock; the ratio cannot be told from a bare copy's"
    return "missed"


def _targets(record: Record) -> Sheet:
    rows = []
    for where, result in sorted(record.results, key=_place_on_page):
        case = CASES.get(result.case)
        limits = {} if case is None else {Default.name: case.default, EveryStep.name: case.every_step}
        asked = limits.get(EveryStep.name)
        limits |= {Everything.name: asked, AllRows.name: asked}
        limit = limits.get(result.arm)
        if limit is None:
            continue
        null = next(
            (
                other.wall
                for place, other in record.results
                if (place, other.case, other.threads, other.arm) == (where, result.case, result.threads, NULL)
            ),
            None,
        )
        rows.append(
            [
                f"{result.case}, {result.arm}, {_place(where, result.threads)}",
                f"≤ {1 + limit:.3f}",
                _spread(result.wall),
                NOTHING if result.own is None else f"{result.own:.2%}",
                _verdict(result.wall, result.own, limit, null),
            ]
        )
    rows += _run_directory(record)
    told = record.costs
    if told is not None:
        worst = max(told.peaks, key=lambda peak: peak.over)
        rows.append(
            [
                f"extra peak memory ({worst.case}, the worst)",
                "≤ 64 KiB + 1%",
                f"{1024 * (worst.watched - worst.bare):,.0f} KiB",
                NOTHING,
                "reached" if worst.over <= 0.0 else "missed",
            ]
        )
        largest = max(told.sizes, key=lambda item: item.milliseconds)
        growth = largest.milliseconds / told.sizes[0].milliseconds
        rows.append(
            [
                f"a reading up to 50M parameters (the dearest: {largest.case}), over one at 1M",
                "≤ 1.3",
                f"{growth:.2f}",
                NOTHING,
                "reached" if growth <= 1.3 else "missed",
            ]
        )
        slope, straight = _slope(told.vocabularies)
        once = slope * 1e-3 / (_BYTES_A_CLASS / told.bandwidth)
        rows.append(
            [
                "a reading for each further class, 1k to 128k, over reading that class's weights once",
                "linear, ≤ 2",
                f"{once:.1f}, R² {straight:.3f}",
                NOTHING,
                "reached" if once <= 2 and straight > 0.95 else "missed",
            ]
        )
        for what, limit in zip(told.imports, (0.030, 0.100), strict=True):
            seconds = told.imports[what]
            rows.append(
                [
                    f"import of {what}",
                    f"≤ {1e3 * limit:.0f} ms",
                    f"{1e3 * seconds:.0f} ms",
                    NOTHING,
                    "reached" if seconds <= limit else "missed",
                ]
            )
    return Sheet(
        "Targets",
        "Wall time over a bare step's: median over rounds (quartiles). Own clock: the monitor's seconds over "
        "the training's.",
        ("what", "target", "measured", "own clock", ""),
        rows,
    )


def _run_directory(record: Record) -> list[list[str]]:
    """Return what a run directory adds to the shortest step, by the monitor's own clock."""
    lines = []
    for where, result in sorted(record.results, key=_place_on_page):
        if result.case != SHORTEST or result.arm != Default.name or result.own is None:
            continue
        for other, found in record.results:
            place = (other, found.case, found.threads, found.arm)
            if place == (where, SHORTEST, result.threads, Jsonl.name) and found.own is not None:
                added = found.own - result.own
                what = f"a run directory beside the default, {SHORTEST}, {_place(where, result.threads)}"
                lines.append(
                    [what, "≤ 2%", NOTHING, f"{added:.2%}", "reached" if added <= 0.02 else "missed"]
                )
    return lines


SHORTEST = "mlp-26k"
"""The case whose steps are the shortest."""

HELD = [
    [
        "host synchronisations of a healthy step on an accelerator",
        "0",
        "`tests/test_hot_path.py`: what would wait is looked for on a CPU; CUDA's own check needs one",
    ],
    ["a second tensor of the logits' size", "none", "`tests/test_hot_path.py`"],
    ["graph breaks under torch.compile, weight-gradient level", "0", "`tests/test_monitor.py`"],
    ["graph breaks under torch.compile, rows tapped inside / outside", "1 / 0", "`tests/test_monitor.py`"],
    ["host memory after 1,000,000 steps", "≤ 64 MiB, flat", "`tests/safety/test_long_run.py` (slow)"],
]
_BYTES_A_CLASS = 4 * 32
"""Of the head's weights in :func:`costs.by_vocabulary`; the rows' budget bounds their part."""


def _slope(items: list[costs.Reading]) -> tuple[float, float]:
    """Milliseconds a class by least squares, and R²."""
    classes, times = ([float(getattr(item, name)) for item in items] for name in ("classes", "milliseconds"))
    slope, _ = statistics.linear_regression(classes, times)
    return slope, statistics.correlation(classes, times) ** 2


def _costs(told: Costs) -> list[Sheet]:
    header = ("", "parameters", "classes", "a reading", "the least it could be", "ratio")

    def lines(items: list[costs.Reading]) -> list[list[str]]:
        return [
            [
                item.case,
                f"{item.parameters:,}",
                f"{item.classes:,}",
                f"{item.milliseconds:.2f} ms",
                f"{item.floor:.3f} ms",
                f"{item.milliseconds / item.floor:.0f}",
            ]
            for item in items
        ]

    floor = (
        "The least: the bytes of sampled logits, their gradient, features and optimizer coordinates, read "
        f"once at {told.bandwidth / 1e9:.1f} GB/s (measured, one thread). What is above it are small kernels "
        "and Python."
    )
    slope = 1e3 * _slope(told.vocabularies)[0]
    peaks = [
        [peak.case, f"{peak.bare:.1f} MiB", f"{peak.watched:.1f} MiB", f"{peak.extra:.2%}"]
        for peak in told.peaks
    ]
    return [
        Sheet("A reading beside the physical floor", floor, header, lines(told.readings)),
        Sheet("A reading against the size of the model", "", header, lines(told.sizes)),
        Sheet(
            "A reading against the vocabulary",
            f"512 rows; {slope:.3f} ms for each further 1,000 classes.",
            header,
            lines(told.vocabularies),
        ),
        Sheet(
            "Peak memory of tensors in a step",
            "Every allocation counted by torch's profiler; the watched step is read in full.",
            ("", "bare", "watched", "more"),
            peaks,
        ),
    ]


def sheets(record: Record) -> list[Sheet]:
    places = sorted({(where, result.threads) for where, result in record.results})
    times = [
        sheet
        for where, threads in places
        for case in CASES
        if (sheet := _times(record, where, threads, case)) is not None
    ]
    held = Sheet(
        "Targets that tests hold", "No times: they hold, or a test fails.", ("what", "target", "test"), HELD
    )
    return [_targets(record), held, *times, *([] if record.costs is None else _costs(record.costs))]


def show(record: Record, console: Console) -> None:
    for sheet in sheets(record):
        console.print(sheet.rich())


def _load(record: Record) -> str:
    """Return the range of the machine's load while it was timed; 1 is this process alone."""
    loads = [result.load for _, result in record.results if result.load is not None]
    return f", load {min(loads):.1f}–{max(loads):.1f}" if loads else ""


def page(record: Record) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in record.environment.items())
    head = (
        "# What the monitor costs\n\n"
        "Written by `python -m tests.benchmarks.overhead`; how it is measured stands in\n"
        "`tests/benchmarks/overhead/__init__.py`. `bare, again` is a second bare copy: what it is off 1 is\n"
        "noise. `default` is a run that has settled, as from step 4,096 on: before, more steps are read, at\n"
        "τ = 1000 all of the first 8, then pairs 32 steps apart.\n"
        "AdamW with torch's default β2 = .999 (τ = 1000).\n\n"
        f"{facts}{_load(record)}\n\n"
    )
    absent = [name for name, case in CASES.items() if not case.runs_on("cpu")]
    if absent and not any(result.case in absent for _, result in record.results):
        head += f"Not timed, for want of an accelerator: {', '.join(absent)}.\n\n"
    return head + "\n".join(sheet.markdown() for sheet in sheets(record))
