"""Print for the commands: errors to stderr, text and tables to a console of the right width."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def fail(message: object) -> int:
    """Print an error on stderr and return the exit code 2."""
    warn(message)
    return 2


def warn(message: object) -> None:
    """Print a message on stderr."""
    from nfi_monitor.report.terminal import escape_controls

    print(f"nfi-monitor: {escape_controls(str(message))}", file=sys.stderr)


def console_for(stderr: bool = False) -> Console:
    """Return a console on stdout or stderr, 100 columns wide if that is not a terminal."""
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(stderr=stderr, width=100)  # rich would take 80, which is too narrow for the tables
    return console


def say(console: Console, text: str, style: str = "") -> None:
    """Print one line of text without wrapping it."""
    from rich.text import Text

    from nfi_monitor.report.terminal import cleaner

    text = cleaner(console.options.ascii_only)(text)
    console.print(Text(text, style=style), soft_wrap=True, highlight=False)
