"""Record all output of the monitor for a fixed set of trainings, and compare two such records.

    # Record all live cases into OUT (some minutes):
    python -m tests.regression record OUT
    # Also record the proving ground's recorded runs:
    python -m tests.regression record OUT --recordings runs/detection
    # Record two cases only:
    python -m tests.regression record OUT --only division resumed
    # Compare; if the records differ, print where, and exit with code 1:
    python -m tests.regression compare BEFORE AFTER
    # Compare without texts, after a change of wording:
    python -m tests.regression compare BEFORE AFTER --numbers
    # Write the answers of the short regression anew:
    python -m tests.regression golden

If a change must not change behaviour: record before it, record after it, compare.  Make both records on the
same machine: processors round differently, so the trainings differ, too."""

from __future__ import annotations

import argparse
import difflib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed

from tests.regression import golden
from tests.regression.cases import CASES, recordings
from tests.regression.dump import finish, stop_the_clock

SHOWN = 5
"""Number of differing files to print. All differing files are counted."""


def record_case(name: str, directory: Path, recorded: Path | None) -> float:
    """Run one case and write its output below ``directory``; return the seconds it took."""
    torch.set_num_threads(1)
    stop_the_clock()
    out = directory / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    started = time.perf_counter()
    case = {**CASES, **(recordings(recorded) if recorded else {})}[name]
    case(out)
    finish(out)
    return time.perf_counter() - started


def record(directory: Path, only: list[str] | None, recorded: Path | None, jobs: int) -> int:
    """Record the cases in ``only`` (None: all), and print the seconds that each case took; return 0."""
    names = [*CASES, *(recordings(recorded) if recorded else {})] if only is None else only
    seconds = Parallel(n_jobs=jobs)(delayed(record_case)(name, directory, recorded) for name in names)
    for name, taken in zip(names, seconds, strict=True):
        print(f"{taken:6.1f} s  {name}")
    return 0


def without_words(path: Path) -> bytes:
    """Return the content of a file, with every text of several words replaced by "…"."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(item) for key, item in value.items()}
        if isinstance(value, list):
            return [bare(item) for item in value]
        return "…" if isinstance(value, str) and " " in value else value

    if path.suffix == ".txt":
        return b""
    lines = path.read_text(encoding="utf-8")
    records = lines.splitlines() if path.suffix == ".jsonl" else [lines]
    return json.dumps([bare(json.loads(record)) for record in records]).encode()


def compare(before: Path, after: Path, only: list[str] | None = None, *, words: bool = True) -> int:
    """Return 0 if both records have the same files, byte for byte, else 1. ``words=False``: ignore texts."""
    content = Path.read_bytes if words else without_words

    def files(root: Path) -> dict[str, Path]:
        found = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
        return {name: path for name, path in found.items() if only is None or name.split("/")[0] in only}

    old, new = files(before), files(after)
    different = [name for name in old.keys() & new.keys() if content(old[name]) != content(new[name])]
    for name in sorted(different)[:SHOWN]:
        lines = [
            path.read_text(encoding="utf-8", errors="replace").splitlines() for path in (old[name], new[name])
        ]
        print(f"--- {name}")
        print("\n".join(list(difflib.unified_diff(*lines, lineterm="", n=0))[2:12]))
    for name in sorted(old.keys() ^ new.keys()):
        print(f"only {'before' if name in old else 'after'}: {name}")
    print(f"{len(old.keys() & new.keys())} files compared, {len(different)} differ")
    return int(bool(different or old.keys() ^ new.keys()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.regression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("record")
    making.add_argument("out", type=Path)
    making.add_argument("--only", nargs="+", metavar="CASE")
    making.add_argument("--recordings", type=Path, metavar="DIR")
    making.add_argument("--jobs", type=int, default=1)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--only", nargs="+", metavar="CASE")
    comparing.add_argument("--numbers", action="store_true", help="leave out texts of several words")
    commands.add_parser("golden")
    args = parser.parse_args(argv)
    if args.command == "golden":
        golden.write()
        return 0
    if args.command == "compare":
        return compare(args.before, args.after, args.only, words=not args.numbers)
    return record(args.out.resolve(), args.only, args.recordings, args.jobs)


if __name__ == "__main__":
    sys.exit(main())
