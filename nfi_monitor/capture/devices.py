"""Where a tensor lies, and whether anything may be read there now.

Reading a number of an accelerator's tensor would make the training wait for it, or fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

GRAPHS = torch.backends.cuda.is_built()
"""Whether this torch knows CUDA graphs: of one that does not, no hook asks whether one is captured."""


def on_host(tensor: Tensor) -> bool:
    """Whether its numbers can be read at once."""
    return tensor.device.type == "cpu"


def send(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, or a tensor wherever it lies, as a tensor on ``device``. On CUDA nobody waits for the copy, as
    for one from memory that is not pinned: until the device has done all that it was given before."""
    tensor = torch.as_tensor(numbers, dtype=dtype)
    late = device.type == "cuda"  # not every other device keeps the source until it is copied
    if late and on_host(tensor):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=late)


def together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """All of them on one device, and no number fetched from another: where the first is that is not on the
    host, if any is."""
    device = next((tensor.device for tensor in tensors if not on_host(tensor)), None)
    return [x if device is None or x.device == device else send(x, device) for x in tensors]


def capturing() -> bool:
    """Whether a CUDA graph is being captured: kernels are recorded and not run, and to ask for an event, for
    pinned memory or for a number makes the capture fail."""
    return GRAPHS and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def full_precision(tensor: Tensor | None) -> Any:
    """Autocast would turn the monitor's own dot products into half precision, where ``tensor`` is."""
    device = "cpu" if tensor is None else tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
