"""Turn the sum of the ranks' vectors into the joint reading of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from nfi_monitor.measure.sharded.rows import JoinedRows
from nfi_monitor.ranks.layout import LARGEST, MEANS, OWN, Layout


@dataclass
class Reduced:
    """The joint reading of one step. ``values`` is empty if no rank measured anything."""

    step: int
    values: dict[str, float]
    losses: list[tuple[int, float]]
    """(step, loss) since the last reading, oldest first."""
    skipped: bool
    single_output: bool
    failed: list[int] = field(default_factory=list)
    """Indices of ranks on which a part of the monitor failed; their numbers are missing."""
    left: list[int] = field(default_factory=list)
    """Indices of ranks that leave after this exchange."""
    joined_rows: JoinedRows | None = None
    """Rows whose classes are on several ranks; None if there are none."""
    out_of_step: list[int] = field(default_factory=list)
    """Indices of ranks that are at another optimizer step. The ranks cannot be read together then."""
    only_losses: bool = False
    """Whether only the losses count: the last message before all ranks close."""


def finish_values(layout: Layout, vector: Tensor, line: Mapping[str, Tensor]) -> dict[str, float]:
    """Return quantities that each rank measures alone: means, maxima and those of the first rank.

    ``line``: name → each rank's own number [world], −∞ where a rank has none.
    """
    values: dict[str, float] = {}
    counts = layout.cut(vector, "mean_counts").tolist()
    for name, total, count in zip(MEANS, layout.cut(vector, "means").tolist(), counts, strict=True):
        if count > 0:
            values[name] = total / count
    values |= {name: _first(line[name]) for name in OWN if _any(line[name])}
    values |= {name: float(line[name].amax()) for name in LARGEST if _any(line[name])}
    return values


def finish_losses(layout: Layout, vector: Tensor, step: int, *, wide: bool) -> list[tuple[int, float]]:
    """Return (step, mean loss over the ranks that had one), newest first.

    ``wide``: a rank has float64 losses.
    """
    # The mean of float32 losses is a float32, as one process would have it.
    counted = layout.cut(vector, "loss_counts")
    means = layout.cut(vector, "losses") / counted
    means = means if wide else means.float()
    return [
        (step - slot, loss)
        for slot, (loss, count) in enumerate(zip(means.tolist(), counted.tolist(), strict=True))
        if count > 0
    ]


def _any(values: Tensor) -> bool:
    return bool((values != -math.inf).any())


def _first(values: Tensor) -> float:
    return next(float(value) for value in values.tolist() if value != -math.inf)


def indices(condition: Tensor) -> list[int]:
    return [index for index, holds in enumerate(condition.tolist()) if holds]
