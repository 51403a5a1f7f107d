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
from typing import Any, BinaryIO

from nfi_monitor.cli.output import fail
from nfi_monitor.quantities import READING_ORDER
from nfi_monitor.types import Alert

_POLL_SECONDS = 0.5
_SHOWN = tuple(quantity.name for quantity in READING_ORDER if quantity.tail)


def run(options: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    from nfi_monitor.report.run_directory.files import ALERTS, READINGS, RunDirectoryError, check_run

    try:
        path = check_run(options.run)
    except RunDirectoryError as error:
        return fail(error)
    try:
        tails = {"reading": Tail(path / READINGS), "alert": Tail(path / ALERTS)}
        records = [
            (_step_of(kind, record), order, kind, record)
            for order, (kind, tail) in enumerate(tails.items())
            for record in tail.last(options.n)
        ]
        seen: list[dict[str, Any]] = []
        for note in _new_notes(path, seen):
            _show("note", note, options.json)
        # At the same step the reading comes first: the alert follows from it.
        for _, _, kind, record in sorted(records, key=lambda item: item[:2]):
            _show(kind, record, options.json)
        sys.stdout.flush()
        while options.follow:
            time.sleep(_POLL_SECONDS)
            for note in _new_notes(path, seen):
                _show("note", note, options.json)
            for kind, tail in tails.items():
                for record in tail.more():
                    _show(kind, record, options.json)
            sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        return fail(f"cannot read {error.filename or path}: {error.strerror or error}")
    return 0


class Tail:
    """Read the end of a file of JSON lines that may still grow or not exist yet. Torn lines are skipped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self._seen = b""  # the last line read: more() searches for it in a file that was thinned
        self._file: tuple[int, int] | None = None

    def last(self, count: int) -> list[dict[str, Any]]:
        """Return the last ``count`` records. Read backwards, since the file may have gigabytes."""
        try:
            with open(self._path, "rb") as file:
                self._file = _identity(file)
                position = file.seek(0, os.SEEK_END)
                blocks: list[bytes] = []
                newlines = 0
                # Read some lines more: the first one of the block may be cut, and others may be torn.
                while position and newlines <= count + 8:
                    size = min(1 << 16, position)
                    position -= size
                    file.seek(position)
                    blocks.append(file.read(size))
                    newlines += blocks[-1].count(b"\n")
        except FileNotFoundError:
            return []
        data = b"".join(reversed(blocks))
        self._offset = position + len(data)
        *lines, self._rest = data.split(b"\n")
        self._seen = lines[-1] if lines else b""
        records = list(_parsed(lines[1:] if position else lines))
        return records[len(records) - count :] if count < len(records) else records

    def more(self) -> list[dict[str, Any]]:
        """Return the records that were appended since the last call."""
        try:
            with open(self._path, "rb") as file:
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
        return list(_parsed(lines))


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


def _parsed(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    from nfi_monitor.report.run_directory.files import parse_line

    for line in lines:
        record = parse_line(line) if line.strip() else None
        if record is not None:
            yield record


def _step_of(kind: str, record: dict[str, Any]) -> int:
    alert = record.get("alert")
    step = (
        record.get("step")
        if kind == "reading"
        else alert.get("last_step")
        if isinstance(alert, dict)
        else None
    )
    return step if isinstance(step, int) else -1


def _new_notes(path: Path, seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the notes of run.json that are not in ``seen``, and add them to it."""
    from nfi_monitor.report.run_directory.files import RUN

    try:
        info = json.loads((path / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    notes = info.get("notes") if isinstance(info, dict) else None
    new = [note for note in notes or [] if isinstance(note, dict) and note not in seen]
    seen += new
    return new


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
        return f"step {record.get('step', 0):>7,}  note      {record.get('message', '')}"
    if kind == "alert":
        try:
            alert = Alert.from_json(record["alert"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            return f"alert that this version cannot read: {error}"
        # One item of evidence is enough here; the report has the others.
        text = wording.alert_in_words(alert, 1)
        return f"step {alert.last_step:>7,}  {record.get('change', ''):<8}  {alert.id}: {text}"
    values = record.get("values")
    values = values if isinstance(values, dict) else {}
    phase = record.get("phase", "")
    shown = []
    for name in _SHOWN:
        if name in values and not (name == "head_loss" and "loss" in values):
            value = values[name]
            known = isinstance(value, (int, float))
            shown.append(f"{wording.label(name)} {wording.amount(name, value) if known else 'not finite'}")
    return f"step {record.get('step', 0):>7,}  {phase:<10}  {', '.join(shown)}"
