"""Check every record of a run directory, for all that read it: report, tail, figures and a resumed run.

Each kind of record is declared here or by its dataclass.  A record that does not fit its declaration is
skipped and counted (:class:`Skipped`); the others are used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict, TypeVar

from nfi_monitor.quantities import QUANTITIES
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report.run_directory.files import READINGS, RUN
from nfi_monitor.safe_open import open_binary
from nfi_monitor.schema import Between, DamagedRecordError, decode, parse, shown
from nfi_monitor.types import Alert, Note, Phase

Record = TypeVar("Record")
_LAST_BYTES = 1 << 16
LINE_BYTES = 64 << 20
"""Longest line that is read. The longest that the monitor writes are replays, with all their losses."""
STEP = Annotated[int, Between(0, 2**53)]
SESSION = Annotated[int, Between(1, 1e9)]


# --- lines -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Values:
    """Declaration of a line of ``readings.jsonl``; its numbers are checked by :func:`reading_of`."""

    step: STEP
    phase: str
    values: dict[str, Any]
    session: SESSION = 1


class ReadingRecord(NamedTuple):
    """A line of ``readings.jsonl``."""

    step: int
    phase: str
    """The name of the phase. A newer version may write one that this version does not know."""
    values: dict[str, float]
    """The quantities that this version knows."""
    unknown: set[str]
    """The names of the other quantities."""
    session: int


@dataclass(frozen=True)
class AlertRecord:
    """A line of ``alerts.jsonl``."""

    alert: Any
    change: str = ""
    session: SESSION = 1


@dataclass(frozen=True)
class _Session:
    session: SESSION = 1


_SLACK = 1e-3
"""A reading may leave its documented range by this share of it: a newer version may round otherwise."""


def _limits(low: float, high: float) -> tuple[float, float]:
    slack = _SLACK * (high - low) if math.isfinite(high - low) else _SLACK
    return low - slack, high + slack


_RANGES = {name: _limits(*quantity.within) for name, quantity in QUANTITIES.items()}


def reading_of(record: dict[str, Any]) -> ReadingRecord:
    """Return a line of ``readings.jsonl``. Raises DamagedRecordError."""
    line: _Values = decode(_Values, record)
    values: dict[str, float] = {}
    unknown: set[str] = set()
    for name, value in line.values.items():
        limits = _RANGES.get(name)
        if limits is None:
            unknown.add(name)
        elif value is None:
            values[name] = math.nan
        elif type(value) in (float, int) and limits[0] <= value <= limits[1]:
            values[name] = float(value)
        else:
            low, high = QUANTITIES[name].within
            reason = f"expected a number from {low:g} to {high:g}, got {shown(value)}"
            raise DamagedRecordError(reason, f"values.{name}")
    return ReadingRecord(line.step, line.phase, values, unknown, line.session)


def alert_of(record: dict[str, Any]) -> AlertRecord:
    """Return a line of ``alerts.jsonl``; ``alert`` is an Alert. Raises DamagedRecordError."""
    line: AlertRecord = decode(AlertRecord, record)
    try:
        return AlertRecord(Alert.from_json(line.alert), line.change, line.session)
    except DamagedRecordError as error:
        raise error.inside("alert") from None


def replay_of(record: dict[str, Any]) -> tuple[ReplayVerdict, int]:
    """Return a line of ``replays.jsonl`` and its session. Raises DamagedRecordError."""
    return ReplayVerdict.from_json(record), decode(_Session, record).session


def phase_of(name: str) -> Phase | None:
    """Return the phase of this name; None if this version does not know it."""
    return _PHASES.get(name)


_PHASES = {phase.value: phase for phase in Phase}


class Skipped:
    """Count the lines of one file that were skipped, and say so in :meth:`problems`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._torn = self._damaged = 0
        self._torn_last = False
        self._reasons: set[str] = set()
        self._unreadable = ""

    def add(self, error: DamagedRecordError) -> None:
        """Count a line that was skipped because of ``error``."""
        self._torn_last = error.torn
        if error.torn:
            self._torn += 1
        else:
            self._damaged += 1
            if len(self._reasons) < 100:
                self._reasons.add(str(error))

    def used(self) -> None:
        """Say that the last line was used."""
        self._torn_last = False

    def cannot_read(self, error: OSError) -> None:
        """Say that the file itself cannot be read."""
        self._unreadable = f"{self.name}: cannot be read ({error.strerror or error})"

    def problems(self) -> list[str]:
        """Return a sentence for each kind of damage; none if every line was used."""
        said = [self._unreadable] if self._unreadable else []
        if self._torn:
            last = self._torn_last
            where = " (last)" if last and self._torn == 1 else " (including the last)" if last else ""
            said.append(f"{self.name}: skipped {_lines(self._torn, 'torn')}{where}")
        if self._damaged:
            said.append(
                f"{self.name}: skipped {_lines(self._damaged, 'damaged')}, or of a version that this one "
                f"cannot read: {some(self._reasons)}"
            )
        return said


def _lines(count: int, how: str) -> str:
    return f"{count:,} {how} {'line' if count == 1 else 'lines'}"


def some(items: set[str]) -> str:
    """Return up to five of the items, and the number of the others."""
    return "; ".join(sorted(items)[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def record_of(
    line: bytes, make: Callable[[dict[str, Any]], Record], skipped: Skipped | None = None
) -> Record | None:
    """Return the record in a line, or None, counted in ``skipped``, if it is damaged."""
    try:
        record = make(parse(line))
    except DamagedRecordError as error:
        if skipped is not None:
            skipped.add(error)
        return None
    if skipped is not None:
        skipped.used()
    return record


def records_of(path: Path, make: Callable[[dict[str, Any]], Record], problems: list[str]) -> Iterator[Record]:
    """Yield the good records of a file of lines, and then add its ``problems``. No file: no records."""
    skipped = Skipped(path.name)
    for line in lines_of(path, skipped):
        record = record_of(line, make, skipped)
        if record is not None:
            yield record
    problems += skipped.problems()


def lines_of(path: Path, skipped: Skipped | None = None) -> Iterator[bytes]:
    """Yield the lines of a file that are not empty; none if the file is missing or cannot be read."""
    try:
        with open_binary(path) as file:
            while line := file.readline(LINE_BYTES):
                if line.strip():
                    yield line
    except FileNotFoundError:
        return
    except OSError as error:
        if skipped is not None:
            skipped.cannot_read(error)


# --- run.json --------------------------------------------------------------------------------------


class _Overhead(TypedDict, total=False):
    seconds: float
    share: float | None
    measured_steps: int


class _Info(TypedDict, total=False):
    """Declaration of ``run.json``. Every key may be missing, and a newer version may have others."""

    nfi_monitor: str
    torch: str
    model: str | None
    parameters: int | None
    dtype: str | None
    optimizer: dict[str, Any] | str | None
    level: str | None
    tau: Annotated[float, Between(1, 1e12)] | None
    every: int | str | None
    interval: int | None
    thresholds: dict[str, float] | None
    steps: int | None
    absorbing_classes: list[tuple[float | str, float]] | None
    notes: list[Any] | None
    overhead: _Overhead | None
    run_dir: str | None
    session: SESSION


INFO_BYTES = 32 << 20
"""Size of the largest ``run.json`` that is read."""


def read_info(path: Path, problems: list[str]) -> dict[str, Any]:
    """Return the content of the ``run.json`` in directory ``path``, without its damaged fields and notes.

    Returns an empty dict, and says so in ``problems``, if the file is missing or damaged.
    """
    try:
        with open_binary(path / RUN) as file:
            text = file.read(INFO_BYTES + 1)  # more would take the memory that the training needs
        if len(text) > INFO_BYTES:
            raise DamagedRecordError(f"it has more than {INFO_BYTES >> 20} MiB")
        info = parse(text)
    except FileNotFoundError:
        problems.append(f"{RUN}: missing, so the head, the optimizer and the thresholds are unknown")
        return {}
    except OSError as error:
        problems.append(f"{RUN}: cannot be read ({error.strerror or error})")
        return {}
    except DamagedRecordError as error:
        problems.append(f"{RUN}: cannot be read ({error})")
        return {}
    return checked_info(info, problems)


def checked_info(info: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return ``info`` without the fields and notes that are damaged; say in ``problems`` which these are."""
    wrong: set[str] = set()
    good = {}
    for name, value in info.items():
        try:
            decode(_Info, {name: value})
        except DamagedRecordError as error:
            wrong.add(str(error))
        else:
            good[name] = value
    notes = []
    for index, note in enumerate(good.get("notes") or []):
        try:
            decode(Note, note)
        except DamagedRecordError as error:
            wrong.add(str(error.inside(index).inside("notes")))
        else:
            notes.append(note)
    if "notes" in good:
        good["notes"] = notes
    if wrong:
        problems.append(f"{RUN}: skipped {len(wrong):,} damaged values: {some(wrong)}")
    return good


def notes_of(info: dict[str, Any]) -> list[Note]:
    """Return the notes in the content of a ``run.json`` that was checked."""
    return [decode(Note, note) for note in info.get("notes") or []]


def last_session(path: Path) -> int:
    """Return the highest session in the last readings of directory ``path``; 0 if there are no readings."""
    try:
        with open_binary(path / READINGS) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    records = (record_of(line, reading_of) for line in lines)
    return max((record.session for record in records if record is not None), default=0)
