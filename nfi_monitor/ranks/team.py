"""Add up small vectors over the monitors of several ranks.

The ranks of a team do so once per measured step, in the optimizer's post-step hook.  They use a gloo channel
of their own, never the training's process group.  There a collective too few or too many (a monitor on rank 0
alone, a closed one, a rank that skipped a step) would pair with the next gradient and corrupt or hang the
run.  On their own channel it costs the monitor a bounded wait and its view of the other ranks; training goes
on.

The ranks agree once whether they form a team, through the store that the process group was made with.  Either
all ranks attached, or each watches its own rows.  A rank that never attaches cannot answer, hence the
deadline.
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
"""Seconds that one exchange may take. The ranks have just finished a collective of the training, so only a
rank that skipped the step, or died, is late."""

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
        """Whether the ranks form a team; None until that is decided."""
        self._wait = WAIT if wait is None else wait
        self._timeout = TIMEOUT if timeout is None else timeout
        self._channel: Any = None

    def meet(self) -> bool:
        """Return whether all ranks attached. The first call waits for them, and decides for all ranks.

        Raises what gloo raises if they attached, but cannot be reached.
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

        The sum is the same to the last bit on every rank: one rank adds up each part and sends it to the
        others.  Raises RuntimeError if a rank is gone or late.
        """
        work = self._channel.allreduce([numbers])

        def finish() -> Tensor:
            work.wait()
            return numbers

        return finish

    def leave(self) -> bool:
        """Return whether the others wait for this rank, so that its next exchange must say that it leaves."""
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
        """Return whether the team stands: the first proposal of any rank is the decision."""
        decided: Any = self._store.compare_set("decision", "", proposal)
        return (decided.decode() if isinstance(decided, bytes) else decided) == "together"
