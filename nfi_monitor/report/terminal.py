"""Make text safe for a terminal.

Layer names, paths and messages of exceptions come from the user's program, or from a run directory that
somebody sent.  Control characters in them must not reach the terminal: it would obey them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# C0 without tab and newline, DEL, C1, line and paragraph separators, marks that change the direction of text,
# and halves of surrogate pairs (from a path that is not UTF-8).
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str) -> str:
    """Replace control characters by their escapes, such as ``\\x1b``."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_ASCII = str.maketrans(
    {
        "≈": "~", "–": "-", "—": "-", "−": "-", "·": "|", "→": "->", "…": "...", "‖": "|", "×": "x",
        "τ": "tau", "δ": "delta", "μ": "mu", "ε": "eps", "β": "beta", "η": "lr", "λ": "lambda", "Σ": "sum",
        "∂": "d", "≥": ">=", "≤": "<=", "∞": "inf", "√": "sqrt", "’": "'", "“": '"', "”": '"', "█": "#",
    }
)  # fmt: skip


def to_ascii(text: str) -> str:
    """Spell out symbols in ASCII (``τ`` → ``tau``); replace other characters outside ASCII by ``?``."""
    return text.translate(_ASCII).encode("ascii", "replace").decode("ascii")


def cleaner(ascii_only: bool) -> Callable[[str], str]:
    """Return the function that makes text safe for a terminal, and spells out symbols if ``ascii_only``."""
    return (lambda text: to_ascii(escape_controls(text))) if ascii_only else escape_controls


@contextmanager
def raising_broken_pipe(console: Any) -> Iterator[None]:
    """Let a rich Console raise BrokenPipeError inside a block if nobody reads its output any more.

    rich would redirect the stdout of the whole program to nowhere, and end the program.
    """
    own = vars(console).get("on_broken_pipe")
    console.on_broken_pipe = _raise_again
    try:
        yield
    finally:
        vars(console).pop("on_broken_pipe", None)
        if own is not None:
            console.on_broken_pipe = own


def _raise_again() -> None:
    """Raise the BrokenPipeError that is being handled: rich calls this in its ``except`` block."""
    raise
