"""Define what a study consists of, and the command line that all studies share.

A study is one module with a ``STUDY``. It says how to build an arm, which arms there are, and how long and on
which seeds each preset trains them. It also lists the papers' claims and how to judge them. Arms of one
*pair* begin with the same data and the same weights for the same seed. They differ in the arm's ``options``.

joblib runs the jobs. A stored result is not computed again; an interrupted run continues from its checkpoint.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from examples.reference.judge import Claim, Judgement, Verdict
from examples.reference.parallel import BackendError, as_completed
from examples.reference.results import RESULTS, RUNS, NotTested, Result, Results, StudyError
from examples.reference.training import Training, finished, run_one

Config = Mapping[str, Any]
Compute = Callable[[Config, int, torch.device, Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Variant:
    """Hold one variant of a training, or a computation without training."""

    name: str
    what: str
    """One-line description for tables."""
    pair: str = ""
    """Arms with the same pair are compared seed by seed; the first of them is the baseline."""
    options: Config = field(default_factory=dict)
    """Changes to the pair's configuration that define the arm."""
    compute: Compute | None = None
    """(config, seed, device, run directory) → values, for a computation without a training loop."""


@dataclass(frozen=True)
class Plan:
    """Hold the number of steps and the seeds of an arm."""

    steps: int
    seeds: tuple[int, ...] = (0,)
    weight: float = 1.0
    """Cost of a step relative to the other arms'; the runs that take longest begin first."""


@dataclass(frozen=True)
class Preset:
    """Hold a scale at which a study can run."""

    name: str
    configs: Mapping[str, Config]
    """Pair (or, without one, arm) → its configuration."""
    plans: Mapping[str, Plan]
    """The arms of this preset."""
    checkpoint_every: int = 5_000
    """Optimizer steps between checkpoints."""

    def changed(self, configs: Mapping[str, Config], checkpoint_every: int | None = None) -> Preset:
        """Return a copy with some configurations replaced, for example for a smaller study."""
        merged = {name: {**config, **configs.get(name, {})} for name, config in self.configs.items()}
        return replace(self, configs=merged, checkpoint_every=checkpoint_every or self.checkpoint_every)


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    build: Callable[[Config, int, torch.device], Training]
    """(config, seed, device) → a training; all random generators are seeded before."""
    arms: Sequence[Variant]
    presets: Sequence[Preset]
    claims: Sequence[Claim]
    figure: Callable[[Results, Path], None] | None = None
    series: Sequence[str] = ("loss",)
    """Series that are stored for the figure, for the arms in ``drawn``."""
    drawn: Sequence[str] = ()
    """Arms whose first seed stores its series."""
    options: Callable[[argparse.ArgumentParser], None] | None = None
    """Adds command-line options; those in use go into the configuration of every run."""

    def arm(self, name: str) -> Variant:
        found: Variant = _named("arm", name, {arm.name: arm for arm in self.arms})
        return found

    def preset(self, name: str) -> Preset:
        found: Preset = _named("preset", name, {preset.name: preset for preset in self.presets})
        return found

    def config(self, preset: Preset, arm: Variant, options: Config | None = None) -> dict[str, Any]:
        """Merge the configurations of the preset's pair, the arm and the command line; the last wins."""
        base = preset.configs.get(arm.pair or arm.name, {})
        return {**base, **arm.options, **(options or {})}


def _named(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise StudyError(f"unknown {kind} {name!r}; there are: {', '.join(known)}")
    return known[name]


# --- the command ------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Print errors in one line: the usage of fourteen options would hide the error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def load_study(name: str) -> Study:
    study: Study = importlib.import_module(f"examples.reference.{name}").STUDY
    return study


def parse(study: Study, doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog=f"python -m examples.reference.{study.name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(preset.name for preset in study.presets)
    parser.add_argument("--preset", default=study.presets[0].name, help=f"{names} (default %(default)s)")
    parser.add_argument(
        "--arm", action="append", metavar="ARM", help="this arm only; may be given several times"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="instead of the preset's")
    parser.add_argument("--device", default="cpu", help='"cpu", "cuda", … (default %(default)s)')
    parser.add_argument("--jobs", type=int, default=2, help="processes (default %(default)s; -1: all cores)")
    parser.add_argument("--backend", default="loky", help='joblib backend, for instance "ray" (default loky)')
    parser.add_argument("--refresh", action="store_true", help="repeat what is on record already")
    parser.add_argument("--list", action="store_true", help="show the preset's arms and stop")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="result files (default: beside the code)"
    )
    parser.add_argument(
        "--runs", type=Path, default=RUNS, help="checkpoints, event files (default %(default)s)"
    )
    ours = {action.dest for action in parser._actions}
    if study.options is not None:
        study.options(parser)
    args = parser.parse_args(argv)
    args.options = {
        name: value for name, value in vars(args).items() if name not in ours and value is not None
    }
    try:
        args.chosen = study.preset(args.preset)
        args.arms = args.arm or list(args.chosen.plans)
        for name in args.arms:
            _named("arm", name, args.chosen.plans)
        torch.zeros(1, device=args.device)
    except StudyError as error:
        parser.error(str(error))
    except (RuntimeError, AssertionError) as error:
        parser.error(f"device {args.device!r} cannot be used here: {str(error).splitlines()[0]}")
    return args


def command(name: str, argv: Sequence[str] | None = None) -> int:
    """Run the missing runs of a preset; then print runs and verdicts, and draw the figure."""
    module = importlib.import_module(f"examples.reference.{name}")
    study: Study = module.STUDY
    args = parse(study, module.__doc__, argv)
    console = Console()
    if args.list:
        console.print(_arms(study, args.chosen))
        return 0
    started = time.perf_counter()
    directory = args.results / study.name / args.chosen.name
    try:
        done = _run_all(study, args, console)
    except StudyError as error:
        console.file.flush()
        Console(stderr=True).print(f"{study.name}: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    results = Results.load(directory)
    for problem in results.problems:
        console.print(problem, markup=False, style="yellow")
    console.print(runs_table(study, results))
    console.print(verdict_table(study, results))
    console.out(f"figure   {draw(study, results, directory)}", highlight=False)
    console.out(f"results  {directory}", highlight=False)
    console.print(f"{done} runs made in {time.perf_counter() - started:.0f} s", highlight=False)
    return 0


def _run_all(study: Study, args: argparse.Namespace, console: Console) -> int:
    """Run what has no stored result; return the number of runs."""
    preset: Preset = args.chosen
    wanted = [
        (arm, seed) for arm in args.arms for seed in dict.fromkeys(args.seeds or preset.plans[arm].seeds)
    ]
    missing = [item for item in wanted if args.refresh or not _on_record(study, args, *item)]
    if len(missing) < len(wanted):
        console.print(
            f"{len(wanted) - len(missing)} of {len(wanted)} runs are on record; --refresh repeats them.",
            highlight=False,
        )
    # Long runs first, so that no long run starts last.
    missing.sort(key=lambda item: -preset.plans[item[0]].steps * preset.plans[item[0]].weight)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not missing) as progress:
        total = sum(max(preset.plans[arm].steps, 1) for arm, _ in missing)
        task = progress.add_task(f"{study.name} {preset.name}", total=total)
        for arm, seed, seconds in _made(study, args, missing):
            progress.advance(task, max(preset.plans[arm].steps, 1))
            progress.console.print(f"{arm}, seed {seed}: {seconds:.0f} s", highlight=False, style="dim")
    return len(missing)


def _on_record(study: Study, args: argparse.Namespace, arm: str, seed: int) -> bool:
    preset: Preset = args.chosen
    path = args.results / study.name / preset.name / f"{arm}-{seed}.json"
    config = study.config(preset, study.arm(arm), args.options)
    return finished(path, config, preset.plans[arm].steps) is not None


def _made(
    study: Study, args: argparse.Namespace, missing: Sequence[tuple[str, int]]
) -> Iterator[tuple[str, int, float]]:
    try:
        from joblib import delayed
    except ImportError as error:
        raise StudyError('studies need joblib: pip install "nfi-monitor[examples]"') from error
    common = {
        "results": args.results.resolve(),
        "runs": args.runs.resolve(),
        "device": args.device,
        "refresh": args.refresh,
        "options": args.options,
    }
    calls = (delayed(_job)(study.name, args.chosen.name, arm, seed, common) for arm, seed in missing)
    try:
        yield from as_completed(calls, jobs=args.jobs, backend=args.backend)
    except BackendError as error:
        raise StudyError(str(error)) from error


def _job(study: str, preset: str, arm: str, seed: int, common: Mapping[str, Any]) -> tuple[str, int, float]:
    """Run one arm and seed in a process; find the study by name, because its functions do not pickle."""
    found = load_study(study)
    result = run_one(found, found.preset(preset), arm, seed, **common)
    return arm, seed, float(result.made["seconds"])


# --- output -------------------------------------------------------------------------------------------


def draw(study: Study, results: Results, directory: Path) -> str:
    """Draw the figure; return its path, or why there is none."""
    if study.figure is None:
        return "none"
    path = directory / "figure.png"
    try:
        study.figure(results, path)
    except NotTested as missing:
        return f"none: {missing}"
    except ImportError as missing:
        return f'none: {missing}; pip install "nfi-monitor[plots]"'
    return str(path)


def judged(study: Study, results: Results) -> list[tuple[Claim, Judgement]]:
    return [(claim, claim.judged(results)) for claim in study.claims]


_STYLE = {Verdict.AGREES: "green", Verdict.DISAGREES: "red", Verdict.NOT_TESTED: "dim"}


def verdict_table(study: Study, results: Results) -> Table:
    table = Table(title=f"{study.title}: what the papers say, and what was found", show_lines=True)
    for column in ("claim", "source", "ours", "95% interval", "verdict"):
        table.add_column(column, overflow="fold")
    for claim, found in judged(study, results):
        verdict = f"[{_STYLE[found.verdict]}]{found.verdict}"
        table.add_row(*map(_plain, (claim.text, claim.source, found.ours, found.interval)), verdict)
    return table


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


def run_rows(study: Study, results: Results) -> list[tuple[str, ...]]:
    """Return one row per arm: name, description, runs × steps, slingshots, announced, lead, mechanisms."""
    rows: list[tuple[str, ...]] = []
    for arm in study.arms:
        if arm.name not in results:
            continue
        runs = results[arm.name]
        every = [s for run in runs for s in run.slingshots]
        warned = [s for run in runs for s in run.announced]
        leads = sorted(max(s["at_risk_lead"] or 0, s["imminent_lead"] or 0) for s in warned)
        named = dict.fromkeys(str(s["mechanism"]).replace("_", " ") for s in every)
        rows.append(
            (
                arm.name,
                arm.what,
                f"{len(runs)} × {runs[0].steps:,}",
                str(sum(len(run.episodes) for run in runs)),
                f"{len(warned)} of {len(every)}" if every else "–",
                f"{leads[len(leads) // 2]:,}" if leads else "–",
                ", ".join(named) or "–",
            )
        )
    return rows


RUN_COLUMNS = ("arm", "what", "runs × steps", "slingshots", "announced", "median lead", "mechanism named")


def runs_table(study: Study, results: Results) -> Table:
    table = Table(title=f"{study.title}: {len(results)} runs")
    for column in RUN_COLUMNS:
        table.add_column(column, overflow="fold")
    for row in run_rows(study, results):
        table.add_row(*map(_plain, row))
    return table


def _arms(study: Study, preset: Preset) -> Table:
    table = Table(title=f"{study.title}, preset {preset.name}")
    for column in ("arm", "what", "steps", "seeds"):
        table.add_column(column, overflow="fold")
    for name, plan in preset.plans.items():
        table.add_row(name, _plain(study.arm(name).what), f"{plan.steps:,}", " ".join(map(str, plan.seeds)))
    return table


__all__ = ["Claim", "Plan", "Preset", "Result", "Study", "StudyError", "Variant", "command"]
