"""Write a run into its directory: ``run.json``, ``readings.jsonl``, ``alerts.jsonl``, ``replays.jsonl``.

Each line is one ``os.write`` of a complete line on a descriptor opened with ``O_APPEND``: no buffer
that a ``kill -9`` could swallow.  At worst the last line is torn; the reader skips it and says so, and a
resumed run starts on a fresh line.  ``run.json`` changes rarely and is replaced atomically.  One process
writes (:mod:`~nfi_monitor.report.run_directory.lock`); ``readings.jsonl`` keeps to a budget
(:mod:`~nfi_monitor.report.run_directory.thinning`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfi_monitor.atomic_write import remove_leftovers, replacing
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report.json_values import json_line, plain
from nfi_monitor.report.run_directory.files import ALERTS, READINGS, REPLAYS, RUN, as_int, notes_of
from nfi_monitor.report.run_directory.lock import DirectoryInUseError, DirectoryLock
from nfi_monitor.report.run_directory.thinning import READINGS_BYTES, thin
from nfi_monitor.report.sink import SinkBase
from nfi_monitor.types import Alert, Change, Note, Phase, Reading, finite_or_none

if TYPE_CHECKING:
    from nfi_monitor.report.summary import Summary

LOOK_SECONDS = 1.0
"""Between two looks whether the file is still there: a look makes a network file system flush it."""


class RunDirectory(SinkBase):
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
        self._notes = notes_of(previous)
        if previous or (self.path / READINGS).exists():
            self._session = {"session": as_int(previous.get("session"), 1) + 1}
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
                if os.fstat(self._files[name]).st_nlink == 0:  # nobody could open what is written now
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
        for note in [*notes_of(plain(info)), *(notes or [])]:
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
