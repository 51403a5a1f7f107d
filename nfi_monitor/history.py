"""What was measured, in bounded memory: one column a quantity, thinned as it grows.

A run of a million steps must not cost a million Python dicts.  Columns are ``array('d')``; when the
row limit is reached every second row of the older half is dropped, so that the recent past keeps its
full resolution and the distant past keeps its shape.  (A ring buffer lost: the beginning of a run is
what people plot first.)
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nfi_monitor.quantities import QUANTITIES


class History:
    """Append-only table of readings. ``history[name] -> (steps int64 [T], values float64 [T])``.

    Steps at which the quantity was not measured are left out; NaN and Inf that *were* measured stay.
    Raises KeyError, listing the known names, for a name that is no quantity.
    """

    def __init__(self, max_rows: int = 65_536) -> None:
        if max_rows < 4:
            raise ValueError(f"History(max_rows={max_rows}): at least 4 rows are needed to thin a history.")
        self._max_rows = max_rows
        self._steps = array("q")
        self._columns: dict[str, array[float]] = {}
        # NaN is a value that can be measured, so absence needs a mark of its own.
        self._absent: dict[str, bytearray] = {}

    def append(self, step: int, values: Mapping[str, float]) -> None:
        rows = len(self._steps)
        if rows >= self._max_rows:
            self._thin()
            rows = len(self._steps)
        self._steps.append(step)
        for name, value in values.items():
            column = self._columns.get(name)
            if column is None:
                if name not in QUANTITIES:
                    raise KeyError(self._unknown(name))
                column = self._columns[name] = array("d", [math.nan]) * rows
                self._absent[name] = bytearray(b"\x01") * rows
            column.append(value)
            self._absent[name].append(0)
        for name, column in self._columns.items():
            if len(column) == rows:
                column.append(math.nan)
                self._absent[name].append(1)

    def __getitem__(self, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if name not in self._columns:
            if name in QUANTITIES:
                return np.empty(0, np.int64), np.empty(0, np.float64)
            raise KeyError(self._unknown(name))
        # Copies: a view would lock the arrays against growing while the caller holds it.
        present = np.array(self._absent[name], dtype=np.uint8) == 0
        steps = np.array(self._steps, dtype=np.int64)
        return steps[present], np.array(self._columns[name], dtype=np.float64)[present]

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        """Number of readings kept."""
        return len(self._steps)

    def names(self) -> list[str]:
        """Names recorded so far, in the order of the catalogue."""
        return [name for name in QUANTITIES if name in self._columns]

    def _thin(self) -> None:
        half = len(self._steps) // 2
        self._steps = self._steps[:half:2] + self._steps[half:]
        for name, column in self._columns.items():
            self._columns[name] = column[:half:2] + column[half:]
            absent = self._absent[name]
            self._absent[name] = absent[:half:2] + absent[half:]

    def _unknown(self, name: str) -> str:
        return f"{name!r} is not a measured quantity. Known: {', '.join(self.names() or QUANTITIES)}."
