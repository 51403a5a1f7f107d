"""Run trainings once under the project's own monitor and keep their per-step readings.

One file pair a run in the cache directory: ``FAMILY-SEED-KEY.npz`` (per quantity its steps and values, as
the monitor recorded them) and ``….json`` (what the detector is told besides, the live alerts, versions).
KEY is a hash of everything that the training depends on, so that a changed set-up is run again and an
unchanged one is not.  Both files are written under another name first and then renamed; the json comes last
and makes the run count.  Jobs are joblib's; its backend may be any that joblib knows, Ray's among them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

import nfi_monitor
from examples.reference.parallel import as_completed
from nfi_monitor import Alert, Monitor
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.history import History
from nfi_monitor.quantities import Merge, merged_by
from nfi_monitor.types import Thresholds
from tests.benchmarks.detection.families import Family
from tests.benchmarks.detection.suites.checked import CheckedTraining
from tests.benchmarks.detection.training import Training

CACHE = Path("runs") / "detection"
Column = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Run:
    """One recorded training."""

    family: str
    seed: int
    columns: dict[str, Column]
    """quantity → (optimizer steps int64, values float64), what the detector derives left out."""
    contexts: list[tuple[int, RunContext]]
    """(first step, what the detector is told from there on)."""
    alerts: list[Alert]
    """The live monitor's."""
    steps: int
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def tau(self) -> float:
        return self.contexts[-1][1].tau


# --- one run ---------------------------------------------------------------------------------------


def record(family: Family, seed: int, steps: int | None = None) -> Run:
    """Train under a monitor that reads every step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at this size a second thread costs more than it brings
    try:
        return _record(family, seed, family.steps if steps is None else steps)
    finally:
        torch.set_num_threads(threads)


def _record(family: Family, seed: int, steps: int) -> Run:
    started = time.perf_counter()
    training = family.build(seed, family.arm)
    monitor = Monitor(training.model, training.optimizer, console=False, every=1, **training.watch)
    monitor.history = History(max_rows=max(steps + 1, 4))  # nothing may be thinned here
    contexts: list[tuple[int, RunContext]] = []
    checked = _WholeLoss()
    with monitor:
        for number in range(1, steps + 1):
            checked.look(training, number)
            training.step(number, monitor)
            context = monitor._loop.detector.context  # no public name for it yet
            if not contexts or context != contexts[-1][1]:
                contexts.append((number, context))
    seconds = time.perf_counter() - started
    info = {
        "notes": [note.code for note in monitor.notes],
        "run": monitor.summary()["run"],
        "seconds": round(seconds, 2),
        "versions": versions(),
        "readings_by": readings_key(),
    }
    columns = {name: monitor.history[name] for name in monitor.history if name not in DERIVED}
    columns |= checked.column()
    return Run(family.name, seed, columns, contexts, monitor.alerts, steps, info)


class _WholeLoss:
    """The loss of a fixed part of the training set, where the training has one (suites/checked.py)."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []

    def look(self, training: Training, number: int) -> None:
        """Before optimizer step ``number``: the weights are those of that step's own loss."""
        if isinstance(training, CheckedTraining) and (value := training.check(number)) is not None:
            self.steps.append(number)
            self.values.append(value)

    def column(self) -> dict[str, Column]:
        if not self.steps:
            return {}
        return {TRUTH: (np.array(self.steps, dtype=np.int64), np.array(self.values, dtype=np.float64))}


TRUTH = "truth_loss"
"""Column with the loss that a run's slingshots are found in; the detector never sees it."""
DERIVED = tuple(name for name in merged_by(Merge.DERIVED) if name != "non_finite_gradients")
"""What the detector itself adds to a reading."""


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "nfi_monitor": nfi_monitor.__version__,
        "machine": platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


# --- keys ------------------------------------------------------------------------------------------


SUITES = "tests.benchmarks.detection.suites."
"""A run of these depends on the module of its builder too, and on what lies beside it."""
BESIDE = ("shared", "networks")
"""Modules of a half whose parts its builders use."""
COMMON = "common"
"""Module whose parts the builders of all halves with a directory of their own use."""
SAME_RUNS = Path(__file__).with_name("suites") / "same_runs.json"
"""Key of a family → the one under which its runs were recorded. Their set-ups' code moved to another module
since, and trains the same, bit for bit."""
RENAMED = {"LogitChange": "Arm"}
"""Name in the set-ups' code → the one it had when runs were recorded: another name makes no other run."""


def family_key(family: Family) -> str:
    """Hash of what the training depends on: its configuration, the set-ups' code, torch."""
    here = Path(__file__).parent
    code = [_code(here / f"{name}.py") for name in ("training", "data", "models", "losses", "setups")]
    parts = [family.config(), *code, torch.__version__]
    if family.module.startswith(SUITES):
        own = here.joinpath("suites", *family.module.removeprefix(SUITES).split(".")).with_suffix(".py")
        beside = [own.with_name(f"{name}.py") for name in BESIDE]
        if own.parent.name != "suites":
            beside.append(own.parent.with_name(f"{COMMON}.py"))
        parts += [_code(path) for path in (here / "suites" / "checked.py", own, *beside) if path.exists()]
    for name, recorded in RENAMED.items():
        parts = [re.sub(rf"\b{name}\b", recorded, part) for part in parts]
    key = _hash(*parts)
    return _same_runs().get(key, key)


@cache
def _same_runs() -> dict[str, str]:
    found: dict[str, str] = json.loads(SAME_RUNS.read_text(encoding="utf-8"))
    return found


@cache
def readings_key() -> str:
    """Hash of the code that makes readings; the report tells how many were made by other code."""
    return _package("capture", "measure")


@cache
def detector_key() -> str:
    """Hash of the code that was scored, with its constants."""
    return _hash(_package("detect"), repr(Thresholds()))


@cache
def spike_key() -> str:
    """Hash of the code that says what a slingshot is."""
    package = Path(nfi_monitor.__file__).parent / "detect"
    limits = {
        name: value
        for name, value in Thresholds().to_json().items()
        if name.startswith("spike_") or name == "recovered"
    }
    return _hash(
        *(_code(package / f"{name}.py") for name in ("smoothing", "loss_baseline", "spike")), repr(limits)
    )


@cache
def alarms_key() -> str:
    """Hash of the code that decides when an alarm sounds; what it is called and forecast left out."""
    return _hash(_package("detect", without=("advice", "forecast", "mechanism")), repr(Thresholds()))


def _package(*parts: str, without: tuple[str, ...] = ()) -> str:
    package = Path(nfi_monitor.__file__).parent
    paths = [path for part in parts for path in sorted((package / part).rglob("*.py"))]
    return _hash(*(_code(path) for path in paths if path.stem not in without))


@cache
def _code(path: Path) -> str:
    """A module without its comments, docstrings and layout: editing those changes no run."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [item for item in body if not _is_text(item)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


# --- the cache -------------------------------------------------------------------------------------


def path_of(family: Family, seed: int, directory: Path) -> Path:
    """Where the run's json is, or will be."""
    return directory / f"{family.name}-{seed}-{family_key(family)}.json"


def save(run: Run, path: Path) -> None:
    arrays: dict[str, Any] = {}
    for name, (steps, values) in run.columns.items():
        arrays[f"{name}/steps"], arrays[f"{name}/values"] = steps, values
    record = {
        "family": run.family,
        "seed": run.seed,
        "steps": run.steps,
        "contexts": [[step, asdict(context)] for step, context in run.contexts],
        "alerts": [alert.to_json() for alert in run.alerts],
        "info": run.info,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    _atomically(path.with_suffix(".npz"), lambda file: np.savez_compressed(file, **arrays))
    _atomically(path, lambda file: file.write(json.dumps(record, indent=1).encode()))


def load(path: Path) -> Run:
    """Raises OSError, ValueError or KeyError for a run that is not there or not whole."""
    record = json.loads(path.read_text(encoding="utf-8"))
    with np.load(path.with_suffix(".npz")) as stored:
        names = dict.fromkeys(name.rpartition("/")[0] for name in stored.files)
        columns = {name: (stored[f"{name}/steps"], stored[f"{name}/values"]) for name in names}
    # A detector of another version may know more or less of the run: readings outlive it.
    known = {item.name for item in fields(RunContext)}
    contexts = [
        (int(step), RunContext(**{name: value for name, value in context.items() if name in known}))
        for step, context in record["contexts"]
    ]
    alerts = [Alert.from_json(alert) for alert in record["alerts"]]
    return Run(record["family"], record["seed"], columns, contexts, alerts, record["steps"], record["info"])


def _atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def ensure(family: Family, seed: int, directory: Path, *, refresh: bool = False) -> Path:
    """The path of the recorded run, which is made now if it is not there."""
    path = path_of(family, seed, directory)
    if refresh or not is_whole(path):
        save(record(family, seed), path)
    return path


def is_whole(path: Path) -> bool:
    return path.exists() and path.with_suffix(".npz").exists()


def generate(
    families: Sequence[Family],
    directory: Path = CACHE,
    *,
    jobs: int = 1,
    backend: str = "loky",
    refresh: bool = False,
) -> Iterator[tuple[Family, int, Path]]:
    """Make what is missing; yields each run's path as it is there, in any order."""
    from joblib import delayed

    wanted = [(family, seed) for family in families for seed in family.seeds]
    longest_first = sorted(wanted, key=lambda item: -item[0].steps)
    calls = (delayed(_ensure)(family, seed, directory, refresh) for family, seed in longest_first)
    yield from as_completed(calls, jobs=jobs, backend=backend)


def _ensure(family: Family, seed: int, directory: Path, refresh: bool) -> tuple[Family, int, Path]:
    return family, seed, ensure(family, seed, directory, refresh=refresh)
