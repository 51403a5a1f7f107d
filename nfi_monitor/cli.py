"""The ``nfi-monitor`` command: demo, report, tail.  Imports no torch: a report must open at once.

Exit codes: 0 done, 2 wrong usage or a run that cannot be read (one line on stderr, no traceback), 130
interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nfi_monitor._version import __version__
from nfi_monitor.types import Alert

if TYPE_CHECKING:
    from rich.console import Console

    from nfi_monitor.report.run_directory.reader import RunRecord

_DEMO = "nfi_monitor.examples.02_modular_division"
_POLL_SECONDS = 0.5
_EXPLAINED = 20  # alerts under a report; any other by its id
_SHOWN = (
    "loss",
    "head_loss",
    "zero_sum_violation",
    "absorbed_fraction",
    "feature_mean_norm",
    "logit_displacement",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["demo"]:  # its options are the example's own, --help among them
            return _demo(arguments[1:])
        options = _parser().parse_args(arguments)
        return _report(options) if options.command == "report" else _tail(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read us has seen enough. Without this, flushing stdout at exit would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nfi-monitor", description="Look at runs watched by nfi-monitor, or watch one live."
    )
    parser.add_argument("--version", action="version", version=f"nfi-monitor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("demo", help="train a network through slingshots under the monitor", add_help=False)
    report = commands.add_parser("report", help="the after-run report of a run directory, and its figure")
    report.add_argument("run", metavar="RUN", help="the directory given to Monitor(run_dir=...)")
    report.add_argument("--figure", metavar="PATH", help="where to write it (default: RUN/report.png)")
    report.add_argument("--no-figure", action="store_true", help="print the report only")
    report.add_argument(
        "--json", action="store_true", help="print the report as JSON (and draw a figure only with --figure)"
    )
    report.add_argument(
        "--explain", metavar="ID", help="this alert only, as imminent-1: what crossed what, and what did not"
    )
    tail = commands.add_parser("tail", help="the latest readings and alerts, one line each")
    tail.add_argument("run", metavar="RUN", help="the directory given to Monitor(run_dir=...)")
    tail.add_argument("--json", action="store_true", help="strict JSON lines, for scripts")
    tail.add_argument("--follow", "-f", action="store_true", help="wait for more until interrupted")
    tail.add_argument("-n", type=_count, default=10, metavar="N", help="how many of each kind (default: 10)")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def _fail(message: object) -> int:
    from nfi_monitor.report.terminal import visible

    print(f"nfi-monitor: {visible(str(message))}", file=sys.stderr)
    return 2


# --- demo -------------------------------------------------------------------------------------------


def _demo(arguments: list[str]) -> int:
    try:
        module = importlib.import_module(_DEMO)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == _DEMO or _DEMO.startswith(f"{missing}."):
            return _fail(
                f"the demo ({_DEMO}) is not installed. Install the package from its repository "
                "(pip install -e .) or run examples/02_modular_division.py there."
            )
        return _fail(
            f"the demo needs {missing}, which is not installed: pip install {missing.split('.')[0]}"
            ' (or pip install "nfi-monitor[examples,plots]" for all that the examples use)'
        )
    result = module.main(arguments)
    return result if isinstance(result, int) else 0


# --- report -----------------------------------------------------------------------------------------


def _report(options: argparse.Namespace) -> int:
    from nfi_monitor.report.run_directory.files import RunDirectoryError
    from nfi_monitor.report.run_directory.reader import read_run
    from nfi_monitor.report.summary import summarize

    try:
        record = read_run(options.run)
    except RunDirectoryError as error:
        return _fail(error)
    if options.explain is not None:
        return _explain(options, record)
    summary = summarize(
        record.info, record.history, record.phases, record.alerts, record.notes, record.replays
    )
    console = _console(stderr=options.json)
    if options.json:
        print(json.dumps(summary, allow_nan=False, indent=2))
    else:
        console.print(summary)
        _print_explanations(console, record)
    for problem in record.problems:
        _say(console, f"note: {problem}", style="yellow")
    if options.no_figure or (options.json and not options.figure):
        return 0

    from nfi_monitor.report.figure import draw

    path = Path(options.figure) if options.figure else Path(options.run) / "report.png"
    try:
        thresholds = record.info.get("thresholds")
        draw(
            record.history, record.phases, record.alerts, path,
            title=_title(record.info), thresholds=thresholds if isinstance(thresholds, dict) else None,
        )  # fmt: skip
    except ImportError as error:
        _say(console, f"no figure: {error}", style="yellow")
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib cannot write
        message = f"cannot write the figure {path}: {error}. Pass another place with --figure."
        if options.figure:
            return _fail(message)
        _say(console, f"no figure: {message}", style="yellow")  # a run kept read-only can still be reported
    else:
        _say(console, f"figure: {path}")
    return 0


def _explain(options: argparse.Namespace, record: RunRecord) -> int:
    """``report RUN --explain ID``: one alert, and no figure."""
    from nfi_monitor.report.explain.compose import explain_run

    parts = (record.info, record.history, record.phases, record.alerts, record.notes)
    try:
        (explanation,) = explain_run(*parts, options.explain)
    except ValueError as error:
        return _fail(error)
    if options.json:
        print(json.dumps(explanation.to_json(), allow_nan=False, indent=2))
    else:
        _console().print(explanation)
    for problem in record.problems:
        _say(_console(stderr=True), f"note: {problem}", style="yellow")
    return 0


def _print_explanations(console: Console, record: RunRecord) -> None:
    """Under the summary: every slingshot, and the alert that still fires."""
    from rich.text import Text

    from nfi_monitor.report.explain.compose import explain_run

    parts = (record.info, record.history, record.phases, record.alerts, record.notes)
    explanations = explain_run(*parts)
    if explanations:
        console.print(Text("\nExplained", style="bold"))
    if len(explanations) > _EXPLAINED:
        known = ", ".join(item.alert.id for item in explanations[:-_EXPLAINED])
        _say(console, f"and earlier: {known} (nfi-monitor report RUN --explain ID)", style="dim")
    for explanation in explanations[-_EXPLAINED:]:
        console.print(explanation)


def _title(info: dict[str, Any]) -> str:
    optimizer = info.get("optimizer")
    name = optimizer.get("name") if isinstance(optimizer, dict) else optimizer
    parts = [str(part) for part in (info.get("model"), name, info.get("dtype")) if part]
    return " · ".join(parts)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(stderr=stderr, width=100)  # a file has no width; 80 would fold the tables
    return console


def _say(console: Console, text: str, style: str = "") -> None:
    from rich.text import Text

    from nfi_monitor.report.terminal import shown

    text = shown(console.options.ascii_only)(text)
    console.print(Text(text, style=style), soft_wrap=True, highlight=False)


# --- tail -------------------------------------------------------------------------------------------


def _tail(options: argparse.Namespace) -> int:
    from nfi_monitor.report.run_directory.files import ALERTS, READINGS, RunDirectoryError, check_run

    try:
        run = check_run(options.run)
    except RunDirectoryError as error:
        return _fail(error)
    try:
        tails = {"reading": _Tail(run / READINGS), "alert": _Tail(run / ALERTS)}
        records = [
            (_step_of(kind, record), order, kind, record)
            for order, (kind, tail) in enumerate(tails.items())
            for record in tail.last(options.n)
        ]
        seen: list[dict[str, Any]] = []
        for note in _new_notes(run, seen):
            _show("note", note, options.json)
        # At the same step the reading comes first: the alert follows from it.
        for _, _, kind, record in sorted(records, key=lambda item: item[:2]):
            _show(kind, record, options.json)
        sys.stdout.flush()
        while options.follow:
            time.sleep(_POLL_SECONDS)
            for note in _new_notes(run, seen):
                _show("note", note, options.json)
            for kind, tail in tails.items():
                for record in tail.more():
                    _show(kind, record, options.json)
            sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        return _fail(f"cannot read {error.filename or run}: {error.strerror or error}")
    return 0


class _Tail:
    """The end of a file of JSON lines that may still grow, or not exist yet; torn lines are left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self._seen = b""  # the last line of all, to be found again in a file that was thinned
        self._file: tuple[int, int] | None = None

    def last(self, count: int) -> list[dict[str, Any]]:
        """The last ``count`` records, read backwards: the file may be gigabytes long."""
        try:
            with open(self._path, "rb") as file:
                self._file = _identity(file)
                position = file.seek(0, os.SEEK_END)
                blocks: list[bytes] = []
                newlines = 0
                # One line more than asked for, since the first of the block may be cut, and some to
                # make up for torn ones.
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
        """What was appended since."""
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
    """Where ``line`` ends in a file that took the place of another one; its end, if it is not there."""
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


def _new_notes(run: Path, seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Notes that run.json holds and ``seen`` does not; they are added to it."""
    from nfi_monitor.report.run_directory.files import RUN

    try:
        info = json.loads((run / RUN).read_text(encoding="utf-8"))
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
        from nfi_monitor.report.terminal import shown

        # A terminal that cannot show μ must not stop the tail.
        ascii_only = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
        print(shown(ascii_only)(_line(kind, record)))


def _line(kind: str, record: dict[str, Any]) -> str:
    """One record in plain words."""
    from nfi_monitor.report import wording

    if kind == "note":
        return f"step {record.get('step', 0):>7,}  note      {record.get('message', '')}"
    if kind == "alert":
        try:
            alert = Alert.from_json(record["alert"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            return f"alert of a kind this version cannot read: {error}"
        # A threshold a line is enough for a tail; the rest is in the report.
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
