"""What the monitor says where people train: ``python -m tests.benchmarks.detection.ordinary``.

    python -m tests.benchmarks.detection.ordinary                      # record and score the tuning half
    python -m tests.benchmarks.detection.ordinary --score-only         # after a change of the detector
    python -m tests.benchmarks.detection.ordinary --half "held-out 5"  # once rules and constants are fixed
    python -m tests.benchmarks.detection.ordinary --families o-dropout o-decay-1 --score-only

Runs are recorded once, with every step read, and kept in ``--cache``.  The detector is then fed with them at
every step and as ``every="auto"`` would read them.  ``--half all`` writes ORDINARY.md of this directory,
once all runs are there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from joblib import Parallel, delayed
from rich.console import Console

from tests.benchmarks.detection.families import NEWEST_FIRST, TUNING, Family
from tests.benchmarks.detection.generate import CACHE, ensure, is_whole, path_of
from tests.benchmarks.detection.ordinary import page
from tests.benchmarks.detection.ordinary.judged import Judged, judge_file
from tests.benchmarks.detection.suites.ordinary import ORDINARY

PAGE = Path(__file__).with_name("ORDINARY.md")
ALL = "all"
"""All halves."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.detection.ordinary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--half", choices=[TUNING, *reversed(NEWEST_FIRST), ALL], default=TUNING)
    parser.add_argument("--families", nargs="+", metavar="NAME", help="these only, whatever the half")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default %(default)s)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="recorded runs (default %(default)s)")
    parser.add_argument("--score-only", action="store_true", help="record nothing; score what is there")
    parser.add_argument("--record-only", action="store_true", help="score nothing")
    parser.add_argument("--peers", action="store_true", help="score the peers too (always for a page)")
    parser.add_argument("--out", type=Path, help="the page (default with --half all: ORDINARY.md)")
    args = parser.parse_args(argv)
    unknown = [name for name in args.families or () if name not in ORDINARY]
    if unknown:
        parser.error(f"No family {', '.join(unknown)}. Known: {', '.join(ORDINARY)}.")
    args.chosen = [
        family
        for family in ORDINARY.values()
        if (family.name in args.families if args.families else args.half in (family.half, ALL))
    ]
    return args


def recorded(args: argparse.Namespace) -> list[tuple[Family, Path]]:
    """Runs that are there, after making those that are not (unless scoring only)."""
    wanted = [(family, seed) for family in args.chosen for seed in family.seeds]
    if not args.score_only:
        Parallel(n_jobs=args.jobs)(delayed(_record)(family, seed, args.cache) for family, seed in wanted)
    paths = [(family, path_of(family, seed, args.cache)) for family, seed in wanted]
    return [(family, path) for family, path in paths if is_whole(path)]


def _record(family: Family, seed: int, cache: Path) -> None:
    started = time.perf_counter()
    path = ensure(family, seed, cache)
    print(f"{family.name} {seed}: {time.perf_counter() - started:.0f} s, {path}", flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)
    console = Console()
    runs = recorded(args)
    missing = sum(len(family.seeds) for family in args.chosen) - len(runs)
    if missing:
        console.print(f"{missing} runs are not recorded: left out.")
    if not runs:
        console.print("No recorded runs. Leave out --score-only to make them.")
        return 1
    if args.record_only:
        return 0
    if args.half == ALL and not args.families and not missing and args.out is None:
        args.out = PAGE
    peers = args.peers or args.out is not None
    judged: list[Judged] = Parallel(n_jobs=args.jobs)(
        delayed(judge_file)(family, path, peers=peers) for family, path in runs
    )
    sheets = page.sheets(judged)
    for sheet in sheets:
        console.print(sheet.rich())
    if args.out is not None:
        half = "these families" if args.families else f"--half {args.half}"
        args.out.write_text(page.text(sheets, judged, half), encoding="utf-8")
        console.out(f"written: {args.out}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
