"""Keep the last few snapshots of a run at risk, within a bound on memory.

A replay must begin before the cause of a slingshot takes effect, and that step is unknown beforehand.  So the
monitor keeps several snapshots and drops the oldest.  It copies inside the optimizer's post-step hook, where
weights and moments belong to the same step.  Schedulers and scalers step later: their states are added before
the next step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.capture import devices
from nfi_monitor.capture.foreign_optimizer import ForeignOptimizer
from nfi_monitor.capture.second_moment import states as parameter_states
from nfi_monitor.capture.unwrap import unwrap
from nfi_monitor.replay.snapshots import Snapshot, state_bytes

CHEAP = 16 << 20
"""Maximum bytes of a snapshot with "auto". Copying so much takes some 5 ms."""
KEPT = 4
"""Maximum number of snapshots."""


class RecentSnapshots:
    """Keep snapshots: call ``take`` after a step, and ``complete`` before the next one.

    ``limit``: "auto" keeps snapshots if everything is on the CPU and one takes at most :data:`CHEAP` bytes.
    An int is the maximum bytes of all together, on any device; 0 keeps none.
    """

    def __init__(self, model: nn.Module, optimizer: Any, stateful: Sequence[Any], limit: int | str) -> None:
        foreign = isinstance(optimizer, ForeignOptimizer)
        self._parts: tuple[nn.Module, Any, tuple[Any, ...]] | None = None
        if not foreign:
            self._parts = (model, unwrap(optimizer), tuple(stateful))
        self.limit = limit
        self._kept: deque[tuple[Snapshot, Any]] = deque(maxlen=KEPT)  # with the event that ends its copies
        self._pending: tuple[Snapshot, Any] | None = None
        self._last: int | None = None
        self._size = 0
        self.refused = f"{type(optimizer).__name__} is no torch.optim.Optimizer" if foreign else ""
        """Why no snapshot is kept; empty while they are kept."""

    @property
    def snapshots(self) -> list[Snapshot]:
        """Complete snapshots, oldest first."""
        return [snapshot for snapshot, event in self._kept if event is None or event.query()]

    @property
    def pending(self) -> bool:
        return self._pending is not None

    def clear(self) -> None:
        """Drop all snapshots, because the run goes back to an earlier step, or another run is loaded."""
        self._kept.clear()
        self._pending = self._last = None

    def due(self, step: int, tau: float) -> bool:
        """Return whether the last snapshot is max(2 τ, 20) steps old, or there is none.

        A new *at risk* alert does not matter here: alerts that come and go must not replace all snapshots.
        """
        return self._last is None or step - self._last >= max(round(2 * tau), 20)

    def take(self, step: int, spike: Mapping[str, Any] | None, second_moment_decay: float = 0.0) -> None:
        """Copy the state after ``step``; do nothing if a snapshot would take too much memory."""
        if self._parts is None or self.refused or self.limit == 0:
            return
        self._last = step
        model, optimizer, stateful = self._parts
        size = max(state_bytes(model, optimizer), self._size)
        bound = self._bound(model, optimizer, size)
        if bound is None:
            return
        self._make_room(bound - size)  # before the copy, so that the bound holds during it, too
        pinned = _Pinned()
        snapshot = Snapshot.take(
            step, model, optimizer, stateful, spike, second_moment_decay=second_moment_decay, to_host=pinned
        )
        self._size = snapshot.nbytes  # with stateful objects and random state, which the estimate lacks
        bound = self._bound(model, optimizer, self._size)
        if bound is not None:
            self._make_room(bound - self._size)
            self._pending = (snapshot, pinned.event())

    def complete(self) -> None:
        """Add hyperparameters and stateful objects to the last snapshot. Call it before the next step."""
        if self._pending is None or self._parts is None:
            return
        (snapshot, event), self._pending = self._pending, None
        _, optimizer, stateful = self._parts
        self._kept.append((snapshot.completed(optimizer, stateful), event))

    def close(self) -> None:
        """Drop the references to model, optimizer and stateful objects; keep the copies."""
        try:
            self.complete()
        finally:
            self._parts, self._pending = None, None

    def _make_room(self, left: float) -> None:
        while self._kept and sum(snapshot.nbytes for snapshot, _ in self._kept) > left:
            self._kept.popleft()

    def _bound(self, model: nn.Module, optimizer: Any, size: int) -> float | None:
        """Return the maximum bytes of all snapshots; None, with a reason in ``refused``, if one is larger."""
        if isinstance(self.limit, int):
            if size > self.limit:
                self.refused = (
                    f"a snapshot takes {size / 2**20:.1f} MiB and snapshots={self.limit} allows "
                    f"{self.limit / 2**20:.1f} MiB for all together"
                )
            return None if self.refused else self.limit
        tensors = [*model.parameters(), *model.buffers()]
        states = (value for _, state in parameter_states(optimizer) for value in state.values())
        tensors += [value for value in states if isinstance(value, Tensor)]
        elsewhere = {tensor.device.type for tensor in tensors} - {"cpu"}
        if elsewhere:
            self.refused = (
                f"the model is on {', '.join(sorted(elsewhere))}, and snapshots='auto' works on a CPU only"
            )
        elif size > CHEAP:
            self.refused = f"a snapshot takes {size / 2**20:.0f} MiB, more than snapshots='auto' allows"
        return None if self.refused else float(KEPT * CHEAP)


class _Pinned:
    """Copy tensors to the host without waiting for the device; after ``event`` all copies are complete."""

    def __init__(self) -> None:
        self._device: torch.device | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.device.type == "cpu":
            return tensor.clone()
        host, device = devices.copy_late(tensor)
        self._device = device or self._device
        return host

    def event(self) -> Any:
        return None if self._device is None else devices.event(self._device)
