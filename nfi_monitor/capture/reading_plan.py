"""How much of a step is read, decided once for all that read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReadingPlan:
    """What :class:`~nfi_monitor.capture.head_probe.HeadProbe` and
    :class:`~nfi_monitor.capture.optimizer.OptimizerReader` follow from the next step on.

    The engine makes it from the schedule's decision and from what the ranks agreed on.
    """

    reduced_sample: bool = False
    """Read one in :data:`~nfi_monitor.capture.sampling.REDUCTION` of the rows and coordinates."""
    row_slots: int = 0
    """Rows per step of class-sharded logits that the ranks put together; 0: none."""
    head_outputs: int | None = None
    """K, where the head's own weight holds only a part of the classes; None where it is whole."""
    head_summed: bool = False
    """Whether what is read of a sharded head is summed over its shards."""
