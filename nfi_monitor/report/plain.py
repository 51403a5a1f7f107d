"""Anything → what strict JSON can hold, and text → what a terminal can be given.

One place, so that live and offline reports see the same.  Layer names, paths and messages of exceptions come
from the user's program or from a run directory that somebody sent: a terminal must not take orders from them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """The same data in dicts, lists, strings, numbers, booleans and None; NaN and Inf become None.

    Objects of other types (a ``torch.dtype``, a ``Path``) become their ``str``: a run description
    must never fail to be written because someone put a new kind of object into it.
    """
    if value is None or isinstance(value, (bool, int, float)):
        # float(): a numpy float64 is a float whose repr is not JSON's business.
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else None
        return int(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    to_json = getattr(value, "to_json", None)
    if callable(to_json):
        return plain(to_json())
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:  # numpy scalars and 0-d arrays
        return plain(item())
    return str(value)


# C0 but tab and newline, DEL, C1, line and paragraph separators, what turns the direction of text round, and
# halves of surrogate pairs (a path that is no UTF-8).
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control characters spelled out as ``\\x1b``: what is printed can only be read."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def json_line(record: object, indent: int | None = None) -> bytes:
    """One line (without ``indent``) of strict JSON. Control characters are escaped in it, ``μ`` is not.

    Raises ValueError for NaN and Inf, as :func:`json.dumps` does, and TypeError for what is not plain.
    """
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, indent=indent)
    return (_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n").encode()
