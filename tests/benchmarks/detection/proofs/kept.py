"""The cache: one JSON file for each run, and one for each way in which a run was continued.

What a continuation gives does not depend on the detector: after a change of the detector, runs are heard
anew, and only what begins at another step, or applies another action, is continued anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nfi_monitor.types import Thresholds
from tests.benchmarks.detection import generate
from tests.benchmarks.detection.families import Family

CACHE = Path("runs") / "proofs"


@cache
def monitor_key() -> str:
    """Hash of the code that reads, judges and advises."""
    parts = ("capture", "measure", "detect", "engine", "quantities", "ranks", "history", "monitor", "types")
    return generate._hash(*(_files(part) for part in parts), repr(Thresholds()))


def _files(part: str) -> str:
    package = Path(generate.nfi_monitor.__file__).parent
    path = package / f"{part}.py"
    return generate._code(path) if path.exists() else generate._package(part)


@cache
def own_key(*names: str) -> str:
    """Hash of modules of this package."""
    return generate._hash(*(generate._code(Path(__file__).with_name(f"{name}.py")) for name in names))


@cache
def replay_key() -> str:
    """Hash of the code that says what a continued run comes to, whatever the detector says."""
    trials = generate._code(Path(__file__).parents[1] / "experiments" / "trials.py")
    return generate._hash(generate.spike_key(), generate._package("replay"), trials, torch.__version__)


def training_key(family: Family) -> str:
    return generate._hash(generate.family_key(family), own_key("kicks"))


@dataclass(frozen=True)
class Kept:
    """JSON files in a folder."""

    folder: Path

    def read(self, name: str, key: str) -> Any:
        """What was kept; None where there is nothing, or only a part."""
        try:
            return json.loads(self._path(name, key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write(self, name: str, key: str, record: Any) -> Any:
        path = self._path(name, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, allow_nan=False).encode()
        generate._atomically(path, lambda file: file.write(text))
        return json.loads(text)

    def of(self, name: str, key: str, make: Callable[[], Any]) -> Any:
        """What was kept, or else what ``make`` returns, which is kept from now on."""
        found = self.read(name, key)
        return self.write(name, key, make()) if found is None else found

    def _path(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-{key}.json"
