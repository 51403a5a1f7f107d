"""Write a run into its directory: ``run.json``, ``readings.jsonl``, ``alerts.jsonl``, ``replays.jsonl``.

Each line is written by one ``os.write`` on a descriptor that was opened with ``O_APPEND``; losses of steps
that were not read are written together.  There is no buffer that ``kill -9`` could lose, but for the losses
of the last tenth of a second, which the monitor has not judged yet.  At worst the last line is torn: the
reader skips it and says so, and a resumed run begins a new line.  ``run.json`` changes rarely and is replaced
atomically.  One process at a time writes (:mod:`~nfi_monitor.report.run_directory.lock`).
``readings.jsonl`` has a budget (:mod:`~nfi_monitor.report.run_directory.thinning`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfi_monitor.atomic_write import remove_leftovers, replacing
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report.json_values import as_json, json_line
from nfi_monitor.report.run_directory.files import ALERTS, READINGS, REPLAYS, RUN
from nfi_monitor.report.run_directory.lock import DirectoryInUseError, DirectoryLock
from nfi_monitor.report.run_directory.records import last_session, read_info
from nfi_monitor.report.run_directory.thinning import READINGS_BYTES, thin
from nfi_monitor.report.sink import SinkBase, passing
from nfi_monitor.safe_open import absolute, identity, open_binary, open_descriptor
from nfi_monitor.types import Alert, Change, Note, Phase, Reading, finite_or_none

if TYPE_CHECKING:
    from nfi_monitor.report.summary import Summary

CHECK_SECONDS = 1.0
"""Seconds between two checks that the file still exists: a check makes a network file system flush it."""
FOREIGN = 16
"""A file of readings that is so many times its budget when the run begins is of others: never thin it."""


class RunDirectory(SinkBase):
    """Write a run into a directory. A sink; :meth:`start` creates the directory and its parents.

    If the directory holds a run, this one is appended: a resumed run is one run.  At ``readings_bytes``, old
    readings are thinned.  Raises OSError, with the path and what to do, if the directory cannot be made or a
    line cannot be written.  Raises DirectoryInUseError if another process writes there.  After an error all
    files are closed: nothing is written after a gap.  Only a shortage of file handles or memory that may be
    over soon (:func:`~nfi_monitor.report.sink.passing`) leaves them open: call again then.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        readings_bytes: int = READINGS_BYTES,
        lock: DirectoryLock | None = None,
    ) -> None:
        self.path = absolute(path)
        self._lock = lock or DirectoryLock(self.path)
        self._budget = readings_bytes
        self._thin_at: float = readings_bytes
        self._size = 0  # of the readings
        self._linked = False  # True if this file system counts links: 0 then means a deleted file
        self._checked = -math.inf
        self._info: dict[str, Any] = {}
        self._notes: list[dict[str, Any]] = []
        self._files: dict[str, int] = {}
        self._torn: set[str] = set()  # files whose last line is not whole
        self._directory: tuple[int, ...] | None = None  # identity of the directory, once it is made
        self._session: dict[str, int] = {}  # {"session": 2}, added to each line after a resume

    def start(self, info: Mapping[str, Any]) -> None:
        try:
            self._start(info)
        except OSError:
            self._close_files()
            raise

    def _start(self, info: Mapping[str, Any]) -> None:
        with self._with_advice(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._directory = identity(self.path)
            self._lock.acquire()
            for name in (RUN, READINGS):
                remove_leftovers(self.path / name)
        previous = read_info(self.path, [])
        self._notes = previous.get("notes") or []
        if previous or _size_of(self.path / READINGS):
            # A damaged run.json does not know the session: the readings do.
            last = max(previous.get("session", 1), last_session(self.path))
            self._session = {"session": last + 1}
        for name in (READINGS, ALERTS):
            with self._with_advice(self.path / name):
                self._files[name] = _open_for_lines(self.path / name)
        opened = os.fstat(self._files[READINGS])
        self._size, self._linked = opened.st_size, opened.st_nlink > 0
        if self._size > FOREIGN * self._budget:
            self._thin_at = math.inf  # a copy would take minutes of the training, and as much of the disk
        self._write_info(info)

    def reading(self, reading: Reading, phase: Phase) -> None:
        values = {name: finite_or_none(value) for name, value in reading.values.items()}
        record = {"step": reading.step, "phase": str(phase), "values": values, **self._session}
        # Only names and numbers of the monitor's own: no control character can be in them.
        self._append_readings(json.dumps(record, allow_nan=False) + "\n")

    def losses(self, losses: Sequence[tuple[int, float]], phase: Phase) -> None:
        # What json.dumps makes of a reading with one number, which takes five times as long.
        end = f', "session": {self._session["session"]}}}\n' if self._session else "}\n"
        middle = f', "phase": "{phase!s}", "values": {{"loss": '
        self._append_readings(
            "".join([f'{{"step": {step}{middle}{float(loss)!r}}}{end}' for step, loss in losses])
        )

    def _append_readings(self, lines: str) -> None:
        self._size += self._append(READINGS, lines.encode())
        if self._size >= self._thin_at:
            self._thin()

    def alert(self, alert: Alert, change: Change) -> None:
        self._append(ALERTS, json_line({"change": str(change), "alert": alert.to_json(), **self._session}))

    def note(self, note: Note) -> None:
        self._write_info(self._info, [asdict(note)])

    def replay(self, verdict: ReplayVerdict) -> None:
        if self._files and REPLAYS not in self._files:
            with self._with_advice(self.path / REPLAYS):
                self._check_directory()
                self._files[REPLAYS] = _open_for_lines(self.path / REPLAYS)
        self._append(REPLAYS, json_line({**verdict.to_json(), **self._session}))

    def went_back(self) -> None:
        """Begin a new session, as a resumed run does: its readings replace earlier ones of the same steps."""
        self._session = {"session": self._session.get("session", 1) + 1}
        self._write_info(self._info)

    def close(self, info: Mapping[str, Any], summary: Summary) -> None:
        try:
            if self._files:  # else start() was interrupted, or close() is called again
                self._write_info(info)
        finally:
            self._close_files()

    def _close_files(self) -> None:
        while self._files:
            _, descriptor = self._files.popitem()
            with contextlib.suppress(OSError):  # a network file system may report an earlier error here
                os.close(descriptor)
        self._lock.release()

    def _append(self, name: str, line: bytes) -> int:
        """Write a line, or several, and return the length in bytes."""
        if name not in self._files:
            raise OSError(f"{self.path / name} is not open: call start() before, and nothing after close().")
        rest = b"\n" + line if name in self._torn else line
        whole = len(rest)
        with self._with_advice(self.path / name):
            now = time.monotonic()
            if self._linked and now - self._checked >= CHECK_SECONDS:
                self._checked = now
                self._check_names()
            try:
                while rest:  # a full disk may take a part of a line before it refuses the rest
                    rest = rest[os.write(self._files[name], rest) :]
                self._torn.discard(name)
            except OSError:
                if len(rest) < whole:
                    self._torn.add(name)
                raise
        return whole

    def _check_names(self) -> None:
        """Raise FileNotFoundError if a file has no name any more: its lines would be lost."""
        for name, descriptor in self._files.items():
            if os.fstat(descriptor).st_nlink == 0:
                path = str(self.path / name)
                raise FileNotFoundError(errno.ENOENT, "it was deleted during the run", path)

    def _thin(self) -> None:
        # The copy may not fit on the disk.  Then the file stays as it is, and the run goes on.
        with self._with_advice(self.path / READINGS):
            self._check_directory()
        old = self._files[READINGS]
        with contextlib.suppress(OSError):
            kept = os.dup(old)  # a handle for the new file: where there is none, nothing is thinned
            try:
                thin(self.path / READINGS)
            finally:
                os.close(kept)
        with self._with_advice(self.path / READINGS):
            self._files[READINGS] = _open_for_lines(self.path / READINGS)
            os.close(old)
            self._size = os.fstat(self._files[READINGS]).st_size
        # If little could be removed, wait until the file has grown by an eighth of the budget.
        self._thin_at = max(self._budget, self._size + self._budget // 8)

    def _write_info(self, info: Mapping[str, Any], notes: list[dict[str, Any]] | None = None) -> None:
        """Replace run.json. Its notes are those of all sessions, in their order and without repetition."""
        for note in [*(as_json(info).get("notes") or []), *(notes or [])]:
            if isinstance(note, dict) and note not in self._notes:
                self._notes.append(note)
        self._info = {**as_json(info), **self._session, "notes": self._notes}
        target = self.path / RUN
        with self._with_advice(target):
            self._check_directory()
            with replacing(target) as file:
                file.write(json_line(self._info, indent=2))

    def _check_directory(self) -> None:
        """Raise FileNotFoundError if the path leads elsewhere by now, to another run or a link."""
        if identity(self.path) != self._directory:
            raise FileNotFoundError(errno.ENOENT, "it was moved or replaced during the run", str(self.path))

    @contextlib.contextmanager
    def _with_advice(self, path: Path) -> Iterator[None]:
        """Close all files after an OSError, and raise one with the same errno that says what to do."""
        try:
            yield
        except DirectoryInUseError:
            raise
        except OSError as error:
            reason = f"cannot write {error.filename or path}: {error.strerror or error}."
            if passing(error):
                advice = (
                    "Later records are tried; the training goes on. Close files, or allow more (ulimit -n)."
                )
            else:
                self._close_files()
                advice = (
                    "From here on, readings and alerts are not saved; the training goes on. Free disk space, "
                    "or pass a directory that you can write to as run_dir=."
                )
            raise OSError(error.errno, f"{reason} {advice}") from error


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _open_for_lines(path: Path) -> int:
    """Open a file for appending; end its last line first if the last writer was killed inside it.

    A file with several names (hard links) is copied first: its other names keep what they had.
    """
    descriptor = open_descriptor(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        status = os.fstat(descriptor)
        if status.st_nlink > 1:
            with replacing(path) as copy, open_binary(path) as file:
                shutil.copyfileobj(file, copy, 1 << 20)
            os.close(descriptor)
            descriptor = open_descriptor(path, os.O_RDWR | os.O_APPEND)
        if status.st_size:
            os.lseek(descriptor, -1, os.SEEK_END)
            if os.read(descriptor, 1) != b"\n":
                os.write(descriptor, b"\n")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
