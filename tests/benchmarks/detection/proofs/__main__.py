"""Prove the causes and the advice by training again: ``python -m tests.benchmarks.detection.proofs``.

    python -m tests.benchmarks.detection.proofs                        # all; goes on where it was stopped
    python -m tests.benchmarks.detection.proofs --only external --limit 10
    python -m tests.benchmarks.detection.proofs --minutes 8            # a piece
    python -m tests.benchmarks.detection.proofs --part 1/2             # one of two processes
    python -m tests.benchmarks.detection.proofs --page                 # PROOFS.md from what is kept
    python -m tests.benchmarks.detection.proofs --failures             # kicks whose cause was not named

Every run is one JSON file in the cache, and is made anew when the code that it depends on has changed.
PROOFS.md beside this file is written at the end, from all runs that are kept.
"""

from __future__ import annotations

import argparse
import time
import traceback
from pathlib import Path

from rich.console import Console

from tests.benchmarks.detection.proofs import page
from tests.benchmarks.detection.proofs.hear import one_thread
from tests.benchmarks.detection.proofs.kept import CACHE, Kept
from tests.benchmarks.detection.proofs.subjects import EXTERNAL, KINDS, Subject, subjects
from tests.benchmarks.detection.proofs.trial import Record, key_of, prove

PAGE = Path(__file__).with_name("PROOFS.md")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.detection.proofs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND", help=f"of: {', '.join(KINDS)}")
    parser.add_argument("--families", nargs="+", metavar="TEXT", help="families whose names begin so")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="these only")
    parser.add_argument("--limit", type=int, help="make so many runs, then write the page")
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--part", default="1/1", help="which of how many processes this is (default 1/1)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="kept results (default %(default)s)")
    parser.add_argument("--page", action="store_true", help="make nothing; write the page from what is kept")
    parser.add_argument(
        "--failures", action="store_true", help="print kicked runs that were misnamed; no page"
    )
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (default: beside this file)")
    args = parser.parse_args(argv)
    try:
        args.index, args.parts = (int(number) for number in args.part.split("/"))
        if not 1 <= args.index <= args.parts:
            raise ValueError
    except ValueError:
        parser.error(f"--part {args.part}: say 1/2 and 2/2")
    return args


def chosen(args: argparse.Namespace) -> list[Subject]:
    wanted = [
        subject
        for subject in subjects()
        if (not args.only or subject.kind in args.only)
        and (not args.families or subject.family.name.startswith(tuple(args.families)))
        and (not args.seeds or subject.seed in args.seeds)
    ]
    return wanted[args.index - 1 :: args.parts]


def make(args: argparse.Namespace, console: Console) -> int:
    """Make what is missing; returns how many runs failed."""
    kept, wanted = Kept(args.cache), chosen(args)
    missing = [subject for subject in wanted if kept.read(subject.name, key_of(subject)) is None]
    console.print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are kept.")
    begun, failed = time.perf_counter(), 0
    for number, subject in enumerate(missing[: args.limit], 1):
        started = time.perf_counter()
        if args.minutes is not None and started - begun > 60 * args.minutes:
            break
        try:
            said = page.in_a_line(prove(subject, kept))
        except Exception:  # one that fails must not cost the others' results
            failed += 1
            said = traceback.format_exc()
        took = time.perf_counter() - started
        console.out(f"[{number}/{len(missing)}] {took:5.1f} s  {subject.name}: {said}", highlight=False)
    return failed


def records(cache: Path) -> list[Record]:
    """All runs that are kept and of today's code."""
    kept = Kept(cache)
    found = (kept.read(subject.name, key_of(subject)) for subject in subjects())
    return [record for record in found if record is not None]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    one_thread()
    console = Console()
    failed = 0 if args.page or args.failures else make(args, console)
    found = records(args.cache)
    if args.failures:
        for line in page.failures([record for record in found if record["kind"] == EXTERNAL]):
            console.out(line, highlight=False)
        return 0
    made = page.sheets(found)
    for row in made[0].rows:
        console.out(" | ".join(row), highlight=False)
    args.out.write_text(page.page(made, len(found), len(subjects())), encoding="utf-8")
    console.out(f"written: {args.out}", highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
