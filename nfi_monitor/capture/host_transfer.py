"""Bring packed numbers to the host without making the device wait.

On a CPU a tensor is read at once.  On an accelerator it is copied into pinned memory behind the step's
own kernels and read at a later step, when its event has passed: the training never waits for the
monitor, and the monitor speaks a step or two late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nfi_monitor.capture import devices

PENDING = 64
"""Copies in flight before the oldest is waited for: bounds memory if nobody ever synchronises."""


class HostTransfer:
    """First in, first out: ``put`` a packed vector with its label, ``take`` those that have arrived."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Any, Tensor, Any]] = deque()

    @property
    def waiting(self) -> bool:
        """Whether something has not been taken yet."""
        return bool(self._pending)

    def put(self, label: Any, packed: Tensor) -> None:
        if devices.on_host(packed):
            self._pending.append((label, packed, None))
            return
        if packed.device.type == "cuda":
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            host.copy_(packed, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(packed.device))
            self._pending.append((label, host, event))
            return
        self._pending.append((label, packed, None))  # no events to ask: read when it is taken

    def take(
        self, *, everything: bool = False, due: Callable[[Any], bool] | None = None
    ) -> list[tuple[Any, list[float]]]:
        """What has arrived, oldest first; with ``everything``, wait for the rest.

        ``due(label)``: wait for these, and leave the others even where they have arrived.
        """
        arrived = []
        while self._pending:
            label, host, event = self._pending[0]
            if due is not None and not due(label):
                break
            if event is not None and (due is not None or not event.query()):
                if due is None and not everything and len(self._pending) <= PENDING:
                    break
                event.synchronize()
            self._pending.popleft()
            arrived.append((label, host.tolist()))
        return arrived
