"""The way a reading goes: tensors in, quantities by name out."""

from __future__ import annotations

from torch import Tensor

from nfi_monitor.measure.native_rows import row_statistics
from nfi_monitor.measure.rows import finish


def quantities(grad: Tensor, logits: Tensor, rows: int | None = None) -> dict[str, float]:
    """What the monitor records of one backward pass."""
    statistics = row_statistics(grad, logits, len(grad) if rows is None else rows)
    return finish(statistics.sums.tolist(), statistics.maxima.tolist(), single_output=False)


def absorbed_rows(grad: Tensor, logits: Tensor) -> Tensor:
    """bool [N]"""
    absorbed = row_statistics(grad, logits, len(grad)).absorbed
    assert absorbed is not None
    return absorbed > 0
