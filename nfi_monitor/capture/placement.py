"""Where a tensor lies: reading a number of one on an accelerator would make the training wait for it."""

from __future__ import annotations

from torch import Tensor


def on_host(tensor: Tensor) -> bool:
    """Whether its numbers can be read at once."""
    return tensor.device.type == "cpu"
