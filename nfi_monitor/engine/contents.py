"""Describe the packed vector of a reading, and turn it into quantities when it has arrived on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from nfi_monitor.measure.late.packing import Failed, Outline
from nfi_monitor.measure.late.rows import RowTotals, add_late
from nfi_monitor.measure.rows import MAXIMA, SUMS, RowStatistics, finish

_ROW_WIDTH = len(SUMS) + len(MAXIMA)


class Contents(NamedTuple):
    """A packed vector: row sums and maxima if ``rows``, ``late_rows``, ``late_step``, then ``names``."""

    step: int
    rows: bool
    names: tuple[str, ...]
    known: dict[str, float]
    """Quantities that are not in the vector, because the host knows them already."""
    single_output: bool
    late_rows: Sequence[Outline[RowStatistics]] = ()
    late_step: Outline[dict[str, float]] | None = None
    absorbed: Callable[[Mapping[int, int]], None] = lambda counts: None
    """Called with the absorbed rows of ``late_rows`` by class."""

    def unpack(self, vector: Tensor | None, failed: Failed) -> dict[str, float]:
        """Return the quantities by name. ``failed`` gets errors.

        ``vector``: on the host; None if all is ``known``.
        """
        if vector is None:
            return self.known
        if self.late_rows or self.late_step is not None:
            return self._finish(vector, failed)
        values, numbers = dict(self.known), vector.tolist()
        if self.rows:
            values |= self._of_rows(numbers[: len(SUMS)], numbers[len(SUMS) : _ROW_WIDTH])
            numbers = numbers[_ROW_WIDTH:]
        return values | dict(zip(self.names, numbers, strict=True))

    def _finish(self, numbers: Tensor, failed: Failed) -> dict[str, float]:
        """Measure what the device has only reduced."""
        values = dict(self.known)
        totals = None
        if self.rows:
            totals = RowTotals(numbers[: len(SUMS)], numbers[len(SUMS) : _ROW_WIDTH])
            numbers = numbers[_ROW_WIDTH:]
        totals, counts, numbers = add_late(totals, self.late_rows, numbers, failed)
        if totals is not None:
            values |= self._of_rows(totals.sums.tolist(), totals.maxima.tolist())
        if counts:
            self.absorbed(counts)
        if self.late_step is not None:
            measured, numbers = self.late_step.read(numbers, failed)
            values |= measured or {}
        return values | dict(zip(self.names, numbers.tolist(), strict=True))

    def _of_rows(self, sums: Sequence[float], maxima: Sequence[float]) -> dict[str, float]:
        return finish(sums, maxima, single_output=self.single_output)
