"""Measure changes across slingshots, and across equally long stretches of the same run without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nfi_monitor.types import Thresholds

Array = np.ndarray[Any, Any]


def intervals(
    loss: Array,
    spans: Sequence[tuple[int, int]],
    grid: int,
    change: Callable[[int, int], float],
    seed: int,
    quiet: int = 4,
) -> dict[str, list[float]]:
    """Return ``change(a, b)`` across each slingshot, and across quiet stretches of the same length.

    ``a`` and ``b`` are points of a grid of every ``grid`` steps: the last before the stretch and the first
    after it. ``spans`` are (first step, first step after it) of the slingshots. For each slingshot up to
    ``quiet`` stretches of its length are drawn. They lie between the first loss (of steps 1, 2, …) below 1e-2
    and the end, and touch no slingshot.
    """
    last = len(loss) // grid
    on_grid = [((first - 1) // grid, -(-end // grid)) for first, end in spans]
    on_grid = [(a, b) for a, b in on_grid if b <= last]
    found: dict[str, list[float]] = {"slingshot": [change(a, b) for a, b in on_grid], "quiet": []}
    below = np.flatnonzero(loss < Thresholds.spike_low)
    if not len(below):
        return found
    generator = np.random.default_rng(seed)
    begin = int(below[0]) // grid + 1
    for a, b in on_grid:
        length = b - a
        free = [
            start
            for start in range(begin, last - length + 1)
            if all(start + length < c or start > d for c, d in on_grid)
        ]
        if free:
            picked = generator.choice(free, size=min(quiet, len(free)), replace=False).tolist()
            found["quiet"] += [change(start, start + length) for start in picked]
    return found
