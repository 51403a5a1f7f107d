"""The files of a run directory: their names, whether they are there, and what a line of them holds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUN, READINGS, ALERTS = "run.json", "readings.jsonl", "alerts.jsonl"
REPLAYS = "replays.jsonl"  # made by the first replay


class RunDirectoryError(ValueError):
    """A path that holds no readable run; the message says what is there and what to pass instead."""


def check_run(path: str | os.PathLike[str]) -> Path:
    """The path, if a run directory is there. Raises RunDirectoryError that says what is there instead."""
    path = Path(path)
    want = "Pass the directory that was given to Monitor(run_dir=...)."
    if not path.exists():
        raise RunDirectoryError(f"{path} does not exist. {want}")
    if not path.is_dir():
        inside = path.name in (RUN, READINGS, ALERTS, REPLAYS)
        raise RunDirectoryError(
            f"{path} is a file, not a run directory. " + (f"Pass {path.parent}." if inside else want)
        )
    try:
        if _is_run(path):
            return path
        found = sorted(path.iterdir())
        runs = [entry for entry in found if entry.is_dir() and _is_run(entry)]
    except OSError as error:
        raise RunDirectoryError(f"cannot list {path}: {error.strerror}. {want}") from error
    if runs:
        raise RunDirectoryError(
            f"{path} is not itself a run directory but holds {len(runs)}: "
            f"pass one of {', '.join(str(run) for run in runs[:5])}{', ...' if len(runs) > 5 else ''}"
        )
    names = ", ".join(entry.name for entry in found[:5]) + (", ..." if len(found) > 5 else "")
    raise RunDirectoryError(
        f"{path} holds no {RUN} and no {READINGS} (found: {names or 'nothing, it is empty'}). {want}"
    )


def parse_line(line: bytes | str) -> dict[str, Any] | None:
    """One line of a ``.jsonl`` file, or None if it is torn or holds something else than an object."""
    try:
        record = json.loads(line)
    except ValueError:  # also what is no UTF-8: a torn line may end inside a character
        return None
    return record if isinstance(record, dict) else None


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (RUN, READINGS, ALERTS))


def notes_of(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    notes = info.get("notes")
    return [note for note in notes if isinstance(note, dict)] if isinstance(notes, list) else []


def as_int(value: Any, default: int = 0) -> int:
    return value if isinstance(value, int) else default
