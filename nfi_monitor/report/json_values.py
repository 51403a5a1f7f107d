"""Anything → what strict JSON can hold: one place, so that live and offline reports see the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from nfi_monitor.report.terminal import CONTROL


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


def json_line(record: object, indent: int | None = None) -> bytes:
    """One line (without ``indent``) of strict JSON. Control characters are escaped in it, ``μ`` is not.

    Raises ValueError for NaN and Inf, as :func:`json.dumps` does, and TypeError for what is not plain.
    """
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, indent=indent)
    return (CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n").encode()
