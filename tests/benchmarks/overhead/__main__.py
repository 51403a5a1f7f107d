"""Command line of the overhead benchmark."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from tests.benchmarks.overhead import report
from tests.benchmarks.overhead.cases import CASES
from tests.benchmarks.overhead.timing import measure
from tests.benchmarks.overhead.trainings import NULL, OTHERS, OURS, absent, others

PAGE = Path(__file__).with_name("OVERHEAD.md")


def main(argv: list[str] | None = None) -> int:
    names = [arm.name for arm in (*OURS, *OTHERS)]
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.overhead",
        description="Paired, interleaved timings of training with and without the monitor.",
        epilog=f"arms: {'; '.join(names)}",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        metavar="CASE",
        help=f"default: all for the device; {', '.join(CASES)}",
    )
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", choices=names, help="default: all that are installed"
    )
    parser.add_argument(
        "--rounds", type=int, default=9, help="watched blocks of each arm (default %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", help="torch threads (default: 1 and 2; on an accelerator 1)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("times", "costs"), help="one half of the page")
    parser.add_argument("--cache", type=Path, default=Path("runs/overhead.json"), help="results so far")
    parser.add_argument("--refresh", action="store_true", help="time again what is on record")
    parser.add_argument("--no-write", action="store_true", help=f"leave {PAGE.name} alone")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")

    cases = args.cases or [name for name, case in CASES.items() if case.runs_on(args.device)]
    if unfit := [name for name in cases if not CASES[name].runs_on(args.device)]:
        parser.error(f"{', '.join(unfit)}: for an accelerator (--device cuda)")

    console = Console()
    record = report.load(args.cache)
    if args.only != "costs":
        kinds = [arm for arm in (*OURS, *others()) if args.arms is None or arm.name in args.arms]
        if missing := absent():
            console.print(f"Not installed, not in the table: {', '.join(missing)}.", highlight=False)
        for threads in args.threads or ([1, 2] if args.device == "cpu" else [1]):
            torch.set_num_threads(threads)
            for name in cases:
                wanted = [
                    kind
                    for kind in kinds
                    if args.refresh or not record.has(name, threads, args.device, kind.name)
                ]
                null = args.refresh or not record.has(name, threads, args.device, NULL)
                if not wanted and not null:
                    continue
                for result in measure(
                    name,
                    CASES[name],
                    wanted,
                    rounds=args.rounds,
                    device=args.device,
                    seed=args.seed,
                    console=console,
                ):
                    record.add(result, args.device)
                    report.save(record, args.cache)
    if args.only != "times" and args.device == "cpu":
        torch.set_num_threads(1)
        record.costs = report.Costs.measured(cases, console)
        report.save(record, args.cache)
    report.show(record, console)
    if not args.no_write:
        PAGE.write_text(report.page(record), encoding="utf-8")
        console.print(f"written to {PAGE}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
