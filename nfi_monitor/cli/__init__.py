"""Run the ``nfi-monitor`` command: demo, report, tail.  It imports no torch, so that a report opens fast.

Exit codes: 0 for success, 2 for wrong usage or a run that cannot be read (one line on stderr, no traceback),
130 if interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from nfi_monitor._version import __version__
from nfi_monitor.cli import report, tail
from nfi_monitor.cli.output import fail

_DEMO = "nfi_monitor.examples.02_modular_division"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: ``sys.argv``) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["demo"]:  # the example parses the rest itself, --help included
            return _demo(arguments[1:])
        options = _parser().parse_args(arguments)
        return report.run(options) if options.command == "report" else tail.run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) has ended. Without this, flushing stdout at exit would fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nfi-monitor",
        description="Report on runs that nfi-monitor has watched, or follow one that trains.",
    )
    parser.add_argument("--version", action="version", version=f"nfi-monitor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "demo", help="train a small network that has slingshots, under the monitor", add_help=False
    )
    report_ = commands.add_parser("report", help="print the report of a run and draw its figure")
    report_.add_argument("run", metavar="RUN", help="the directory that you gave to Monitor(run_dir=...)")
    report_.add_argument("--figure", metavar="PATH", help="write the figure here (default: RUN/report.png)")
    report_.add_argument("--no-figure", action="store_true", help="print the report and draw no figure")
    report_.add_argument(
        "--json", action="store_true", help="print the report as JSON, and draw a figure only with --figure"
    )
    report_.add_argument(
        "--explain",
        metavar="ID",
        help="explain only this alert, such as imminent-1: which thresholds were crossed, and when",
    )
    tail_ = commands.add_parser("tail", help="print the latest readings and alerts, one line each")
    tail_.add_argument("run", metavar="RUN", help="the directory that you gave to Monitor(run_dir=...)")
    tail_.add_argument("--json", action="store_true", help="print strict JSON lines, for scripts")
    tail_.add_argument("--follow", "-f", action="store_true", help="print new ones too, until interrupted")
    tail_.add_argument(
        "-n",
        type=_count,
        default=10,
        metavar="N",
        help="number of readings and of alerts to print (default: 10)",
    )
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def _demo(arguments: list[str]) -> int:
    try:
        module = importlib.import_module(_DEMO)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == _DEMO or _DEMO.startswith(f"{missing}."):
            return fail(
                f"the demo ({_DEMO}) is not installed. Install the package from its repository "
                "(pip install -e .) or run examples/02_modular_division.py there."
            )
        return fail(
            f"the demo needs {missing}, which is not installed: pip install {missing.split('.')[0]}"
            ' (or pip install "nfi-monitor[examples,plots]" for all that the examples use)'
        )
    result = module.main(arguments)
    return result if isinstance(result, int) else 0
