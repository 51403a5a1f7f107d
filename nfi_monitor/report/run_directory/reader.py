"""Read a run directory, also of a run that still trains or was killed."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from nfi_monitor.history import History
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report.run_directory.files import ALERTS, READINGS, REPLAYS, check_run
from nfi_monitor.report.run_directory.records import (
    alert_of,
    lines_of,
    notes_of,
    phase_of,
    read_info,
    reading_of,
    record_of,
    records_of,
    replay_of,
    some,
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

    Torn and damaged lines, and those of a newer version that cannot be read, are skipped and counted in
    ``problems``; so are links, FIFOs and all else that is no regular file.  If the run was resumed from an
    earlier step, the later readings of the same steps replace the earlier ones.  Raises
    RunDirectoryError if the path is not a run directory.
    """
    path = check_run(path)
    problems: list[str] = []
    info = read_info(path, problems)
    resumes = _Resumes(path / READINGS)
    history, phases = _read_readings(path / READINGS, resumes, problems)
    alerts = _read_alerts(path / ALERTS, resumes, problems)
    replays = [
        verdict
        for verdict, session in records_of(path / REPLAYS, replay_of, problems)
        if not resumes.replaced(verdict.snapshot_step, session)
    ]
    return RunRecord(info, history, phases, alerts, notes_of(info), problems, replays)


# The writer puts the step first and the session last: the first pass does not parse the numbers between them.
_EDGES = re.compile(rb'\{"step": (\d{1,16}),.*\}, "session": (\d{1,9})\}\s*', re.DOTALL)


class _Resumes:
    """Know from which steps on the readings of a session were replaced by those of later sessions."""

    def __init__(self, path: Path) -> None:
        first: dict[int, int] = {}  # session → its first step, for all sessions but the first
        for line in lines_of(path):  # the second pass collects the problems
            match = _EDGES.fullmatch(line)
            if match is None:
                continue
            session, step = int(match[2]), int(match[1])
            # A damaged line must not hide the good ones: parse each that would be the session's first.
            if step < first.get(session, step + 1) and record_of(line, reading_of) is not None:
                first[session] = step
        self._sessions = sorted(first)
        # The first step of this session and all later ones; after the last session no step is replaced.
        lowest = list(accumulate((first[session] for session in reversed(self._sessions)), min))
        self._cuts = [*reversed(lowest), math.inf]

    def replaced(self, step: int, session: int) -> bool:
        """Return whether a later session began at this step or before it, and so measured it again."""
        return step >= self._cuts[bisect_right(self._sessions, session)]


def _read_readings(
    path: Path, resumes: _Resumes, problems: list[str]
) -> tuple[History, list[tuple[int, Phase]]]:
    history = History()
    phases = [(0, Phase.HEALTHY)]  # as the monitor keeps them
    replaced = 0
    strange_names: set[str] = set()
    strange_phases: set[str] = set()
    for record in records_of(path, reading_of, problems):
        if resumes.replaced(record.step, record.session):
            replaced += 1
            continue
        strange_names |= record.unknown
        history.append(record.step, record.values)
        phase = phase_of(record.phase)
        if phase is None:
            strange_phases.add(record.phase)
        elif phases[-1][1] is not phase:
            phases.append((record.step, phase))
    if replaced:
        problems.append(
            f"{path.name}: the run was resumed from an earlier step; {replaced} "
            f"{'reading was' if replaced == 1 else 'readings were'} replaced by newer ones of the same steps"
        )
    if strange_names:
        problems.append(
            f"{path.name}: skipped quantities that this version does not know: {some(strange_names)}"
        )
    if strange_phases:
        problems.append(
            f"{path.name}: skipped phases that this version does not know: {some(strange_phases)}"
        )
    return history, phases


def _read_alerts(path: Path, resumes: _Resumes, problems: list[str]) -> list[Alert]:
    # The id alone is no key: a run that was resumed without the monitor's state numbers alerts from 1 again.
    alerts: dict[tuple[str, int], Alert] = {}
    for record in records_of(path, alert_of, problems):
        alert: Alert = record.alert
        # By its last step: if the run went back into an alert, the later part of that alert was undone.
        if not resumes.replaced(alert.last_step, record.session):
            alerts[alert.id, alert.first_step] = alert
    # sorted() is stable: alerts that began at the same step stay in the order they were written.
    return sorted(alerts.values(), key=lambda alert: alert.first_step)
