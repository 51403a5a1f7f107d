"""One cached file a job, all merged into ``CACHE/experiments.json``.

An interrupted command goes on where it was; a changed detector, replay or run does its jobs anew.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import nfi_monitor
from tests.benchmarks.detection import generate
from tests.benchmarks.detection.experiments import cadence, plan, trials
from tests.benchmarks.detection.families import Family

LISTS = ("events", "at_risk", "cadence", "differs")
KINDS = ("trials", "cadence")


@dataclass(frozen=True)
class Job:
    """One thing to do on one recorded run; made to be sent to a worker."""

    kind: str  # one of KINDS
    family: Family
    seed: int
    run: Path
    most: int = 3
    budget: float = 30.0

    @property
    def cached(self) -> Path:
        options, alarms = "", generate.alarms_key()
        if self.kind == "trials":
            # What is tried begins at alarms: a detector that gives the same ones tries the same.
            options, alarms = f"{self.most},{self.budget}", self._alarms()
        key = generate._hash(
            self.run.name, self.kind, code_key(self.kind), alarms, torch.__version__, options
        )
        return self._beside(self.kind, key)

    def _beside(self, kind: str, key: str) -> Path:
        return self.run.parent / "experiments" / f"{kind}-{self.run.stem}-{key}.json"

    def _alarms(self) -> str:
        """Hash of what a plan is made from; kept, because it takes a replay of the detector."""
        family = self.family
        about = repr((family.quiet, family.mechanism, self.run.name))
        key = generate._hash(generate.detector_key(), code_key("trials"), about)
        kept = self._beside("alarms", key)
        try:
            return str(json.loads(kept.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            pass
        digest = generate._hash(about, repr(plan.material(family, generate.load(self.run))))
        kept.parent.mkdir(parents=True, exist_ok=True)
        generate._atomically(kept, lambda file: file.write(json.dumps(digest).encode()))
        return digest

    @property
    def result(self) -> dict[str, Any] | None:
        """What a job did before; None where it has to be done."""
        try:
            found: dict[str, Any] = json.loads(self.cached.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    @property
    def weight(self) -> float:
        """Seconds it may take, for the order only: what is longest begins first."""
        info = json.loads(self.run.read_text(encoding="utf-8"))
        seconds = float(info["info"].get("seconds", 0.0))
        if self.kind == "cadence":
            return seconds
        tau = 1.0 / (1.0 - float(info["contexts"][-1][1]["beta2"]))
        return seconds + min(300.0 * tau * seconds / info["steps"], self.budget)

    def do(self) -> dict[str, Any]:
        """Do it and keep the result."""
        run = generate.load(self.run)
        if self.kind == "cadence":
            result = cadence.compare(self.family, self.seed, run)
        else:
            planned = plan.plan_of(self.family, run, most=self.most)
            if planned.snapshots:
                affordable = self.budget / trials.seconds_per_step(self.family, self.seed)
                if planned.cost > affordable:
                    planned = plan.plan_of(self.family, run, most=self.most, affordable=affordable)
            result = trials.carry_out(self.family, self.seed, run, planned)
        self.cached.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, allow_nan=False).encode()
        generate._atomically(self.cached, lambda file: file.write(text))
        return result


@cache
def code_key(kind: str) -> str:
    """Hash of the code that the result of a job depends on besides the detector."""
    here, package = Path(__file__).parent, Path(nfi_monitor.__file__).parent
    used = {
        "trials": [
            here / "plan.py",
            here / "trials.py",
            *sorted((package / "replay").glob("*.py")),
            package / "capture" / "head.py",
        ],
        "cadence": [
            here / "cadence.py",
            package / "monitor.py",
            *sorted((package / "engine").glob("*.py")),
        ],
    }[kind]
    readings = generate.readings_key() if kind == "cadence" else ""
    score = generate._code(here.parent / "score.py")
    return generate._hash(readings, score, *map(generate._code, used))


def current_code() -> dict[str, str]:
    """Kind of job → hash of all the code that its results depend on."""
    return {kind: generate._hash(generate.alarms_key(), code_key(kind)) for kind in KINDS}


def merge(
    results: Iterable[tuple[Job, dict[str, Any]]], path: Path, kinds: Iterable[str] = KINDS
) -> dict[str, Any]:
    """Write ``path`` anew. Other runs' records stay in it if the same code made them; those of ``kinds`` that
    were not done this time stay whatever made them, with their date and the hash of that code."""
    results = list(results)
    done = {(job.kind, job.family.name, job.seed) for job, _ in results}
    merged: dict[str, Any] = {name: [] for name in LISTS}
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        old = {}
    keys, was = current_code(), old.get("code", {})
    dates = old.get("dates", dict.fromkeys(KINDS, old.get("date", "")))
    for name in LISTS:
        for record in old.get(name, []):
            kind = _kind(name, record)
            stays = kind not in kinds or was.get(kind) == keys[kind]
            if stays and (kind, record["family"], record["seed"]) not in done:
                merged[name].append(record)
    for job, result in results:
        for name in LISTS:
            merged[name] += result.get(name, [])
        if result["differs_at"] is not None:
            where = {"family": job.family.name, "seed": job.seed, "step": result["differs_at"]}
            merged["differs"].append({**where, "kind": job.kind})
    for name in LISTS:
        merged[name].sort(key=lambda record: (record["family"], record["seed"]))  # stable within a run
    today = datetime.date.today().isoformat()
    merged |= {
        "code": {kind: keys[kind] if kind in kinds else was.get(kind, "") for kind in KINDS},
        "versions": generate.versions(),
        "dates": {kind: today if kind in kinds else dates.get(kind, "") for kind in KINDS},
    }
    text = json.dumps(merged, indent=1, allow_nan=False).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    generate._atomically(path, lambda file: file.write(text))
    return merged


def _kind(name: str, record: dict[str, Any]) -> str:
    """Which kind of job wrote a record."""
    if name == "differs":
        return str(record["kind"])
    return "cadence" if name == "cadence" else "trials"
