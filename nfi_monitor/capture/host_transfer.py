"""Copy packed numbers to the host without making the device wait.

On a CPU a tensor is read at once.  On an accelerator it is copied into pinned memory, after the step's own
kernels, and read at a later step, when the copy is complete.  So the training never waits for the monitor,
and the monitor reports one or two steps late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from nfi_monitor.capture import devices

PENDING = 64
"""Maximum number of copies in flight; beyond it, wait for the oldest. This bounds the memory."""


class HostTransfer:
    """Queue of copies: ``put`` a packed vector with its label, ``take`` the vectors that have arrived."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Any, Tensor | None, Any]] = deque()

    @property
    def waiting(self) -> bool:
        """Whether the queue is not empty."""
        return bool(self._pending)

    def put(self, label: Any, packed: Tensor | None) -> None:
        """Add a vector to the queue; None if the host knows all that the label stands for."""
        if packed is None:
            self._pending.append((label, None, None))
            return
        if devices.late_module(packed.device) is None:
            self._pending.append((label, packed, None))  # on the host, or read when it is taken
            return
        host, device = devices.copy_late(packed)
        self._pending.append((label, host, None if device is None else devices.event(device)))

    def take(
        self, *, everything: bool = False, due: Callable[[Any], bool] | None = None
    ) -> list[tuple[Any, Any]]:
        """Return label and vector (or None) of those that have arrived on the host, oldest first.

        ``everything``: wait for all.

        ``due(label)``: if given, return exactly the vectors for which it is true, and wait for them.
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
            arrived.append((label, None if host is None else host.cpu()))
        return arrived
