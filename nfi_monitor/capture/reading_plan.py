"""Define the plan of a reading: how many rows, coordinates and classes the hooks read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReadingPlan:
    """The size of the readings from the next step on.

    :class:`~nfi_monitor.capture.head_probe.HeadProbe` and
    :class:`~nfi_monitor.capture.optimizer.OptimizerReader` follow it.  The engine makes it from the
    decision of the schedule and from the agreement of the ranks.
    """

    reduced_sample: bool = False
    """Read one in :data:`~nfi_monitor.capture.sampling.REDUCTION` of the rows and coordinates."""
    row_slots: int = 0
    """Maximum number of rows exchanged per step for class-sharded logits; 0: none."""
    head_outputs: int | None = None
    """K if the head's weight is sharded along its classes; None if this process holds all classes."""
    head_summed: bool = False
    """Whether the ranks add up their sums over the classes of a sharded head."""
