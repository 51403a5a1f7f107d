"""Name the files of a run directory, check that they exist, and parse one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nfi_monitor.schema import DamagedRecordError, parse

RUN, READINGS, ALERTS = "run.json", "readings.jsonl", "alerts.jsonl"
REPLAYS = "replays.jsonl"  # made by the first replay


class RunDirectoryError(ValueError):
    """Raised for a path without a readable run; the message says what is there and what to pass instead."""


def check_run(path: str | os.PathLike[str]) -> Path:
    """Return the path if it is a run directory. Raises RunDirectoryError that says what is there instead."""
    path = Path(path)
    want = "Pass the directory that you gave to Monitor(run_dir=...)."
    try:
        if not path.exists():
            raise RunDirectoryError(f"{path} does not exist. {want}")
        if not path.is_dir():
            inside = path.name in (RUN, READINGS, ALERTS, REPLAYS)
            raise RunDirectoryError(
                f"{path} is a file, not a run directory. " + (f"Pass {path.parent}." if inside else want)
            )
        if _is_run(path):
            return path
        found = sorted(path.iterdir())
        runs = [entry for entry in found if entry.is_dir() and _is_run(entry)]
    except OSError as error:
        raise RunDirectoryError(f"cannot list {path}: {error.strerror}. {want}") from error
    if runs:
        raise RunDirectoryError(
            f"{path} is not a run directory, but contains {len(runs)}: "
            f"pass one of {', '.join(str(run) for run in runs[:5])}{', ...' if len(runs) > 5 else ''}"
        )
    names = ", ".join(entry.name for entry in found[:5]) + (", ..." if len(found) > 5 else "")
    raise RunDirectoryError(
        f"{path} contains no {RUN} and no {READINGS} (found: {names or 'nothing, it is empty'}). {want}"
    )


def parse_line(line: bytes | str) -> dict[str, Any] | None:
    """Parse one line of a ``.jsonl`` file. Return None if the line is torn or is not a JSON object."""
    try:
        return parse(line)
    except DamagedRecordError:
        return None


def _is_run(path: Path) -> bool:
    return any((path / name).exists() or (path / name).is_symlink() for name in (RUN, READINGS, ALERTS))
