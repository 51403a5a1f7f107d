"""Reduce what is drawn to what a figure's pixels can show: curves, spans and places."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

BINS = 1_500
"""About one for each pixel of the figure's width."""

Array = np.ndarray[Any, Any]


def thin(steps: Array, values: Array, bins: int = BINS) -> tuple[Array, Array]:
    """Return at most ``2 * bins`` points: each bin's smallest and largest value, in step order.

    Taking every n-th point instead would lose a slingshot of three steps.
    """
    if len(steps) <= 2 * bins:
        return steps, values
    size = -(-len(steps) // bins)
    padded = np.full(size * bins, np.nan)
    padded[: len(values)] = np.where(np.isfinite(values), values, np.nan)
    blocks = padded.reshape(bins, size)
    rows = np.flatnonzero(~np.isnan(blocks).all(axis=1))
    low = rows * size + np.where(np.isnan(blocks[rows]), np.inf, blocks[rows]).argmin(axis=1)
    high = rows * size + np.where(np.isnan(blocks[rows]), -np.inf, blocks[rows]).argmax(axis=1)
    # A bin without a finite value stays as one NaN, so that the line has a gap.
    empty = np.flatnonzero(np.isnan(blocks).all(axis=1)) * size
    keep = np.unique(np.concatenate([low, high, empty[empty < len(values)]]))
    return steps[keep], values[keep]


def joined(spans: Iterable[tuple[int, int]], bins: int = BINS) -> list[tuple[int, int]]:
    """Return (start, length) of the spans, those joined that are nearer to each other than a pixel."""
    ordered = sorted(spans)
    if len(ordered) <= bins:
        return ordered
    pixel = (ordered[-1][0] + ordered[-1][1] - ordered[0][0]) / bins
    found = [ordered[0]]
    for start, length in ordered[1:]:
        first, before = found[-1]
        if start - first - before < pixel:
            found[-1] = (first, max(before, start + length - first))
        else:
            found.append((start, length))
    return found


def apart(places: Iterable[int], bins: int = BINS) -> list[int]:
    """Return the places without those that are nearer to the one before than a pixel."""
    return [start for start, _ in joined(((place, 0) for place in places), bins)]
