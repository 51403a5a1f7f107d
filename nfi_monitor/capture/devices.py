"""Tell where a tensor is, and whether it may be read there now.

Reading a number of an accelerator's tensor would make the training wait for it, or fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

GRAPHS = torch.backends.cuda.is_built()
"""Whether this torch supports CUDA graphs. If not, no hook asks whether a graph is being captured."""


def on_host(tensor: Tensor) -> bool:
    """Whether the numbers of ``tensor`` can be read at once."""
    return tensor.device.type == "cpu"


def send(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers, or a tensor of any device, as a tensor on ``device``.

    The copy to CUDA is from pinned memory: from other memory the host would wait until the device has done
    all earlier work.
    """
    tensor = torch.as_tensor(numbers, dtype=dtype)
    late = device.type == "cuda"  # not every other device keeps the source until it is copied
    if late and on_host(tensor):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=late)


def together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return all tensors on one device: that of the first that is not on the host, if there is one.

    So no number is fetched from a device.
    """
    device = next((tensor.device for tensor in tensors if not on_host(tensor)), None)
    return [x if device is None or x.device == device else send(x, device) for x in tensors]


def capturing() -> bool:
    """Whether a CUDA graph is being captured.

    Then kernels are recorded and not run, and using an event, pinned memory or a number makes the capture
    fail.
    """
    return GRAPHS and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def full_precision(tensor: Tensor | None) -> Any:
    """Autocast would turn the monitor's own dot products into half precision, where ``tensor`` is."""
    device = "cpu" if tensor is None else tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
