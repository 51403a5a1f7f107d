"""Describe the packed vector of a reading, and turn it into quantities when it has arrived on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from nfi_monitor.measure.late.packing import Failed, Outline
from nfi_monitor.measure.late.rows import RowTotals, add_late
from nfi_monitor.measure.rows import MAXIMA, SUMS, RowStatistics, finish


@dataclass(frozen=True)
class Contents:
    """A packed vector: row sums and maxima if ``rows``, ``late_rows``, ``late_step``, then ``names``."""

    step: int
    rows: bool
    names: tuple[str, ...]
    known: dict[str, float]
    """Quantities that are not in the vector, because the host knows them already."""
    single_output: bool
    late_rows: list[Outline[RowStatistics]] = field(default_factory=list)
    late_step: Outline[dict[str, float]] | None = None
    absorbed: Callable[[Mapping[int, int]], None] = lambda counts: None
    """Called with the absorbed rows of ``late_rows`` by class."""

    def unpack(self, numbers: Tensor, failed: Failed) -> dict[str, float]:
        """Return the quantities by name. ``numbers``: the vector, on the host. ``failed`` gets errors."""
        values = dict(self.known)
        totals = None
        if self.rows:
            end = len(SUMS) + len(MAXIMA)
            totals = RowTotals(numbers[: len(SUMS)], numbers[len(SUMS) : end])
            numbers = numbers[end:]
        totals, counts, numbers = add_late(totals, self.late_rows, numbers, failed)
        if totals is not None:
            sums, maxima = totals.sums.tolist(), totals.maxima.tolist()
            values |= finish(sums, maxima, single_output=self.single_output)
        if counts:
            self.absorbed(counts)
        if self.late_step is not None:
            measured, numbers = self.late_step.read(numbers, failed)
            values |= measured or {}
        return values | dict(zip(self.names, numbers.tolist(), strict=True))
