"""Read and write the results of runs: one small JSON file per arm and seed.

Tables and figures come only from these files, so anyone who has them can check every number without training.
A file that cannot be read is left out and reported. So is a run whose data or initial weights differ from its
pair's: it is no evidence about the arm.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from nfi_monitor import Alert
from nfi_monitor.report.json_values import as_json
from nfi_monitor.report.pixels import thin
from nfi_monitor.types import Thresholds

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs") / "reference"
BINS = 400
"""Bins of a stored series; each keeps its smallest and its largest value."""

Series = dict[str, tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]]


class StudyError(Exception):
    """Tell the user in one line what the study needs before it can run."""


class NotTested(Exception):
    """Report that the results do not decide a claim; the message says what is missing."""


@dataclass(frozen=True)
class Result:
    """Hold one run of one arm."""

    study: str
    preset: str
    arm: str
    seed: int
    pair: str
    config: dict[str, Any]
    steps: int
    slingshots: list[dict[str, Any]]
    """The slingshots of the monitor's summary: start, end, at_risk_lead, imminent_lead, mechanism, …"""
    episodes: list[tuple[int, int | None, float]]
    """Wu's slingshot intervals in the loss of every step: (first step, first step after it or None, peak)."""
    alerts: list[Alert]
    loss_final: float | None
    values: dict[str, Any]
    """Further measurements of the study."""
    start: dict[str, str] = field(default_factory=dict)
    """Tensor of the model → digest of its initial value in float32."""
    data: str = ""
    """Digest of the data."""
    made: dict[str, Any] = field(default_factory=dict)
    """date, seconds, device, versions."""
    path: Path | None = None

    @property
    def announced(self) -> list[dict[str, Any]]:
        """Return the slingshots before which an alert began."""
        return [s for s in self.slingshots if (s["at_risk_lead"] or 0) > 0 or (s["imminent_lead"] or 0) > 0]

    @cached_property
    def series(self) -> Series:
        """Return name → (steps int64, values float32), thinned; empty for runs that no figure shows."""
        if self.path is None or not (stored := self.path.with_suffix(".npz")).exists():
            return {}
        with np.load(stored) as arrays:
            names = dict.fromkeys(name.rpartition("/")[0] for name in arrays.files)
            return {name: (arrays[f"{name}/steps"], arrays[f"{name}/values"]) for name in names}

    def to_json(self) -> dict[str, Any]:
        record = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "path"}
        record["alerts"] = [_short(alert) for alert in self.alerts]
        return as_json(record)  # type: ignore[no-any-return]

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read one result. Raises OSError, ValueError, KeyError or TypeError for an incomplete file."""
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it holds no object")
        known = {item.name for item in fields(cls)}
        record = {name: value for name, value in record.items() if name in known}
        record["alerts"] = [Alert.from_json(alert) for alert in record["alerts"]]
        record["episodes"] = [(first, end, peak) for first, end, peak in record["episodes"]]
        result = cls(**record, path=path)
        if path.name != result.file_name:
            raise ValueError(f"it is the result of {result.file_name}")
        return result

    @property
    def file_name(self) -> str:
        return f"{self.arm}-{self.seed}.json"


def _short(alert: Alert) -> dict[str, Any]:
    """Return the alert without its advice, and with evidence to four digits, for the result file.

    The advice follows from the rest, and short files suit version control.
    """
    record = alert.to_json()
    record["advice"] = []
    record["evidence"] = {
        name: {
            key: float(f"{number:.4g}") if isinstance(number, float) else number
            for key, number in item.items()
            if number is not None
        }
        for name, item in record["evidence"].items()
        if item["value"] is not None
    }
    return record


class Results:
    """Hold the results of one preset of one study; ``results["arm"]`` returns its runs by seed."""

    def __init__(self, runs: Iterable[Result], problems: Iterable[str] = ()) -> None:
        self.problems = list(problems)
        """What was left out and why, one line each."""
        self._by_arm: dict[str, list[Result]] = defaultdict(list)
        for run in sorted(_paired(list(runs), self.problems), key=lambda run: run.seed):
            self._by_arm[run.arm].append(run)

    @classmethod
    def load(cls, directory: Path) -> Results:
        """Load all results in the directory of a preset; none if it does not exist."""
        runs, problems = [], []
        for path in sorted(directory.glob("*.json")):
            try:
                runs.append(Result.read(path))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                problems.append(f"{path.name} is not a whole result and was left out ({_what(error)})")
        return cls(runs, problems)

    def __getitem__(self, arm: str) -> list[Result]:
        if not self._by_arm.get(arm):
            raise NotTested(f"no result of arm {arm}")
        return self._by_arm[arm]

    def __contains__(self, arm: object) -> bool:
        return arm in self._by_arm

    def __iter__(self) -> Iterator[Result]:
        for runs in self._by_arm.values():
            yield from runs

    def __len__(self) -> int:
        return sum(len(runs) for runs in self._by_arm.values())

    def arms(self) -> list[str]:
        return list(self._by_arm)

    def pairs(self, one: str, other: str) -> list[tuple[Result, Result]]:
        """Return the runs of two arms with the same seed."""
        others = {run.seed: run for run in self[other]}
        found = [(run, others[run.seed]) for run in self[one] if run.seed in others]
        if not found:
            raise NotTested(f"no seed of both {one} and {other}")
        return found


def _what(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _paired(runs: list[Result], problems: list[str]) -> list[Result]:
    """Return the runs whose data and initial weights equal their pair's, tensor by tensor.

    The reference is what most of a pair's runs have. An arm may add tensors of its own or lack some.
    """
    kept = []
    votes: dict[tuple[str, int, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for run in runs:
        for name, digest in _began(run).items():
            votes[run.pair, run.seed, name][digest] += 1
    for run in runs:
        odd = [
            name
            for name, digest in _began(run).items()
            if votes[run.pair, run.seed, name][digest] < max(votes[run.pair, run.seed, name].values())
        ]
        if odd:
            problems.append(
                f"{run.file_name} did not begin as its pair did and was left out ({odd[0]} differs)"
            )
        else:
            kept.append(run)
    return kept


def _began(run: Result) -> dict[str, str]:
    return {**run.start, **({"the data": run.data} if run.data else {})}


# --- parts of a result --------------------------------------------------------------------------------


def fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """Return name → digest of shape and float32 value; a later cast to float64 does not change it."""
    return {name: digest(value.float()) for name, value in model.state_dict().items()}


def digest(*tensors: Tensor) -> str:
    """Return eight hexadecimal digits that identify the tensors' values."""
    sha = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        sha.update(str(tuple(array.shape)).encode())
        sha.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:8]


def episodes(
    loss: np.ndarray[Any, Any], low: float = Thresholds.spike_low, high: float = Thresholds.spike_high
) -> list[tuple[int, int | None, float]]:
    """Return W. Wu's slingshot intervals (2024, footnote 6) of a loss per step; steps count from 1.

    An interval begins when the loss was below ``low`` and then exceeds ``high``. It ends when the loss is
    below ``low`` again. Each is ``(first step, first step after it, highest loss)``; the second is None if
    the run ends before.
    """
    found: list[tuple[int, int | None, float]] = []
    was_low, start = False, 0
    for step, value in enumerate(loss.tolist(), 1):
        if start and value < low:
            found.append((start, step, float(np.nanmax(loss[start - 1 : step]))))
            start = 0
        elif not start and was_low and value > high:
            start, was_low = step, False
        was_low = was_low or value < low
    if start:
        found.append((start, None, float(np.nanmax(loss[start - 1 :]))))
    return found


# --- files ----------------------------------------------------------------------------------------------


def write(result: Result, directory: Path, series: Mapping[str, Any] | None = None) -> Path:
    """Write ``ARM-SEED.json``, after ``.npz`` beside it if there are series.

    The JSON file is written last: without it there is no result.
    """
    path = directory / result.file_name
    directory.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".npz")
    if series:
        arrays: dict[str, Any] = {}
        for name, (steps, values) in series.items():
            steps, values = thin(np.asarray(steps), np.asarray(values, float), BINS)
            arrays[f"{name}/steps"] = steps.astype(np.int32)
            arrays[f"{name}/values"] = values.astype(np.float32)
        atomically(beside, lambda file: np.savez_compressed(file, **arrays))
    else:
        beside.unlink(missing_ok=True)
    text = json.dumps(result.to_json(), separators=(",", ":"), allow_nan=False)
    atomically(path, lambda file: file.write(_one_key_a_line(text).encode()))
    return path


def _one_key_a_line(text: str) -> str:
    """Return compact JSON with one line per top-level key: small, and changes show in a diff."""
    record = json.loads(text)
    lines = (
        f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'), ensure_ascii=False)}"
        for key, value in record.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def atomically(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write to a temporary name, then rename: an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile's names: only the owner can read those files, and result files are shared.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            fill(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
