"""Compare the answers to a few recorded runs with answers that are kept in the repository.

This is the short form of the regression.  The answers are those of the detector and of the reports.  After a
change that is meant to change them, ``python -m tests.regression golden`` writes the answers anew.  The
readings are those of the proving ground's runs of the same names, rounded to float32 to keep the files
small."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.history import History
from nfi_monitor.report.explain import explain
from nfi_monitor.report.summary import summarize
from nfi_monitor.types import Reading
from tests.regression.dump import plain

HERE = Path(__file__).parent / "recorded"
NAMES = ("float16-loss", "high-lr-early", "lr-kick", "parity-hinge-95", "survives-float64-quick")


def keep(name: str, source: Path, steps: int = 900) -> None:
    """Write the recording ``name`` from the proving ground's file ``source``: its first ``steps`` steps."""
    from dataclasses import asdict

    from tests.benchmarks.detection.generate import load

    run = load(source)
    arrays: dict[str, Any] = {}
    for quantity, (at, values) in run.columns.items():
        kept = at <= steps
        arrays[f"{quantity}/steps"] = at[kept].astype(np.uint16)
        arrays[f"{quantity}/values"] = values[kept].astype(np.float32)
    arrays["context"] = np.array(json.dumps(asdict(run.contexts[-1][1])))
    HERE.mkdir(exist_ok=True)
    np.savez_compressed(HERE / f"{name}.npz", **arrays)


def recorded_readings(name: str) -> tuple[RunContext, list[Reading]]:
    """Return the context and the readings of a recording."""
    values: dict[int, dict[str, float]] = {}
    with np.load(HERE / f"{name}.npz") as stored:
        context = RunContext(**json.loads(str(stored["context"])))
        for key in stored.files:
            quantity, _, part = key.partition("/")
            if part == "values":
                steps = stored[f"{quantity}/steps"].tolist()
                for step, value in zip(steps, stored[key].tolist(), strict=True):
                    values.setdefault(step, {})[quantity] = value
    return context, [Reading(step, values[step]) for step in sorted(values)]


def answers(name: str) -> dict[str, Any]:
    """Return all answers to a recorded run, in plain types."""
    context, readings = recorded_readings(name)
    detector, history = Detector(context=context), History(max_rows=1 << 20)
    phases = [(0, detector.phase)]
    changes: list[Any] = []
    attention: list[str] = []
    for reading in readings:
        judgement = detector.update(reading)
        history.append(reading.step, {**reading.values, **judgement.derived})
        if judgement.phase is not phases[-1][1]:
            phases.append((reading.step, judgement.phase))
        changes += [[reading.step, str(change), alert.to_json()] for change, alert in judgement.changes]
        attention.append(detector.attention.value)
    explained = [explain(alert, history, phases, detector.limits, context) for alert in detector.alerts]
    result: dict[str, Any] = plain(
        {
            "phases": [[step, str(phase)] for step, phase in phases],
            "attention": [[word, len(list(group))] for word, group in groupby(attention)],
            "changes": changes,
            "explained": [explanation.to_json() for explanation in explained],
            "summary": summarize({"tau": context.tau}, history, phases, detector.alerts, []),
        }
    )
    return result


def write() -> None:
    """Write the answers of the present code."""
    for name in NAMES:
        text = json.dumps(answers(name), indent=1, ensure_ascii=False)
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def known(name: str) -> Any:
    """Return the answers that are kept in the repository."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield where two answers differ.

    Numbers may differ by one part in a billion, because processors round differently.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{path}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{path}[{index}]")
    elif isinstance(old, float) and isinstance(new, float):
        if abs(old - new) > 1e-9 * max(abs(old), abs(new)):
            yield f"{path}: {old!r} → {new!r}"
    elif old != new or type(old) is not type(new):
        yield f"{path}: {old!r} → {new!r}"
