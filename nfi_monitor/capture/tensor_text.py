"""Write vectors as text for checkpoints: every bit is kept, also in JSON."""

from __future__ import annotations

import base64

import numpy as np
import torch
from torch import Tensor


def to_text(tensor: Tensor) -> str:
    """Return a vector [N], float32 or float64, as ``float32:base64``. Waits for its device."""
    array = tensor.detach().cpu().contiguous().numpy()
    return f"{array.dtype}:{base64.b64encode(array.tobytes()).decode()}"


def from_text(text: str, device: torch.device) -> Tensor:
    """Return the vector that :func:`to_text` wrote. Raises ValueError for other text."""
    dtype, _, data = text.partition(":")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"not a vector: {text[:40]!r}")
    return torch.from_numpy(np.frombuffer(base64.b64decode(data), dtype=dtype).copy()).to(device)
