"""What was measured, in bounded memory: two columns a quantity (steps, values), thinned as they grow.

A run of a million steps must not cost a million Python dicts.  Quantities keep their own steps because most
readings hold only a few of them (between full readings, the loss alone).  When a column reaches its limit,
about half of its older half goes: what stays is the first of every so many steps, so that the recent past
keeps its full resolution and the distant past one that is the same from the beginning on.  (A ring buffer
lost: the beginning of a run is what people plot first.  So did dropping every second entry: pass after pass
halves the oldest again, until nothing of the beginning is left.)
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nfi_monitor.quantities import QUANTITIES


class History:
    """Append-only readings. ``history[name] -> (steps int64 [T], values float64 [T])``.

    Steps at which the quantity was not measured are left out; NaN and Inf that *were* measured stay.
    Raises KeyError, listing the known names, for a name that is no quantity.
    """

    def __init__(self, max_rows: int = 32_768) -> None:
        if max_rows < 4:
            raise ValueError(f"History(max_rows={max_rows}): at least 4 rows are needed to thin a history.")
        self._max_rows = max_rows
        self._columns: dict[str, tuple[array[int], array[float]]] = {}
        self._readings = 0

    def append(self, step: int, values: Mapping[str, float]) -> None:
        self._readings += 1
        for name, value in values.items():
            column = self._columns.get(name)
            if column is None:
                if name not in QUANTITIES:
                    raise KeyError(self._unknown(name))
                column = self._columns[name] = (array("q"), array("d"))
            elif len(column[0]) >= self._max_rows:
                column = self._columns[name] = _thinned(*column)
            column[0].append(step)
            column[1].append(value)

    def cut(self, last: int) -> None:
        """Forget what was measured after step ``last``."""
        for name, (steps, values) in list(self._columns.items()):
            kept = np.array(steps, dtype=np.int64) <= last
            if kept.any():
                self._columns[name] = (
                    array("q", np.array(steps, dtype=np.int64)[kept].tobytes()),
                    array("d", np.array(values, dtype=np.float64)[kept].tobytes()),
                )
            else:
                del self._columns[name]

    def __getitem__(self, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if name not in self._columns:
            if name in QUANTITIES:
                return np.empty(0, np.int64), np.empty(0, np.float64)
            raise KeyError(self._unknown(name))
        # Copies: a view would lock the arrays against growing while the caller holds it.
        steps, values = self._columns[name]
        return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        """Number of readings taken in, thinned ones included."""
        return self._readings

    def names(self) -> list[str]:
        """Names recorded so far, in the order of the catalogue."""
        return [name for name in QUANTITIES if name in self._columns]

    def last(self, name: str) -> float:
        """The newest value of a quantity; NaN if there is none yet."""
        column = self._columns.get(name)
        return column[1][-1] if column is not None else math.nan

    def _unknown(self, name: str) -> str:
        return f"{name!r} is not a measured quantity. Known: {', '.join(self.names() or QUANTITIES)}."


def _thinned(steps: array[int], values: array[float]) -> tuple[array[int], array[float]]:
    half = len(steps) // 2
    old = np.array(steps[:half], dtype=np.int64)
    buckets = old // thinning_interval(old)
    first = np.concatenate([[True], np.diff(buckets) != 0])
    kept_values = np.array(values[:half], dtype=np.float64)[first]
    return (
        array("q", old[first].tobytes()) + steps[half:],
        array("d", kept_values.tobytes()) + values[half:],
    )


def thinning_interval(steps: np.ndarray[Any, Any]) -> int:
    """The smallest power of two such that about half of the ``steps`` int64 [T] are the first of so many."""
    every = 1
    while every < 1 << 40 and 2 * (1 + np.count_nonzero(np.diff(steps // every))) > len(steps) + 2:
        every *= 2
    return every
