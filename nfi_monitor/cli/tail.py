"""Run ``nfi-monitor tail``: print the latest readings, alerts and notes of a run, and follow new ones."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nfi_monitor.cli.output import fail, warn
from nfi_monitor.quantities import READING_ORDER
from nfi_monitor.safe_open import open_binary
from nfi_monitor.types import Alert

if TYPE_CHECKING:
    from nfi_monitor.report.run_directory.records import Skipped

_POLL_SECONDS = 0.5
_SHOWN = tuple(quantity.name for quantity in READING_ORDER if quantity.tail)


def run(options: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    from nfi_monitor.report.run_directory.files import ALERTS, READINGS, RunDirectoryError, check_run
    from nfi_monitor.report.run_directory.records import Skipped

    try:
        path = check_run(options.run)
    except RunDirectoryError as error:
        return fail(error)
    skipped = {"reading": Skipped(READINGS), "alert": Skipped(ALERTS)}
    tails = {kind: Tail(path / file.name, file) for kind, file in skipped.items()}
    notes = _Notes(path)
    said: list[str] = []
    try:
        notes.show_new(options.json)
        shown = [
            (_step_of(kind, record), order, kind, record)
            for order, (kind, tail) in enumerate(tails.items())
            for record in _good(kind, _read(tail, options.n, skipped[kind]), skipped[kind])
        ]
        # At the same step the reading comes first: the alert follows from it.
        for _, _, kind, record in sorted(shown, key=lambda item: item[:2]):
            _show(kind, record, options.json)
        sys.stdout.flush()
        _say_problems(notes, skipped, said)
        while options.follow:
            time.sleep(_POLL_SECONDS)
            notes.show_new(options.json)
            for kind, tail in tails.items():
                for record in _good(kind, _read(tail, None, skipped[kind]), skipped[kind]):
                    _show(kind, record, options.json)
            sys.stdout.flush()
            _say_problems(notes, skipped, said)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        return fail(f"cannot read {error.filename or path}: {error.strerror or error}")
    return 0


def _read(tail: Tail, count: int | None, skipped: Skipped) -> list[dict[str, Any]]:
    """Return the last ``count`` records, or (None) the new ones; none from a file that cannot be read."""
    try:
        return tail.more() if count is None else tail.last(count)
    except OSError as error:
        skipped.cannot_read(error)
        return []


def _good(kind: str, records: list[dict[str, Any]], skipped: Skipped) -> Iterator[dict[str, Any]]:
    """Yield the records that fit their declaration; count the others."""
    from nfi_monitor.report.run_directory.records import alert_of, reading_of
    from nfi_monitor.schema import DamagedRecordError

    for record in records:
        try:
            _ = reading_of(record) if kind == "reading" else alert_of(record)
        except DamagedRecordError as error:
            skipped.add(error)
        else:
            yield record


def _say_problems(notes: _Notes, skipped: dict[str, Skipped], said: list[str]) -> None:
    """Print on stderr what could not be read, each sentence once."""
    problems = [*notes.problems, *(problem for file in skipped.values() for problem in file.problems())]
    for problem in problems:
        if problem not in said:
            warn(problem)
    said[:] = problems


class _Notes:
    """Print the notes in ``run.json``, each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: set[str] = set()
        self.problems: list[str] = []

    def show_new(self, as_json: bool) -> None:
        from nfi_monitor.report.run_directory.records import read_info

        problems: list[str] = []
        info = read_info(self._path, problems)
        self.problems = [problem for problem in problems if ": missing" not in problem]
        for note in info.get("notes") or []:
            text = json.dumps(note, sort_keys=True)
            if text not in self._seen:
                self._seen.add(text)
                _show("note", note, as_json)


class Tail:
    """Read the end of a file of JSON lines that may still grow or not exist yet.

    Lines that are no JSON objects are skipped, and counted in ``skipped``.
    """

    def __init__(self, path: Path, skipped: Skipped | None = None) -> None:
        self._path = path
        self._skipped = skipped
        self._offset = 0
        self._rest = b""
        self._seen = b""  # the last line read: more() searches for it in a file that was thinned
        self._file: tuple[int, int] | None = None

    def last(self, count: int) -> list[dict[str, Any]]:
        """Return the last ``count`` records. Read backwards, since the file may have gigabytes."""
        from nfi_monitor.report.run_directory.records import LINE_BYTES

        try:
            with open_binary(self._path) as file:
                self._file = _identity(file)
                position = file.seek(0, os.SEEK_END)
                blocks: list[bytes] = []
                newlines = without = 0
                # Read some lines more: the first one of the block may be cut, and others may be torn.
                while position and newlines <= count + 8 and without <= LINE_BYTES:
                    size = min(1 << 16, position)
                    position -= size
                    file.seek(position)
                    blocks.append(file.read(size))
                    found = blocks[-1].count(b"\n")
                    newlines, without = newlines + found, 0 if found else without + size
        except FileNotFoundError:
            return []
        data = b"".join(reversed(blocks))
        self._offset = position + len(data)
        *lines, self._rest = data.split(b"\n")
        self._seen = lines[-1] if lines else b""
        records = list(self._parsed(lines[1:] if position else lines))
        return records[len(records) - count :] if count < len(records) else records

    def more(self) -> list[dict[str, Any]]:
        """Return the records that were appended since the last call."""
        try:
            with open_binary(self._path) as file:
                if (now := _identity(file)) != self._file:
                    if self._file is not None:
                        self._offset, self._rest = _end_of(self._seen, file), b""
                    self._file = now
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._seen = lines[-1] if lines else self._seen
        return list(self._parsed(lines))

    def _parsed(self, lines: list[bytes]) -> Iterator[dict[str, Any]]:
        from nfi_monitor.report.run_directory.records import record_of

        for line in lines:
            record = record_of(line, dict, self._skipped) if line.strip() else None
            if record is not None:
                yield record


def _identity(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def _end_of(line: bytes, file: BinaryIO) -> int:
    """Return the offset after ``line`` in the file; the file's size if it does not hold the line."""
    size = os.fstat(file.fileno()).st_size
    if not size:
        return 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = content.rfind(line + b"\n")
    return found + len(line) + 1 if found >= 0 else size


def _step_of(kind: str, record: dict[str, Any]) -> int:
    step: int = record["step"] if kind == "reading" else record["alert"]["last_step"]
    return step


def _show(kind: str, record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"type": kind, **record}, allow_nan=False))
    else:
        from nfi_monitor.report.terminal import cleaner

        # A terminal without UTF-8 cannot show μ: spell it out.
        ascii_only = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
        print(cleaner(ascii_only)(_line(kind, record)))


def _line(kind: str, record: dict[str, Any]) -> str:
    """Return one record as a line of text."""
    from nfi_monitor.report import wording

    if kind == "note":
        return f"step {record['step']:>7,}  note      {record['message']}"
    if kind == "alert":
        alert = Alert.from_json(record["alert"])
        # One item of evidence is enough here; the report has the others.
        text = wording.alert_in_words(alert, 1)
        return f"step {alert.last_step:>7,}  {record.get('change', ''):<8}  {alert.id}: {text}"
    values, shown = record["values"], []
    for name in _SHOWN:
        if name in values and not (name == "head_loss" and "loss" in values):
            value = values[name]
            amount = "not finite" if value is None else wording.amount(name, value)
            shown.append(f"{wording.label(name)} {amount}")
    return f"step {record['step']:>7,}  {record['phase']:<10}  {', '.join(shown)}"
