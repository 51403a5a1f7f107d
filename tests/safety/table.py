"""docs/safety.md: what is shown of the monitor's safety, by which command, and how often it was tried.

    python -m tests.safety.table            # run what was not counted with today's code, and write the page
    python -m tests.safety.table --print    # only print the page of what is counted
    python -m tests.safety.table --only safety/test_faults.py ...   # run these files alone

All files together take hours.  Each file is a part: what it counted is kept in ``counts.json`` with its
commit, so that a command that was stopped goes on with the next file.  The page names the commit of each row.

A test adds its count to a row with the ``shown`` fixture, after it has passed.  In an ordinary test run the
fixture holds what it is given against the page: a page that claims more than was counted fails.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "safety.md"
COUNTS = Path(__file__).with_name("counts.json")
PROPERTY = "nfi_safety"


class Row(NamedTuple):
    shown: str
    tests: tuple[str, ...]
    """Files under tests/ that show it."""


ROWS = {
    "no interference": Row(
        "weights, optimizer state and random state are bitwise those of the training without a monitor: "
        "{float32, bf16 autocast, fp16 and GradScaler} × {plain, accumulation, checkpointing reentrant or "
        "not, compile, tied head} × {AdamW default, foreach, fused, Adam amsgrad, SGD, Adafactor, Muon}",
        ("safety/test_matrix.py", "test_bitwise.py"),
    ),
    "faults": Row(
        "any function that runs inside a training may raise: the training's result is unchanged (under an "
        "Autopilot that acts: the training goes on), no rank waits forever, one note reports the fault, and "
        "parts that do not need the broken one go on. Functions are broken one at a time. In one process: "
        "all of the plain loop, and the other functions that run with tapped logits, a slingshot, a "
        "GradScaler, a quiet run, 8-bit moments, one output, late numbers, a copy, the Autopilot, "
        "Transformers, Lightning, Accelerate. On two ranks: all of DDP, and the other functions that run "
        "under FSDP2, with the head sharded along its classes, with a monitor that is closed early",
        ("safety/test_faults.py",),
    ),
    "storage": Row(
        "disk full, directory removed or read-only, `kill -9` at random moments: all complete records are "
        "read back, at most one is lost, none is wrong; a second process, or a second open monitor, in the "
        "same directory is refused; foreign files of every kind (FIFO, socket, device, link, directory) "
        "under any of our names: nothing hangs, nothing outside is written",
        ("safety/test_storage.py", "safety/test_foreign_files.py"),
    ),
    "numbers": Row(
        "random modules, K from 1 to 50,000, all dtypes, NaN, Inf, denormals, huge logits, empty and ragged "
        "batches, ignored rows: no error is raised, every reading stays within its documented range, and a "
        "reading is NaN only where that is documented (`nfi_monitor/quantities/`)",
        ("safety/test_numbers.py",),
    ),
    "long runs": Row(
        "memory stays flat, a step does not get slower, the run directory stays within its budget (old "
        "readings are thinned, alerts never)",
        ("safety/test_long_run.py",),
    ),
    "copies": Row(
        "deepcopy, pickle, `torch.save`, AveragedModel, DataParallel replicas, forked and spawned workers: "
        "nothing is counted twice, nothing breaks",
        ("safety/test_copies.py",),
    ),
    "detach": Row(
        "after `close()` no hook, no reference, no open file and no global state is left",
        ("safety/test_detach.py",),
    ),
    "interrupts": Row(
        "Ctrl-C at any line of the monitor, while it attaches, in a step, in `close()`: it is raised, the "
        "training can go on and has equal bits, a second `close()` finishes the first and leaves no hook and "
        "no lock, and a new monitor attaches",
        ("safety/test_interrupts.py",),
    ),
    "odd passes": Row(
        "a pass of meta or fake tensors, of `torch.func` (ensembles, derivatives), `torch.export`, "
        "`torch.fx`, `make_fx`, TorchScript, under autocast, in another dtype or shape, with nested tensors, "
        "a counter of FLOPs or a compiled graph: it costs at most one reading and changes no bit",
        ("safety/test_odd_passes.py",),
    ),
    "records": Row(
        "damaged and hostile records: every kind of damage costs the record and is counted; `report`, "
        "`tail`, the figure and the tab show the rest, as strict JSON where they answer with JSON. A damaged "
        "state is refused with a ValueError, and the monitor is as it was; or it does no harm",
        ("safety/test_records.py", "safety/test_states.py"),
    ),
    "resume": Row(
        "a run is stopped at any step and resumed from a checkpoint: its alerts and readings are bit for bit "
        "those of the uninterrupted run (`overhead_budget=None`, or any run in which the clock changed "
        "neither the schedule nor the samples)",
        ("safety/test_resume.py", "test_resume.py"),
    ),
    "trust": Row(
        "nothing is written outside the run directory, the tab serves its own files only, control characters "
        "and markup are escaped, nothing is unpickled (except by `Snapshot.load(..., trusted=True)`), no "
        "connection is opened, CI installs only files that are pinned by hash",
        ("safety/test_trust.py",),
    ),
}

SHORT = "its short form only"
Shown = Callable[[str, int, str], None]
"""``shown(row, count, unit)``."""
Found = list[tuple[str, int, str]]


class Part(NamedTuple):
    """What one file of tests has counted when all of its tests passed."""

    commit: str
    code: str
    """Git's names of the package and the file as they were: equal names are equal code."""
    found: Found


def line(name: str, parts: dict[str, Part]) -> str:
    row = ROWS[name]
    counts: dict[str, dict[str, int]] = {}
    for part in parts.values():
        for other, count, unit in part.found:
            if other == name:
                units = counts.setdefault(part.commit, {})
                units[unit] = units.get(unit, 0) + count
    told = "; ".join(
        "; ".join(f"{count:,} {unit}" for unit, count in units.items()) + f" (at {commit})"
        for commit, units in counts.items()
    )
    files = " ".join(f"tests/{file}" for file in row.tests)
    return f'| {name} | {row.shown} | `pytest -m "slow or not slow" {files}` | {told or SHORT} |'


def render(parts: dict[str, Part]) -> str:
    """The page; a row that no test has counted says so."""
    return "\n".join(
        [
            "# What is shown of the monitor's safety",
            "",
            "Made from the tests that passed (`python -m tests.safety.table`), with what they counted and at",
            "which commit. A short form of each runs in `make test`.",
            "",
            "| | what is shown | command | tried |",
            "|---|---|---|---|",
            *(line(name, parts) for name in ROWS),
            "",
            *commands(parts),
            "",
            LIMITS,
        ]
    )


def commands(parts: dict[str, Part]) -> list[str]:
    """Which command shows which number."""
    from tests.safety.test_foreign_files import KINDS, NAMES

    numbers = {
        file: "; ".join(f"{count:,} {unit}" for _, count, unit in part.found) for file, part in parts.items()
    }
    foreign = f"{len(KINDS) * len(NAMES)} foreign files: {len(KINDS)} kinds under {len(NAMES)} names"
    numbers["safety/test_foreign_files.py"] = foreign
    return [
        "## Which command shows which number",
        "",
        'Each is `pytest -m "slow or not slow"` with the file; `--safety FILE` writes what it has counted.',
        "",
        *(f"- `tests/{file}`: {numbers[file]}" for file in files() if numbers.get(file)),
    ]


LIMITS = """\
## What is bounded, and by how much

`readings.jsonl` is thinned at 64 MiB (`nfi_monitor/report/run_directory/thinning.py`): about every second
reading of its older half is removed, evenly over the steps. The first reading of each phase and of each
resumed session stays. TensorBoard's files can only grow, and they grow with the logarithm of the run's
length: after 2,048 readings every second one is written as scalars, after as many again every fourth, and so
on. Alerts are never thinned. In memory, `monitor.history` keeps at most 32,768 values of a quantity. A saved
state (`monitor.state_dict()`) holds the alerts that fire, the last 1,000 others and the last 4,096 changes of
the phase; earlier alerts are in `alerts.jsonl`. The tab lists the last 5,000 alerts; a report explains 20.

## What is not shown

- **Faults while the monitor attaches.** The tests inject faults from the end of that call to the end of
  `close()`. An error before is raised by the call, also where a framework attaches as its training begins.
- **Some functions.** `tests/safety/outside.py` lists the functions that no test can make raise, with the
  reason. They are those that torch, a framework or the user calls (each has a try block of its own), and the
  backward pass of a loss that the training was given.
- **Functions that a user calls for an answer** (`summary()`, `explain()`, `state_dict()`, `replay()`), and
  remedies that a user applies: these raise where they are called.
- **Waiting.** A rank whose part in an exchange fails costs the others one wait, of 120 seconds at most. Where
  numbers come late, on accelerators, it is half an hour at most.
- **Accelerators.** No row of the table ran on one. `tests/played/` plays one on the host's memory: kernels
  are counted, waiting is recorded, copies arrive late. DataParallel's replicas on several devices, of which
  the monitor reads those on one device, are only imitated.
- **The build.** The packages that pip downloads to build this package (setuptools) are not pinned by hash.
  torch is pinned by version, not by hash: its build depends on the machine.
- **Checkpoints of many processes.** Such a checkpoint does not hold the values that the next step of *all*
  ranks would be compared with. Curvature, alignment and feature displacement are missing in the first reading
  after the resume.
- **Equal readings of two runs.** On accelerators, and with an `overhead_budget`, the clock decides what is
  read. So two runs may read different steps, or samples of different size.
- **A link that appears between a check and a write.** TensorBoard's own thread opens its file by its name,
  some milliseconds after the monitor has checked what has that name.
- **Closing from another thread** while a step runs. The training goes on, and hooks and files are released;
  what the step was about to write may be missing, with a note.
- **Windows.** A second process in the same directory is not refused.
"""


@pytest.fixture
def shown(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Shown:
    """Call it last: a test that fails has shown nothing."""

    def record(row: str, count: int, unit: str) -> None:
        print(f"{row}: {count:,} {unit}")
        assert row in ROWS
        record_property(PROPERTY, [row, count, unit])
        if request.config.getoption("--safety") is None and PAGE.exists():
            page = PAGE.read_text(encoding="utf-8")
            its = next((text for text in page.splitlines() if text.startswith(f"| {row} |")), "")
            if SHORT in its:
                return  # it claims nothing yet
            claimed = re.search(rf"([\d,]+) {re.escape(unit)}", its)
            assert claimed and int(claimed[1].replace(",", "")) <= count, (
                f"docs/safety.md claims {claimed[0] if claimed else 'nothing'} where {count:,} {unit} were "
                f"counted ({row}). Renew it: python -m tests.safety.table"
            )

    return record


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--safety", metavar="FILE", help="write what the tests of tests/safety count to FILE")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--safety")
    if path is not None and not hasattr(config, "workerinput"):  # xdist's workers report to their controller
        config.pluginmanager.register(_Collector(Path(path)))


class _Collector:
    """Keeps what passed tests have shown; it travels as user properties, also from xdist's workers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[object] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._found += [value for name, value in report.user_properties if name == PROPERTY]

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps(self._found), encoding="utf-8")


def files() -> list[str]:
    """All files of tests that show a row, and the other ones of tests/safety."""
    named = [file for row in ROWS.values() for file in row.tests]
    others = [f"safety/{path.name}" for path in sorted((ROOT / "tests" / "safety").glob("test_*.py"))]
    return list(dict.fromkeys(named + others))


def git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def code_of(file: str) -> str:
    """Equal for equal code; not equal to any that is kept while something is not committed."""
    watched = ("nfi_monitor", "integrations", f"tests/{file}")
    if git("status", "--porcelain", "--", *watched):
        return "changed"
    return " ".join(git("rev-parse", *(f"HEAD:{path}" for path in watched)).split())


def kept() -> dict[str, Part]:
    if not COUNTS.exists():
        return {}
    parts = json.loads(COUNTS.read_text(encoding="utf-8"))
    return {
        file: Part(part["commit"], part["code"], [(row, count, unit) for row, count, unit in part["found"]])
        for file, part in parts.items()
    }


def keep(parts: dict[str, Part]) -> None:
    told = {file: parts[file]._asdict() for file in files() if file in parts}
    COUNTS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def count(file: str) -> Part | None:
    """Run all tests of the file in a process of its own; None if one fails."""
    code, commit = code_of(file), git("rev-parse", "--short", "HEAD").strip()
    commit += " with changes" if code == "changed" else ""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "shown.json"
        marks = ["-q", "-m", "slow or not slow", "--safety", str(out), f"tests/{file}"]
        if subprocess.run([sys.executable, "-m", "pytest", *marks], cwd=ROOT, check=False).returncode:
            return None
        return Part(commit, code, json.loads(out.read_text(encoding="utf-8")))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--print", action="store_true", help="print the page, run and write nothing")
    parser.add_argument("--only", nargs="+", choices=files(), metavar="FILE", help="run these, in any case")
    arguments = parser.parse_args(argv)
    parts, failed = kept(), []
    if arguments.print:
        print(render(parts))
        return 0
    for file in arguments.only or files():
        if not arguments.only and file in parts and parts[file].code == code_of(file) != "changed":
            continue
        part = count(file)
        if part is None:
            failed.append(file)
        else:
            parts[file] = part
            keep(parts)
    if failed:
        print(f"The page is left as it was. Tests failed in: {', '.join(failed)}.", file=sys.stderr)
        return 1
    PAGE.write_text(render(parts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
