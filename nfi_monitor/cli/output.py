"""Print for the commands: a console that fits where it writes, one line of an error, one line of text."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def fail(message: object) -> int:
    from nfi_monitor.report.terminal import visible

    print(f"nfi-monitor: {visible(str(message))}", file=sys.stderr)
    return 2


def console_for(stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(stderr=stderr, width=100)  # a file has no width; 80 would fold the tables
    return console


def say(console: Console, text: str, style: str = "") -> None:
    from rich.text import Text

    from nfi_monitor.report.terminal import shown

    text = shown(console.options.ascii_only)(text)
    console.print(Text(text, style=style), soft_wrap=True, highlight=False)
