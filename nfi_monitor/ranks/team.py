"""Add up small vectors over the monitors of several ranks.

The ranks of a team do this once per measured step, in the optimizer's post-step hook.  They use their own
gloo channel, never the training's process group.  The number of collectives may differ between ranks: a
monitor may be on rank 0 alone, or closed, or a rank may have skipped a step.  In the training's process
group, such a collective would pair with the next gradient and corrupt or hang the run.  On the own channel
the monitor only waits for a bounded time, and then reads each rank alone; the training goes on.

The ranks agree once whether they form a team, through the store of the process group.  Either all ranks have
attached, or each watches its own rows.  There is a deadline, because a rank that never attaches cannot
answer.
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
"""Seconds that the attached ranks wait, once, for the other ranks to attach."""

TIMEOUT = 120.0
"""Maximum seconds of one exchange. The ranks have just finished a collective of the training, so a rank is
late only if it skipped the step or died."""

CLOSING = 2.0
"""Seconds that a closing monitor waits for the others to close at the same step, to judge the last losses."""

_ATTACHED: Counter[str] = Counter()


class Team:
    """The monitors of several ranks that watch one model.

    Args:
        ranks: global ranks, ascending, including this process's rank.
        name: text made of the head and the layout of the vector. Monitors with different names never form a
            team, so no vector is misread. The n-th monitor with a name joins the n-th of each other rank.
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
        """Return whether all ranks have attached. The first call waits for them, and decides for all ranks.

        Raises an error of gloo if they have attached but cannot be reached.
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
            self.together = False  # until the channel is open
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
        """Return whether the other ranks wait for this one, so that it must announce that it leaves."""
        if self.together is None:
            self.together = self._settle("alone")
            # The others may have agreed already, while this rank had not yet come to its first step.
            if self.together:
                self.together = None
                return self.meet()
        return self.together

    def all_close(self, step: int) -> bool:
        """Return whether all ranks close their monitors after this step. Waits :data:`CLOSING` at most."""
        key = f"closing/{step}"
        deadline = time.monotonic() + CLOSING
        here = int(self._store.add(key, 1))
        while (
            here < self.world and time.monotonic() < deadline and not self._store.check([f"{key}/decision"])
        ):
            time.sleep(0.005)
            here = int(self._store.add(key, 0))
        return self._settle("together" if here >= self.world else "alone", f"{key}/decision")

    def disband(self) -> None:
        self.together = False
        self._channel = None

    def _settle(self, proposal: str, key: str = "decision") -> bool:
        """Return whether the ranks act together: the first proposal of any rank is the decision."""
        decided: Any = self._store.compare_set(key, "", proposal)
        return (decided.decode() if isinstance(decided, bytes) else decided) == "together"
