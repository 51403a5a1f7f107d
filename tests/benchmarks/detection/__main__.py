"""Score the warnings on many trainings: ``python -m tests.benchmarks.detection``.

    python -m tests.benchmarks.detection                      # the quick suite, minutes; writes QUICK.md
    python -m tests.benchmarks.detection --suite frozen       # all halves that are not for tuning: FROZEN.md
    python -m tests.benchmarks.detection --suite "held-out 5" # the newest of them; writes no page
    python -m tests.benchmarks.detection --suite edges        # SGD, RMSprop and others, for tuning; no page
    python -m tests.benchmarks.detection --suite full --jobs 8
    python -m tests.benchmarks.detection --score-only         # after a change of the detector: seconds
    python -m tests.benchmarks.detection --families vit vit-probe

Trainings are recorded once and kept in ``--cache``, their scores in ``--scores``; an interrupted command goes
on where it was.  Runs that are not recorded are named on the page.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from joblib import Parallel, delayed
from rich.console import Console
from rich.progress import Progress

from tests.benchmarks.detection import report
from tests.benchmarks.detection.evaluate import Scored, evaluate_file
from tests.benchmarks.detection.families import NEWEST_FIRST, Family, suite
from tests.benchmarks.detection.generate import CACHE, generate, is_whole, path_of


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.detection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--suite", choices=["quick", "full", "edges", *reversed(NEWEST_FIRST)], default="quick"
    )
    parser.add_argument("--families", nargs="+", metavar="NAME", help="these only, whatever the suite")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default %(default)s; -1: all cores)")
    parser.add_argument("--backend", default="loky", help='joblib backend, for instance "ray" (default loky)')
    parser.add_argument("--cache", type=Path, default=CACHE, help="recorded runs (default %(default)s)")
    parser.add_argument("--scores", type=Path, help="kept scores (default scores/ in the cache)")
    parser.add_argument("--score-only", action="store_true", help="record nothing; score what is there")
    parser.add_argument("--record-only", action="store_true", help="score nothing")
    parser.add_argument("--refresh", action="store_true", help="record anew what is there already")
    parser.add_argument(
        "--out", type=Path, help="the page (default for a suite: QUICK.md or FROZEN.md beside this file)"
    )
    args = parser.parse_args(argv)
    if args.score_only and (args.refresh or args.record_only):
        parser.error("--score-only excludes --refresh and --record-only")
    try:
        args.chosen = suite(args.suite, args.families)
    except ValueError as error:
        parser.error(str(error))
    return args


def recorded(args: argparse.Namespace, console: Console) -> list[tuple[Family, int, Path]]:
    """Runs that are there, after making those that are not (unless scoring only)."""
    wanted = [
        (family, seed, path_of(family, seed, args.cache)) for family in args.chosen for seed in family.seeds
    ]
    if args.score_only:
        there = [item for item in wanted if is_whole(item[2])]
        if len(there) < len(wanted):
            console.print(f"{len(wanted) - len(there)} of {len(wanted)} runs are not recorded: left out.")
        return there
    with Progress(console=console) as progress:
        task = progress.add_task("recording", total=sum(family.steps for family, _, _ in wanted))
        for family, _, _ in generate(
            args.chosen, args.cache, jobs=args.jobs, backend=args.backend, refresh=args.refresh
        ):
            progress.advance(task, family.steps)
    return wanted


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)
    console = Console()
    started = time.perf_counter()
    runs = recorded(args, console)
    if not runs:
        console.print("No recorded runs. Leave out --score-only to make them.")
        return 1
    if args.record_only:
        return 0
    made = time.perf_counter()
    kept = args.scores or args.cache / "scores"
    # Long runs first: the last one to begin should not be the one to end.
    runs.sort(key=lambda run: -run[0].steps)
    scored: list[Scored] = Parallel(n_jobs=args.jobs)(
        delayed(evaluate_file)(family, path, kept) for family, _, path in runs
    )
    books = report.bind_halves(args.chosen, scored, "" if args.families else args.suite)
    report.show(books, console)
    # A few families are a look, not the record.
    options = f"--families {' '.join(args.families)}" if args.families else f"--suite {args.suite}"
    page = None if args.families else report.PAGES.get(args.suite)
    out = args.out or (None if page is None else Path(__file__).with_name(page))
    if out is not None:
        text = report.page(books, f"python -m tests.benchmarks.detection {options}")
        out.write_text(text, encoding="utf-8")
        console.out(f"written: {out}", highlight=False)
    console.print(f"recorded in {made - started:.0f} s, scored in {time.perf_counter() - made:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
