"""Convert values to what strict JSON can hold.

All reports use this module, so that a report of a live run and one of its files see the same values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from nfi_monitor.report.terminal import CONTROL


def as_json(value: Any) -> Any:
    """Convert to dicts, lists, strings, numbers, booleans and None. NaN and Inf become None.

    Objects of other types (a ``torch.dtype``, a ``Path``) become their ``str``: a new kind of object must not
    stop a run's description from being written.
    """
    if value is None or isinstance(value, (bool, int, float)):
        # A numpy float64 is a float, but its repr is not JSON: convert it.
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else None
        return int(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((as_json(item) for item in value), key=str)
    to_json = getattr(value, "to_json", None)
    if callable(to_json):
        return as_json(to_json())
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:  # numpy scalars and 0-d arrays
        return as_json(item())
    return str(value)


def json_line(record: object, indent: int | None = None) -> bytes:
    """Encode a record as strict JSON, on one line unless ``indent`` is given.

    Control characters are escaped, other characters (``μ``) are not.  Raises ValueError for NaN and Inf and
    TypeError for objects that JSON does not have, as :func:`json.dumps` does.
    """
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, indent=indent)
    return (CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n").encode()


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def strict_json(value: Any) -> Any:
    """Return plain types with NaN and Inf as the strings "NaN", "Infinity" and "-Infinity"."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    return value


def from_strict_json(value: Any) -> Any:
    """Return what :func:`strict_json` was given, with lists for tuples.

    Raises RecursionError for a value that is nested too deeply."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, Mapping):
        return {key: from_strict_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_strict_json(item) for item in value]
    return value
