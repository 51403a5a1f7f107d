"""Keep all readings in bounded memory: two columns for each quantity (steps, values), thinned as they grow.

With one Python dict per step, a run of a million steps would need too much memory.  Each quantity has its own
steps, because most readings hold only a few quantities (between full readings, the loss alone).  When a
column reaches its limit, about half of the entries in its older half are removed.  Steps are divided into
intervals of equal length, and the first entry of each interval stays.  So recent entries keep their full
resolution, and all old entries have the same, coarser one.  (A ring buffer was tried: it loses the beginning
of a run, which people plot first. Removing every second entry was tried: each pass halves the oldest again,
until the beginning is gone.)
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nfi_monitor.quantities import QUANTITIES

TOGETHER = 16
"""Number of readings that are added to the columns together."""


class History:
    """Readings by quantity: ``history[name] -> (steps int64 [T], values float64 [T])``.

    Steps at which the quantity was not measured are absent; NaN and Inf that *were* measured are kept.
    Raises KeyError for a name that is not a quantity, and lists the known ones.
    """

    def __init__(self, max_rows: int = 32_768) -> None:
        if max_rows < 4:
            raise ValueError(f"History(max_rows={max_rows}): at least 4 rows are needed to thin a history.")
        self._max_rows = max_rows
        self._filled: dict[str, tuple[array[int], array[float]]] = {}
        self._waiting: list[tuple[int, Mapping[str, float]]] = []
        self._filling = False
        self._readings = 0
        self.full_readings = 0
        """Number of readings with more than the loss that were added, removed ones included."""

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add the reading of one step. Raises KeyError for a name that is not a quantity.

        ``values`` must not be changed afterwards: several readings are added to the columns together, which
        takes a third of the time.
        """
        if not values.keys() <= QUANTITIES.keys():
            raise KeyError(self._unknown(next(name for name in values if name not in QUANTITIES)))
        self._readings += 1
        self.full_readings += len(values) != 1 or "loss" not in values
        self._waiting.append((step, values))
        if len(self._waiting) >= TOGETHER:
            self._fill()

    def _fill(self) -> None:
        """Add the readings that wait to the columns. An interrupt loses none of them."""
        waiting, columns = self._waiting, self._filled
        if self._filling:
            self._remove_half_added(*waiting[0])
        self._filling = True
        while waiting:
            step, values = waiting[0]
            for name, value in values.items():
                column = columns.get(name)
                if column is None:
                    column = columns[name] = (array("q"), array("d"))
                elif len(column[0]) >= self._max_rows:
                    column = columns[name] = _thinned(*column)
                column[0].append(step)
                column[1].append(value)
            del waiting[0]
        self._filling = False

    def _remove_half_added(self, step: int, values: Mapping[str, float]) -> None:
        """Remove what an interrupted :meth:`_fill` has added of a reading."""
        for steps, numbers in (self._filled[name] for name in values if name in self._filled):
            both = min(len(steps), len(numbers))
            del steps[both:], numbers[both:]
            if steps and steps[-1] == step:
                steps.pop()
                numbers.pop()

    @property
    def _columns(self) -> dict[str, tuple[array[int], array[float]]]:
        if self._waiting:
            self._fill()
        return self._filled

    def cut(self, last: int) -> None:
        """Remove all entries after step ``last``."""
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
        # Return copies: while the caller holds a view, the arrays cannot grow.
        steps, values = self._columns[name]
        return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        """Return the number of readings that were added, also of the loss alone, removed ones included."""
        return self._readings

    def names(self) -> list[str]:
        """Return the names recorded so far, in the order of ``QUANTITIES``."""
        return [name for name in QUANTITIES if name in self._columns]

    def last(self, name: str) -> float:
        """Return the newest value of a quantity; NaN if there is none yet."""
        column = self._columns.get(name)
        return column[1][-1] if column is not None else math.nan

    def _unknown(self, name: str) -> str:
        return f"{name!r} is not a measured quantity. Known: {', '.join(self.names() or QUANTITIES)}."


def _thinned(steps: array[int], values: array[float]) -> tuple[array[int], array[float]]:
    """Return both columns with about half of the entries of their older half removed."""
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
    """Return the length of the intervals that keep about half of the ``steps`` (int64 [T]).

    It is the smallest power of two for which at most about half of the steps are the first one of an
    interval.
    """
    every = 1
    while every < 1 << 40 and 2 * (1 + np.count_nonzero(np.diff(steps // every))) > len(steps) + 2:
        every *= 2
    return every
