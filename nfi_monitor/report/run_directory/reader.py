"""Read a run directory, also of a run that still trains or was killed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nfi_monitor.history import History
from nfi_monitor.quantities import QUANTITIES
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report.run_directory.files import (
    ALERTS,
    READINGS,
    REPLAYS,
    RUN,
    as_int,
    check_run,
    notes_of,
    parse_line,
)
from nfi_monitor.types import Alert, Note, Phase


@dataclass(frozen=True)
class RunRecord:
    """A run as read from its directory."""

    info: dict[str, Any]
    """The content of ``run.json``; empty if it is missing."""
    history: History
    phases: list[tuple[int, Phase]]
    """Changes of phase as (optimizer step, new phase); the first is (0, HEALTHY)."""
    alerts: list[Alert]
    """The last state of each alert, oldest first."""
    notes: list[Note]
    problems: list[str] = field(default_factory=list)
    """One sentence for each thing that could not be read, with the file's name."""
    replays: list[ReplayVerdict] = field(default_factory=list)
    """Verdicts of replays, in the order they were made."""


def read_run(path: str | os.PathLike[str]) -> RunRecord:
    """Read a run directory, also of a run that still trains or was killed.

    Torn lines, and those of a newer version that cannot be read, are skipped and listed in ``problems``.  If
    the run was resumed from an earlier step, the later readings of the same steps replace the earlier ones.
    Raises RunDirectoryError if the path is not a run directory.
    """
    path = check_run(path)
    problems: list[str] = []
    info = _read_info(path, problems)
    resumed_at = _resumed_at(path / READINGS)
    history, phases = _read_readings(path / READINGS, resumed_at, problems)
    alerts = _read_alerts(path / ALERTS, resumed_at, problems)
    replays = _read_replays(path / REPLAYS, resumed_at, problems)
    notes = [
        Note(str(note.get("code", "")), str(note.get("message", "")), as_int(note.get("step")))
        for note in notes_of(info)
    ]
    return RunRecord(info, history, phases, alerts, notes, problems, replays)


def _read_info(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        info = json.loads((path / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{RUN}: missing, so the head, the optimizer and the thresholds are unknown")
    except (OSError, ValueError) as error:
        problems.append(f"{RUN}: cannot be read ({error})")
    else:
        if isinstance(info, dict):
            return info
        problems.append(f"{RUN}: is not a JSON object")
    return {}


def _lines(path: Path, problems: list[str]) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from (line for line in file if line.strip())
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror})")


# The writer puts the step first and the session last: the first pass does not parse the numbers between them.
_EDGES = re.compile(rb'\{"step": (-?\d+),.*\}(?:, "session": (\d+))?\}\s*')


def _resumed_at(path: Path) -> dict[int, int]:
    """Return {session: its first step} for all sessions but the first."""
    first: dict[int, int] = {}
    for line in _lines(path, []):  # the second pass collects the problems
        match = _EDGES.fullmatch(line)
        if match and match[2]:
            session, step = int(match[2]), int(match[1])
            first[session] = min(step, first.get(session, step))
    return first


def _replaced(step: int, session: int, resumed_at: Mapping[int, int]) -> bool:
    """Return whether a later session began at this step or before it, and so measured it again."""
    return any(later > session and first <= step for later, first in resumed_at.items())


def _read_readings(
    path: Path, resumed_at: Mapping[int, int], problems: list[str]
) -> tuple[History, list[tuple[int, Phase]]]:
    history = History()
    phases = [(0, Phase.HEALTHY)]  # as the monitor keeps them
    torn, torn_last, replaced = 0, False, 0
    strange_names: set[str] = set()
    strange_phases: set[str] = set()
    for line in _lines(path, problems):
        record = parse_line(line) or {}
        step, values = record.get("step"), record.get("values")
        torn_last = not (isinstance(step, int) and isinstance(values, dict))
        if not isinstance(step, int) or not isinstance(values, dict):
            torn += 1
            continue
        if _replaced(step, as_int(record.get("session"), 1), resumed_at):
            replaced += 1
            continue
        strange_names |= values.keys() - QUANTITIES.keys()
        history.append(step, {name: _as_float(x) for name, x in values.items() if name in QUANTITIES})
        try:
            phase = Phase(record.get("phase"))
        except ValueError:
            strange_phases.add(str(record.get("phase")))
            continue
        if phases[-1][1] is not phase:
            phases.append((step, phase))
    if torn:
        problems.append(_torn(path.name, torn, torn_last))
    if replaced:
        problems.append(
            f"{path.name}: the run was resumed from an earlier step; {replaced} "
            f"{'reading was' if replaced == 1 else 'readings were'} replaced by newer ones of the same steps"
        )
    if strange_names:
        problems.append(
            f"{path.name}: skipped quantities that this version does not know: {_some(strange_names)}"
        )
    if strange_phases:
        problems.append(
            f"{path.name}: skipped phases that this version does not know: {_some(strange_phases)}"
        )
    return history, phases


def _read_alerts(path: Path, resumed_at: Mapping[int, int], problems: list[str]) -> list[Alert]:
    # The id alone is no key: a run that was resumed without the monitor's state numbers alerts from 1 again.
    alerts: dict[tuple[str, int], Alert] = {}
    torn, torn_last, strange = 0, False, set[str]()
    for line in _lines(path, problems):
        record = parse_line(line) or {}
        torn_last = not isinstance(record.get("alert"), dict)
        if torn_last:
            torn += 1
            continue
        try:
            alert = Alert.from_json(record["alert"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            strange.add(str(error))
            continue
        # By its last step: if the run went back into an alert, the later part of that alert was undone.
        if not _replaced(alert.last_step, as_int(record.get("session"), 1), resumed_at):
            alerts[alert.id, alert.first_step] = alert
    if torn:
        problems.append(_torn(path.name, torn, torn_last))
    if strange:
        problems.append(f"{path.name}: skipped alerts that this version cannot read: {_some(strange)}")
    # sorted() is stable: alerts that began at the same step stay in the order they were written.
    return sorted(alerts.values(), key=lambda alert: alert.first_step)


def _read_replays(path: Path, resumed_at: Mapping[int, int], problems: list[str]) -> list[ReplayVerdict]:
    verdicts: list[ReplayVerdict] = []
    torn, torn_last, strange = 0, False, set[str]()
    for line in _lines(path, problems):
        record = parse_line(line)
        torn_last = record is None
        if record is None:
            torn += 1
            continue
        try:
            verdict = ReplayVerdict.from_json(record)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            strange.add(str(error))
            continue
        if not _replaced(verdict.snapshot_step, as_int(record.get("session"), 1), resumed_at):
            verdicts.append(verdict)
    if torn:
        problems.append(_torn(path.name, torn, torn_last))
    if strange:
        problems.append(f"{path.name}: skipped replays that this version cannot read: {_some(strange)}")
    return verdicts


def _torn(name: str, count: int, last: bool) -> str:
    where = " (last)" if last and count == 1 else " (including the last)" if last else ""
    return f"{name}: skipped {count} torn {'line' if count == 1 else 'lines'}{where}"


def _some(items: set[str]) -> str:
    return ", ".join(sorted(items)[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _as_float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
