"""Add the rows of one rank to its message: sums, maxima, and rows whose sums the host makes later."""

from __future__ import annotations

from torch import Tensor, float64

from nfi_monitor.measure.accumulator import RowAccumulator
from nfi_monitor.measure.late.rows import absorbed_classes
from nfi_monitor.measure.rows import RowStatistics
from nfi_monitor.ranks.layout import FLAGS, Message


def add_rows(message: Message, rows: RowAccumulator, share: float) -> None:
    """Add the rows of a step that were measured whole. ``share``: 1 / number of ranks with the same rows."""
    if rows.measured:
        message.own(FLAGS.index("single_output"), float(bool(rows.single_output)))
    rows.settle()
    if rows.sums is not None and rows.maxima is not None:
        _add(message, rows.sums, rows.maxima, share)

    def add(message: Message, found: RowStatistics) -> None:
        _add(message, found.sums, found.maxima, share)
        rows.count_absorbed(absorbed_classes(found))

    for block in rows.late:
        message.defer(block, add)


def _add(message: Message, sums: Tensor, maxima: Tensor, share: float) -> None:
    message.add("rows", sums if share == 1 else sums * share)
    message.own(len(FLAGS), maxima)
    message.own(FLAGS.index("wide_rows"), float(sums.dtype is float64))
