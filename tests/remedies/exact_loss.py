"""The exact loss of a row, and the two short ways to compute a few rows: the C library and NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfi_monitor.native import library

ULP = 2.0**-24
WAYS = [False] if library.library() is None else [False, True]
"""Whether the C library computes a few rows, or NumPy."""


def exact(logits: Tensor, target: int) -> tuple[float, np.ndarray[Any, Any]]:
    """Loss and gradient of one row in 80-bit arithmetic, by another formula: everything against z_r."""
    z = logits.double().numpy().astype(np.longdouble)
    ratios = np.exp(np.delete(z, target) - z[target])
    rest = ratios.sum()
    gradient = np.insert(ratios / (1 + rest), target, -rest / (1 + rest))
    return float(np.log1p(rest)), gradient


@contextmanager
def way(native: bool) -> Iterator[None]:
    """Let NumPy compute a few rows inside this block, unless ``native``."""
    with nullcontext() if native else library.disabled():
        yield


def row(margin: float, classes: int, ties: int, generator: torch.Generator) -> Tensor:
    """Target 0 at ``margin`` above its strongest rivals, of which there are ``ties``."""
    logits = -5.0 - 10.0 * torch.rand(classes, generator=generator)
    logits[1 : 1 + ties] = 0.0
    logits[0] = margin
    return logits
