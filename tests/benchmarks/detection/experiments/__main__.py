"""What the warnings were worth, tried out: ``python -m tests.benchmarks.detection.experiments``.

    python -m tests.benchmarks.detection.experiments                        # the quick suite's runs
    python -m tests.benchmarks.detection.experiments --suite full --jobs 8
    python -m tests.benchmarks.detection.experiments --families division-17 --most 1
    python -m tests.benchmarks.detection.experiments --suite full --only cadence

Needs runs that ``python -m tests.benchmarks.detection`` recorded; says which are not there and goes on.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from examples.reference.parallel import as_completed
from tests.benchmarks.detection import generate
from tests.benchmarks.detection.experiments import cadence
from tests.benchmarks.detection.experiments.results import KINDS, Job, merge
from tests.benchmarks.detection.families import suite

Done = tuple[Job, dict[str, Any] | None, str]
"""The job, its result or None, and the traceback where there is no result."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.detection.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=["quick", "full"], default="quick")
    parser.add_argument("--families", nargs="+", metavar="NAME", help="these only, whatever the suite")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default %(default)s; -1: all cores)")
    parser.add_argument("--backend", default="loky", help='joblib backend, for instance "ray" (default loky)')
    parser.add_argument(
        "--cache", type=Path, default=generate.CACHE, help="recorded runs (default %(default)s)"
    )
    parser.add_argument("--most", type=int, default=3, help="slingshots a run (default %(default)s)")
    parser.add_argument(
        "--budget",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="a run, beyond its first slingshot (default %(default)s)",
    )
    parser.add_argument("--only", choices=KINDS, help="this kind of experiment; the other's results stay")
    args = parser.parse_args(argv)
    args.kinds = [args.only] if args.only else list(KINDS)
    try:
        args.chosen = suite(args.suite, args.families)
    except ValueError as error:
        parser.error(str(error))
    return args


def jobs_of(args: argparse.Namespace, console: Console) -> list[Job]:
    """One or two jobs a recorded run."""
    jobs, missing = [], 0
    for family in args.chosen:
        for seed in family.seeds:
            run = generate.path_of(family, seed, args.cache)
            if not generate.is_whole(run):
                missing += 1
                continue
            if "trials" in args.kinds:
                jobs.append(Job("trials", family, seed, run, args.most, args.budget))
            if "cadence" in args.kinds and family.name in cadence.FAMILIES and seed == family.seeds[0]:
                jobs.append(Job("cadence", family, seed, run))
    if missing:
        console.print(f"{missing} runs are not recorded: left out.")
    return jobs


def results_of(jobs: Sequence[Job], console: Console, *, processes: int, backend: str) -> Iterator[Done]:
    """In any order; what is cached is read, not made again."""
    from joblib import delayed

    wanted = sorted(jobs, key=lambda job: -job.weight)
    with Progress(console=console) as progress:
        task = progress.add_task("experiments", total=len(wanted))
        for done in as_completed((delayed(_do)(job) for job in wanted), jobs=processes, backend=backend):
            progress.advance(task)
            yield done


def _do(job: Job) -> Done:
    # A run that cannot be continued must not cost the others' results.
    try:
        return job, job.result or job.do(), ""
    except Exception:
        return job, None, traceback.format_exc()


def show(merged: dict[str, Any], console: Console) -> None:
    """Shares a family; the report has the intervals."""
    events = merged["events"]
    states = [record for record in (*events, *merged["at_risk"]) if record["twin"] is not None]
    remedies = list(dict.fromkeys(name for event in events for name in event["remedies"]))
    table = Table(title="What was tried", title_justify="left")
    table.caption, table.caption_justify = (
        "\n".join(f"{n}: {name}" for n, name in enumerate(remedies, 1)),
        "left",
    )
    averted = [f"averted by {n}" for n in range(1, len(remedies) + 1)]
    for column in ("family", "slingshots", *averted, "named as replayed", "twins"):
        table.add_column(
            column, justify="left" if column == "family" else "right", no_wrap=column == "family"
        )
    for family in sorted({record["family"] for record in (*events, *states)}):
        own = [[record for record in of if record["family"] == family] for of in (events, states)]
        table.add_row(family, *_cells(own[0], own[1], remedies))
    table.add_section()
    table.add_row("all", *_cells(events, states, remedies))
    console.print(table)
    for rule in cadence.RULES:
        records = [record for record in merged["cadence"] if record["rule"] == rule]
        for kind in ("every", "auto"):
            hits, of = (sum(record[f"recall_{kind}"][index] for record in records) for index in (0, 1))
            leads = sorted(lead for record in records for lead in record[f"leads_{kind}"])
            middle = f"{leads[len(leads) // 2]:.2f} τ" if leads else "–"
            console.print(f"{rule}, read {kind}: {hits}/{of} warned, median lead {middle}")
    for record in merged["differs"]:
        console.print(
            f"{record['family']}-{record['seed']}: this machine does not repeat the recorded run from step "
            f"{record['step']} on ({record['kind']}); record it anew here."
        )


def _cells(
    events: Sequence[dict[str, Any]], states: Sequence[dict[str, Any]], remedies: Sequence[str]
) -> list[str]:
    return [
        str(len(events)),
        *(_share([e["remedies"][name] for e in events if name in e["remedies"]]) for name in remedies),
        _share([event["named"] == event["replay"]["mechanism"] for event in events]),
        _share([record["twin"]["confirmed"] for record in states]),
    ]


def _share(of: Sequence[bool]) -> str:
    return f"{sum(of)}/{len(of)}" if of else "–"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console()
    started = time.perf_counter()
    done, failed = [], []
    jobs = jobs_of(args, console)
    if not jobs:
        console.print("No recorded runs. Make them: python -m tests.benchmarks.detection")
        return 1
    for job, result, problem in results_of(jobs, console, processes=args.jobs, backend=args.backend):
        if result is None:
            failed.append((job, problem))
        else:
            done.append((job, result))
    path = args.cache / "experiments.json"
    show(merge(done, path, args.kinds), console)
    for job, problem in failed:
        console.print(f"{job.kind} of {job.family.name}-{job.seed} failed:")
        console.out(problem, highlight=False)
    console.out(f"written: {path}, in {time.perf_counter() - started:.0f} s", highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
