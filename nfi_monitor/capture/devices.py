"""Find the device of a tensor, and whether its numbers may be read now.

To read a number of a tensor on an accelerator, the training would have to wait, or would fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_is_jit_traced, _number_of_modes = torch._C._is_tracing, torch._C._len_torch_dispatch_stack
GRAPHS = torch.backends.cuda.is_built()
"""Whether this torch supports CUDA graphs. If not, no hook checks whether a graph is being captured."""


def on_host(tensor: Tensor) -> bool:
    """Return whether the numbers of ``tensor`` can be read at once."""
    return tensor.device.type == "cpu"


@cache
def _late_module(kind: str) -> Any | None:
    module = getattr(torch, kind, None)
    if kind in ("cpu", "meta") or not (hasattr(module, "Event") and hasattr(module, "current_stream")):
        return None
    try:
        torch.empty(1, device="cpu", pin_memory=True)
    except (RuntimeError, NotImplementedError):  # this torch pins no memory for such a device
        return None
    return module


def late_module(device: torch.device) -> Any | None:
    """Return torch's module of a device that copies while the host goes on, as ``torch.cuda`` is; else None.

    Such a device has streams and events, and the host can pin memory for it.
    """
    return _late_module(device.type)


def copy_late(tensor: Tensor) -> tuple[Tensor, torch.device | None]:
    """Begin to copy a tensor to the host.

    Returns the host's tensor, and the device for :func:`event` if the copy is complete only after that event.
    """
    if late_module(tensor.device) is None:
        return tensor.cpu(), None
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True), tensor.device


def event(device: torch.device) -> Any:
    """Return an event (``query()``, ``synchronize()``) that follows all that was given to the device."""
    module: Any = late_module(device)
    event = module.Event()
    event.record(module.current_stream(device))
    return event


def send(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers, or a tensor on any device, as a tensor on ``device``.

    The copy is from pinned memory. From other memory, the host would wait until the device has done all
    earlier work.
    """
    # Numbers to the host first: torch.set_default_device may name another device.
    tensor = torch.as_tensor(numbers, dtype=dtype, device=None if isinstance(numbers, Tensor) else "cpu")
    late = late_module(device) is not None  # other devices may not keep the source until it is copied
    if late and on_host(tensor):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=late)


def together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return all tensors on one device: the first device that is not the host, if any.

    So no number is copied from a device to the host.
    """
    device = next((tensor.device for tensor in tensors if not on_host(tensor)), None)
    return [x if device is None or x.device == device else send(x, device) for x in tensors]


def capturing() -> bool:
    """Return whether a CUDA graph is being captured.

    Kernels are then recorded and not run.  An event, pinned memory or reading a number would make the capture
    fail.
    """
    return GRAPHS and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_readable(tensor: Tensor, *, meta: bool = False) -> bool:
    """Return whether a tensor has numbers of its own, which only the training's program sees.

    False for a tensor on the meta device (unless ``meta``: the watched model is there), for a fake tensor,
    inside ``vmap`` or ``torch.func.grad``, and while a pass is traced (:func:`is_traced`): the trace would
    also hold what the monitor computes.
    """
    return has_numbers(tensor, meta=meta) and not is_traced()


def has_numbers(tensor: Tensor, *, meta: bool = False) -> bool:
    """Return what :func:`is_readable` does, where :func:`is_traced` was already asked."""
    return not (
        (tensor.is_meta and not meta)
        or isinstance(tensor, FakeTensor)
        or _in_functorch(tensor)
        or tensor.layout is torch.jagged
    )


def is_traced() -> bool:
    """Return whether torch runs this code with fake tensors, or records its operations.

    As ``make_fx`` and ``torch.jit.trace`` do.
    """
    if _is_jit_traced():
        return True
    if not _number_of_modes():
        return False
    keys, mode = torch._C._TorchDispatchModeKey, torch._C._get_dispatch_mode
    return any(mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


_in_functorch: Callable[[Tensor], bool] = getattr(
    torch._C._functorch, "is_functorch_wrapped_tensor", lambda tensor: False
)


def full_precision(tensor: Tensor | None) -> Any:
    """Disable autocast on the tensor's device, which would compute dot products in half precision."""
    device = "cpu" if tensor is None else tensor.device.type
    if device == "meta":  # it has no autocast
        return nullcontext()
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
