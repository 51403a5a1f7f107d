"""Text → what a terminal can be given.

Layer names, paths and messages of exceptions come from the user's program or from a run directory that
somebody sent: a terminal must not take orders from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# C0 but tab and newline, DEL, C1, line and paragraph separators, what turns the direction of text round, and
# halves of surrogate pairs (a path that is no UTF-8).
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control characters spelled out as ``\\x1b``: what is printed can only be read."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_ASCII = str.maketrans(
    {
        "≈": "~", "–": "-", "—": "-", "−": "-", "·": "|", "→": "->", "…": "...", "‖": "|", "×": "x",
        "τ": "tau", "δ": "delta", "μ": "mu", "ε": "eps", "β": "beta", "η": "lr", "λ": "lambda", "Σ": "sum",
        "∂": "d", "≥": ">=", "≤": "<=", "∞": "inf", "√": "sqrt", "’": "'", "“": '"', "”": '"', "█": "#",
    }
)  # fmt: skip


def to_ascii(text: str) -> str:
    """The same text for a terminal that cannot show it: symbols spelled out, anything else as ``?``."""
    return text.translate(_ASCII).encode("ascii", "replace").decode("ascii")


def shown(ascii_only: bool) -> Callable[[str], str]:
    """What every text goes through on its way to a terminal: control characters are spelled out."""
    return (lambda text: to_ascii(visible(text))) if ascii_only else visible
