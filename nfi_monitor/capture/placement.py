"""Where a tensor lies, and whether anything may be read there now.

Reading a number of an accelerator's tensor would make the training wait for it, or fail.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRAPHS = torch.backends.cuda.is_built()
"""Whether this torch knows CUDA graphs: of one that does not, no hook asks whether one is captured."""


def on_host(tensor: Tensor) -> bool:
    """Whether its numbers can be read at once."""
    return tensor.device.type == "cpu"


def capturing() -> bool:
    """Whether a CUDA graph is being captured: kernels are recorded and not run, and to ask for an event, for
    pinned memory or for a number makes the capture fail."""
    return GRAPHS and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
