"""Which remedy averts which slingshot: ``python -m tests.benchmarks.remedies`` writes RESULTS.md beside this.

    python -m tests.benchmarks.remedies --jobs 2
    python -m tests.benchmarks.remedies --families division-17 --seeds 1 --out /tmp/table.md
    python -m tests.benchmarks.remedies --costs           # what a remedy costs, nothing else, in two minutes

Every trial is kept in the cache, so that an interrupted command goes on where it was; what is there is made
again only when the code that it depends on has changed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tests.benchmarks.detection import generate
from tests.benchmarks.remedies import losscost, page, trials
from tests.benchmarks.remedies.matrix import SEEDS, Case, cases

CACHE = Path("runs") / "remedies"
RESULTS = Path(__file__).with_name("RESULTS.md")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.remedies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--families", nargs="+", metavar="NAME", help="these only (default: all)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default %(default)s; -1: all cores)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="kept trials (default %(default)s)")
    parser.add_argument("--kept", action="store_true", help="write the page from what is kept, try nothing")
    parser.add_argument("--costs", action="store_true", help="only measure costs, into the page as it is")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the page (default %(default)s)")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    try:
        args.cases = cases(args.families)
    except ValueError as error:
        parser.error(str(error))
    return args


# --- kept trials ------------------------------------------------------------------------------------


def code_key() -> str:
    """Hash of the code that a trial's outcome depends on besides its family: remedies, trials, spikes."""
    here = Path(__file__).parent
    own = [generate._code(here / f"{name}.py") for name in ("matrix", "trials")]
    return generate._hash(generate.spike_key(), generate._package("remedies"), *own, torch.__version__)


def monitor_key() -> str:
    """And of the code that raises the alarms."""
    return generate._hash(code_key(), generate.alarms_key(), generate.readings_key())


class Kept:
    """One JSON file a trial."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, case: Case, name: str, monitored: bool) -> Path:
        key = generate._hash(generate.family_key(case.family), monitor_key() if monitored else code_key())
        return self.folder / f"{name.replace(' ', '_')}-{key}.json"

    def read(self, path: Path) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def write(self, path: Path, record: dict[str, Any]) -> dict[str, Any]:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, allow_nan=False).encode()
        generate._atomically(path, lambda file: file.write(text))
        return record


Done = tuple[Case, int, dict[str, dict[str, Any]], str]
"""A family, a seed, ``{"start/REMEDY": record, …}`` and a traceback where something failed."""


def runs_of(case: Case, seed: int, folder: Path, make: bool = True) -> Done:
    """Everything from the start; without ``make`` only what is kept."""
    torch.set_num_threads(1)  # at this size a second thread costs more than it brings
    kept = Kept(folder)
    records: dict[str, dict[str, Any]] = {}
    try:
        for trial in trials.trials_of(case, seed):
            if trial.when == "alarms":
                continue
            path = kept.path(case, trial.name, trial.when == "live")
            record = kept.read(path)
            if record is None and make:
                do = trials.live if trial.when == "live" else trials.from_start
                record = kept.write(path, do(trial))
            if record is not None:
                records[f"{trial.when}/{trial.remedy}"] = record
    except Exception:  # one that fails must not cost the others' results
        return case, seed, records, traceback.format_exc()
    return case, seed, records, ""


def alarms_of(case: Case, seed: int, folder: Path, make: bool = True) -> Done:
    """Everything from the alarms on, of a run that :func:`runs_of` has kept."""
    torch.set_num_threads(1)
    kept = Kept(folder)
    records: dict[str, dict[str, Any]] = {}
    tried = [trial.remedy for trial in trials.trials_of(case, seed) if trial.when == "alarms"]
    paths = {
        name: kept.path(case, trials.Trial(case, seed, name, "alarms").name, True)
        for name in (*tried, trials.REPLAYS)
    }
    try:
        found = {name: kept.read(path) for name, path in paths.items()}
        if make and None in found.values():
            plain = kept.read(kept.path(case, trials.Trial(case, seed, trials.PLAIN, "live").name, True))
            if plain is None:
                raise RuntimeError(f"{case.family.name}-{seed} has not been run.")
            todo = [name for name in tried if found[name] is None]
            for name, record in trials.from_alarms(case, seed, todo, plain).items():
                found[name] = kept.write(paths[name], record)
        records = {f"alarms/{name}": record for name, record in found.items() if record is not None}
    except Exception:
        return case, seed, records, traceback.format_exc()
    return case, seed, records, ""


def costs(wanted: list[Case], folder: Path, make: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(remedy → step time of the first family it fits, "N×K" → cost of the losses); one after the other."""
    kept, steps, losses = Kept(folder), {}, {}
    for case in wanted:
        for remedy in case.remedies():
            if remedy.name not in steps:
                path = kept.path(case, f"{case.family.name}-step-time-{remedy.name}", False)
                record = kept.read(path)
                if record is None and make:
                    record = kept.write(path, trials.step_time(case, remedy.name) | {"taken": _today()})
                if record is not None:
                    steps[remedy.name] = {**record, "family": case.family.name}
    key = generate._hash(generate._package("remedies"), generate._code(Path(losscost.__file__)))
    for rows, classes in losscost.SHAPES:
        path = folder / f"loss-{rows}x{classes}-{key}.json"
        record = kept.read(path)
        if record is None and make:
            measured = losscost.measure(rows, classes)
            record = kept.write(path, {name: {**item, "taken": _today()} for name, item in measured.items()})
        if record is not None:
            losses[f"{rows} × {classes:,}"] = record
    return steps, losses


def results_of(args: argparse.Namespace) -> Iterator[Done]:
    """By seed, so that what is interrupted has something of every family; then the alarms that need them."""
    from joblib import Parallel, delayed

    runs = [(case, seed) for seed in range(args.seeds) for case in args.cases]
    broadly = sorted(args.cases, key=lambda case: bool(case.only))  # on which everything is tried
    alarms = [(case, seed) for case in broadly for seed in range(args.seeds)]
    for part, jobs in ((runs_of, runs), (alarms_of, alarms)):
        if args.jobs == 1 or args.kept:
            for case, seed in jobs:
                yield part(case, seed, args.cache, not args.kept)
        else:
            parallel = Parallel(n_jobs=args.jobs, return_as="generator_unordered")
            yield from parallel(delayed(part)(case, seed, args.cache) for case, seed in jobs)


def _today() -> str:
    return datetime.date.today().isoformat()


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console()
    torch.set_num_threads(1)
    started = time.perf_counter()
    found, failed = page.Found(), 0
    if args.costs:
        found.steps, found.losses = costs(args.cases, args.cache, not args.kept)
        args.out.write_text(page.with_costs(args.out.read_text("utf-8"), found), encoding="utf-8")
        return 0
    for case, seed, records, problem in results_of(args):
        console.out(f"{time.perf_counter() - started:6.0f} s  {case.family.name}-{seed}", highlight=False)
        found.add(case, seed, records)
        if problem:
            failed += 1
            console.out(problem, highlight=False)
    found.steps, found.losses = costs(args.cases, args.cache, not args.kept)
    text = page.render(
        found,
        {
            **generate.versions(),
            "date": _today(),
            "seeds": f"0–{args.seeds - 1}",
            "code": monitor_key(),
        },
    )
    args.out.write_text(text, encoding="utf-8")
    console.out(f"written: {args.out}, in {time.perf_counter() - started:.0f} s", highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
