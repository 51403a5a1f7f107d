"""The run directory: ``run.json``, ``readings.jsonl``, ``alerts.jsonl``, ``replays.jsonl``, written and read.

Each line is one ``os.write`` of a complete line on a descriptor opened with ``O_APPEND``: no buffer
that a ``kill -9`` could swallow.  At worst the last line is torn; the reader skips it and says so, and a
resumed run starts on a fresh line.  ``run.json`` changes rarely and is replaced atomically.  One process
writes (:mod:`nfi_monitor.report.lock`); ``readings.jsonl`` keeps to a budget
(:mod:`nfi_monitor.report.thinning`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfi_monitor.detect.causal import ReplayVerdict
from nfi_monitor.history import History
from nfi_monitor.quantities import QUANTITIES
from nfi_monitor.replacing import remove_leftovers, replacing
from nfi_monitor.report.lock import DirectoryInUseError, DirectoryLock
from nfi_monitor.report.plain import json_line, plain
from nfi_monitor.report.thinning import READINGS_BYTES, thin
from nfi_monitor.types import Alert, Change, Note, Phase, Reading, finite_or_none

if TYPE_CHECKING:
    from nfi_monitor.report.summary import Summary

RUN, READINGS, ALERTS = "run.json", "readings.jsonl", "alerts.jsonl"
REPLAYS = "replays.jsonl"  # made by the first replay
LOOK_SECONDS = 1.0
"""Between two looks whether the file is still there: a look makes a network file system flush it."""


class RunDirectoryError(ValueError):
    """A path that holds no readable run; the message says what is there and what to pass instead."""


# --- writing ----------------------------------------------------------------------------------------


class RunDirectory:
    """A sink that writes a run into a directory (created at :meth:`start`, with its parents).

    Starting in a directory that already holds a run appends to it: a resumed run is one run.  From
    ``readings_bytes`` on, old readings are thinned.  Raises OSError, with the path and what to do, where the
    directory cannot be made or a line not written, and DirectoryInUseError where another process writes to
    it.  What has raised is closed: nothing is written after a gap.
    """

    def __init__(self, path: str | os.PathLike[str], *, readings_bytes: int = READINGS_BYTES) -> None:
        self.path = Path(path)
        self._lock = DirectoryLock(path)
        self._budget = readings_bytes
        self._thin_at = readings_bytes
        self._size = 0  # of the readings
        self._linked = False  # whether this file system counts links
        self._looked = -math.inf
        self._info: dict[str, Any] = {}
        self._notes: list[dict[str, Any]] = []
        self._files: dict[str, int] = {}
        self._session: dict[str, int] = {}  # {"session": 2} in each line after a resume

    def start(self, info: Mapping[str, Any]) -> None:
        with self._explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            for name in (RUN, READINGS):
                remove_leftovers(self.path / name)
        previous = self._previous_info()
        self._notes = _notes_of(previous)
        if previous or (self.path / READINGS).exists():
            self._session = {"session": _as_int(previous.get("session"), 1) + 1}
        for name in (READINGS, ALERTS):
            with self._explained(self.path / name):
                self._files[name] = _open_for_lines(self.path / name)
        opened = os.fstat(self._files[READINGS])
        self._size, self._linked = opened.st_size, opened.st_nlink > 0
        self._write_info(info)

    def reading(self, reading: Reading, phase: Phase) -> None:
        values = {name: finite_or_none(value) for name, value in reading.values.items()}
        record = {"step": reading.step, "phase": str(phase), "values": values, **self._session}
        # Names and numbers of our own: nothing in them has to be spelled out as in an alert.
        self._size += self._append(READINGS, (json.dumps(record, allow_nan=False) + "\n").encode())
        if self._size >= self._thin_at:
            self._thin()

    def alert(self, alert: Alert, change: Change) -> None:
        self._append(ALERTS, json_line({"change": str(change), "alert": alert.to_json(), **self._session}))

    def note(self, note: Note) -> None:
        self._write_info(self._info, [asdict(note)])

    def replay(self, verdict: ReplayVerdict) -> None:
        if self._files and REPLAYS not in self._files:
            with self._explained(self.path / REPLAYS):
                self._files[REPLAYS] = _open_for_lines(self.path / REPLAYS)
        self._append(REPLAYS, json_line({**verdict.to_json(), **self._session}))

    def went_back(self) -> None:
        """What is measured again replaces what was measured first, as in a run that is resumed."""
        self._session = {"session": self._session.get("session", 1) + 1}
        self._write_info(self._info)

    def close(self, info: Mapping[str, Any], summary: Summary) -> None:
        try:
            self._write_info(info)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        files, self._files = self._files, {}
        for descriptor in files.values():
            with contextlib.suppress(OSError):  # a network file system may complain of what it wrote before
                os.close(descriptor)
        self._lock.release()

    def _append(self, name: str, line: bytes) -> int:
        """Write a line; returns its length in bytes."""
        if name not in self._files:
            raise OSError(f"{self.path / name} is not open: call start() first, and nothing after close().")
        rest = line
        with self._explained(self.path / name):
            now = time.monotonic()
            if self._linked and now - self._looked >= LOOK_SECONDS:
                self._looked = now
                if (
                    os.fstat(self._files[name]).st_nlink == 0
                ):  # written on, it would be a file nobody can open
                    raise FileNotFoundError(errno.ENOENT, "it was removed while the run went on")
            while rest:  # a full disk may take a part of a line before it says no
                rest = rest[os.write(self._files[name], rest) :]
        return len(line)

    def _thin(self) -> None:
        # No room for the copy beside it is no reason to stop: the file stays as it is for now.
        with contextlib.suppress(OSError):
            thin(self.path / READINGS)
        with self._explained(self.path / READINGS):
            old, self._files[READINGS] = self._files[READINGS], _open_for_lines(self.path / READINGS)
            os.close(old)
            self._size = os.fstat(self._files[READINGS]).st_size
        # Where little could go, the next pass waits until it is worth its while.
        self._thin_at = max(self._budget, self._size + self._budget // 8)

    def _write_info(self, info: Mapping[str, Any], notes: list[dict[str, Any]] | None = None) -> None:
        """Replace run.json; notes are the union of all that were ever said, in their order."""
        for note in [*_notes_of(plain(info)), *(notes or [])]:
            if note not in self._notes:
                self._notes.append(note)
        self._info = {**plain(info), **self._session, "notes": self._notes}
        target = self.path / RUN
        with self._explained(target), replacing(target) as file:
            file.write(json_line(self._info, indent=2))

    def _previous_info(self) -> dict[str, Any]:
        """What an earlier run left here; an unreadable run.json is about to be replaced anyway."""
        try:
            info = json.loads((self.path / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return info if isinstance(info, dict) else {}

    @contextlib.contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        """Re-raise an OSError of the same errno whose message says what to do; and write no more."""
        try:
            yield
        except DirectoryInUseError:
            raise
        except OSError as error:
            self._let_go()
            reason = error.strerror or str(error)
            raise OSError(
                error.errno,
                f"cannot write {path}: {reason}. Readings and alerts from here on are not on disk. "
                "Free space or pass run_dir= a directory you can write to; the training goes on.",
            ) from error


def _open_for_lines(path: Path) -> int:
    """A descriptor that appends, at the start of a line even if the last writer was killed in one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        if os.fstat(descriptor).st_size:
            with open(path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    os.write(descriptor, b"\n")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


# --- reading ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunRecord:
    """A run as read back from its directory."""

    info: dict[str, Any]
    """What ``run.json`` holds; empty if it is missing."""
    history: History
    phases: list[tuple[int, Phase]]
    """(optimizer step, phase entered there); changes only, the first is (0, HEALTHY)."""
    alerts: list[Alert]
    """The last state of each alert, oldest first."""
    notes: list[Note]
    problems: list[str] = field(default_factory=list)
    """What could not be read, each a sentence with the file's name."""
    replays: list[ReplayVerdict] = field(default_factory=list)
    """Verdicts of replays, in the order they were made."""


def read_run(path: str | os.PathLike[str]) -> RunRecord:
    """Read a run directory back, also one that is still being written or was killed.

    What is torn, or comes from a newer version, is skipped and listed in ``problems``.  Where a run
    was resumed from an earlier step, what was measured again replaces what was measured first.
    Raises RunDirectoryError for a path that is no run directory.
    """
    path = check_run(path)
    problems: list[str] = []
    info = _read_info(path, problems)
    resumed_at = _resumed_at(path / READINGS)
    history, phases = _read_readings(path / READINGS, resumed_at, problems)
    alerts = _read_alerts(path / ALERTS, resumed_at, problems)
    replays = _read_replays(path / REPLAYS, resumed_at, problems)
    notes = [
        Note(str(note.get("code", "")), str(note.get("message", "")), _as_int(note.get("step")))
        for note in _notes_of(info)
    ]
    return RunRecord(info, history, phases, alerts, notes, problems, replays)


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


def _notes_of(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    notes = info.get("notes")
    return [note for note in notes if isinstance(note, dict)] if isinstance(notes, list) else []


def _as_int(value: Any, default: int = 0) -> int:
    return value if isinstance(value, int) else default


def _read_info(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        info = json.loads((path / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{RUN}: missing, so the head, the optimizer and the thresholds are not known")
    except (OSError, ValueError) as error:
        problems.append(f"{RUN}: cannot be read ({error})")
    else:
        if isinstance(info, dict):
            return info
        problems.append(f"{RUN}: holds no object")
    return {}


def _lines(path: Path, problems: list[str]) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from (line for line in file if line.strip())
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror})")


# The writer puts the step first and the session last, so the first pass need not parse forty numbers.
_EDGES = re.compile(rb'\{"step": (-?\d+),.*\}(?:, "session": (\d+))?\}\s*')


def _resumed_at(path: Path) -> dict[int, int]:
    """Session → its first step, for the sessions after the first one."""
    first: dict[int, int] = {}
    for line in _lines(path, []):  # the second pass says what cannot be read
        match = _EDGES.fullmatch(line)
        if match and match[2]:
            session, step = int(match[2]), int(match[1])
            first[session] = min(step, first.get(session, step))
    return first


def _replaced(step: int, session: int, resumed_at: Mapping[int, int]) -> bool:
    """Whether a later session went back to this step or before it, and so did it again."""
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
        if _replaced(step, _as_int(record.get("session"), 1), resumed_at):
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
            f"{'reading was' if replaced == 1 else 'readings were'} replaced by what was measured again"
        )
    if strange_names:
        problems.append(f"{path.name}: skipped quantities this version does not know: {_some(strange_names)}")
    if strange_phases:
        problems.append(f"{path.name}: skipped phases this version does not know: {_some(strange_phases)}")
    return history, phases


def _read_alerts(path: Path, resumed_at: Mapping[int, int], problems: list[str]) -> list[Alert]:
    # Not by id alone: a run that was resumed without the monitor's state counts its alerts anew.
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
        # By its last step: of an alert that the run went back into, what came after that has not happened.
        if not _replaced(alert.last_step, _as_int(record.get("session"), 1), resumed_at):
            alerts[alert.id, alert.first_step] = alert
    if torn:
        problems.append(_torn(path.name, torn, torn_last))
    if strange:
        problems.append(f"{path.name}: skipped alerts this version cannot read: {_some(strange)}")
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
        if not _replaced(verdict.snapshot_step, _as_int(record.get("session"), 1), resumed_at):
            verdicts.append(verdict)
    if torn:
        problems.append(_torn(path.name, torn, torn_last))
    if strange:
        problems.append(f"{path.name}: skipped replays this version cannot read: {_some(strange)}")
    return verdicts


def _torn(name: str, count: int, last: bool) -> str:
    where = " (last)" if last and count == 1 else " (the last one among them)" if last else ""
    return f"{name}: skipped {count} torn {'line' if count == 1 else 'lines'}{where}"


def _some(items: set[str]) -> str:
    return ", ".join(sorted(items)[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _as_float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
