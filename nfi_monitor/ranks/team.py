"""A line between the monitors of several ranks, over which they add up small vectors.

The ranks of a team add up small vectors, once per measured step, in the optimizer's post-step hook.  They
do so over a gloo channel of their own, never over the training's process group: a collective too few or too
many there (a monitor on rank 0 alone, one that was closed, a rank that skipped a step) would pair with the
next gradient and corrupt or hang the run.  On a channel of their own it costs the monitor a bounded wait and
its view of the other ranks, and the training nothing.

Whether a team comes about is agreed once, through the store that the process group was made with: all ranks
attached, or each watches its own rows.  A rank that never attaches cannot be asked, hence the deadline.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from nfi_monitor.ranks.processes import rank

WAIT = 30.0
"""Seconds that the ranks which attached wait, once, for those that have not."""

TIMEOUT = 120.0
"""Seconds that one exchange may take. The ranks have just finished a collective of the training's: only one
that skipped the step, or died, is late."""

_ATTACHED: Counter[str] = Counter()


class Team:
    """The monitors of several ranks that watch one model.

    Args:
        ranks: global ranks, ascending, this process's among them.
        name: what the monitors have in common (head, layout of what is exchanged): monitors of different
            names never meet, so that no exchange is misread.  The n-th monitor of a name meets the n-th.
        wait, timeout: seconds, see :data:`WAIT` and :data:`TIMEOUT`.
    """

    def __init__(
        self, ranks: tuple[int, ...], name: str, *, wait: float | None = None, timeout: float | None = None
    ) -> None:
        key = hashlib.sha256(f"{ranks} {name}".encode()).hexdigest()[:16]
        _ATTACHED[key] += 1
        store = distributed_c10d._get_default_store()
        self._store = distributed_c10d.PrefixStore(f"nfi_monitor/{key}/{_ATTACHED[key]}", store)
        self.ranks = ranks
        self.index = ranks.index(rank())
        self.world = len(ranks)
        self.here = int(self._store.add("attached", 1))
        self.together: bool | None = None
        """None until it is decided."""
        self._wait = WAIT if wait is None else wait
        self._timeout = TIMEOUT if timeout is None else timeout
        self._channel: Any = None

    def meet(self) -> bool:
        """Whether all ranks are here; decided once, for all alike. The first call waits for the others.

        Raises what gloo raises where they are, but cannot be reached.
        """
        if self.together is not None:
            return self.together
        deadline = time.monotonic() + self._wait
        while True:
            self.here = int(self._store.add("attached", 0))
            if self.here >= self.world:
                self.together = self._settle("together")
                break
            if time.monotonic() >= deadline or self._store.check(["decision"]):
                self.together = self._settle("alone")
                break
            time.sleep(0.01)
        if self.together:
            self.together = False  # until the channel stands
            self._channel = dist.ProcessGroupGloo(
                distributed_c10d.PrefixStore("channel", self._store),
                self.index,
                self.world,
                timedelta(seconds=self._timeout),
            )
            self.together = True
        return self.together

    def add_up(self, numbers: Tensor) -> Callable[[], Tensor]:
        """Start adding ``numbers``, float64 on the CPU, over the ranks; call the result to wait for the sum.

        The sum is the same to the last bit on every rank: each part of it is added up on one rank and passed
        on.  Raises RuntimeError when a rank is gone or late.
        """
        work = self._channel.allreduce([numbers])

        def finish() -> Tensor:
            work.wait()
            return numbers

        return finish

    def leave(self) -> bool:
        """Whether the others count on this rank and have to be told, by its next exchange, that it leaves."""
        if self.together is None:
            self.together = self._settle("alone")
            # The others may have agreed already, while this rank had not yet come to its first step.
            if self.together:
                self.together = None
                return self.meet()
        return self.together

    def disband(self) -> None:
        self.together = False
        self._channel = None

    def _settle(self, proposal: str) -> bool:
        """The first proposal of all ranks stands."""
        decided: Any = self._store.compare_set("decision", "", proposal)
        return (decided.decode() if isinstance(decided, bytes) else decided) == "together"
