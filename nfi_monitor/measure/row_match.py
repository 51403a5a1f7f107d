"""Check whether two neighbouring steps show the same rows.

A change of the feature mean is a movement of the layers below the head only where both steps have the same
rows.  Another minibatch, or another dropout mask, changes the mean as well.  So a few numbers of each row are
kept and compared with those at the same places one step later.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from nfi_monitor.capture import devices

WIDTH = 4
"""Numbers kept of each row."""


def row_sketch(features: Tensor) -> Tensor:
    """Return WIDTH numbers of each row, [n, d] → [n · WIDTH]: its features along fixed directions."""
    return (features @ directions(features.shape[1], features.dtype, str(features.device))).flatten()


def row_sketch_of(features: Tensor | None) -> Tensor | None:
    """Return the sketch of features [n, d], or None where fewer than two rows are known."""
    return None if features is None or len(features) < 2 else row_sketch(features)


def row_match(now: Tensor, before: Tensor) -> Tensor:
    """Return the correlation of two sketches [n · WIDTH] over their rows, a scalar tensor.

    Near 1 for the same rows, near 0 for others, also where all features have grown meanwhile.  0 if the
    numbers of rows differ; NaN for a single row, or where all rows are alike.
    """
    if now.shape != before.shape:
        return torch.zeros((), dtype=now.dtype, device=now.device)
    one, two = _centred(now), _centred(before.to(now.dtype))
    return torch.dot(one / torch.linalg.vector_norm(one), two / torch.linalg.vector_norm(two))


def _centred(sketch: Tensor) -> Tensor:
    """Subtract each number's mean over the rows. [n · WIDTH] → the same."""
    rows = sketch.view(-1, WIDTH)
    return (rows - rows.mean(0)).flatten()


@lru_cache(maxsize=8)
def directions(width: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return WIDTH fixed directions [d, WIDTH], without the random state that the training uses."""
    places = torch.arange(1, width + 1, dtype=torch.float64, device="cpu").unsqueeze(1)
    steps = (
        torch.arange(1, WIDTH + 1, dtype=torch.float64, device="cpu") * 2.399963
    )  # golden angle: no two are alike
    return devices.send(torch.cos(places * steps), torch.device(device), dtype)
