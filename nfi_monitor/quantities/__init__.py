"""List all measured quantities, with one declaration each.

A declaration holds the unit, meaning and range of a quantity, its labels, charts and columns, how it is
merged, and its test.  A name that is not here cannot be recorded.  To add a quantity, add a declaration to
:mod:`.rows` or :mod:`.step` and put its function into a file in ``nfi_monitor/measure/``.
"""

from __future__ import annotations

from nfi_monitor.quantities.declaration import Merge, PerRow, Quantity, Undefined
from nfi_monitor.quantities.rows import ROWS
from nfi_monitor.quantities.step import MEANS, RUN, SECOND_MOMENT, UPDATES

__all__ = ["QUANTITIES", "READING_ORDER", "Merge", "PerRow", "Quantity", "Undefined", "merged_by"]

QUANTITIES: dict[str, Quantity] = {
    quantity.name: quantity for quantity in (*ROWS, *MEANS, *SECOND_MOMENT, *UPDATES, *RUN)
}
"""By name, in the order of the catalogue."""

READING_ORDER: tuple[Quantity, ...] = tuple(sorted(QUANTITIES.values(), key=lambda quantity: quantity.place))
"""In the order in which people read them: tables, columns, curves of a chart."""


def merged_by(*merges: Merge) -> tuple[str, ...]:
    """Return the names of the quantities that are merged in one of these ways, in the catalogue's order."""
    return tuple(name for name, quantity in QUANTITIES.items() if quantity.merge in merges)
