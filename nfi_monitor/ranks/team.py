"""Add up small vectors over the monitors of several ranks.

The ranks of a team do this once per measured step, in the optimizer's post-step hook.  They use their own
gloo channel, never the training's process group.  The number of collectives may differ between ranks: a
monitor may be on rank 0 alone, or closed, or a rank may have skipped a step.  In the training's process
group, such a collective would pair with the next gradient and corrupt or hang the run.  On the own channel
the monitor only waits for a bounded time, and then reads each rank alone; the training goes on.

The ranks agree once whether they form a team, through the store of the process group, in the first step
that they read.  Either all ranks come, or each watches its own rows.  There is a deadline, because a rank
without a monitor never comes.

Each agreement has a number.  A rank takes the lowest that is open to it, so ranks that have attached
different numbers of monitors before meet all the same.
"""

from __future__ import annotations

import hashlib
import json
import time
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

TOGETHER, ALONE, APART = "together", "alone", "apart"
"""Decisions. APART: ranks wait for each other in different agreements."""

LOOK = 0.5
"""Seconds between two looks at what the next rank waits for."""


class Team:
    """The monitors of several ranks that watch one model.

    Args:
        ranks: global ranks, ascending, including this process's rank.
        name: text made of the head and the layout of the vector. Monitors with different names never form a
            team, so no vector is misread. The n-th monitor with a name to read a step joins the n-th of each
            other rank.
        wait, timeout: seconds, see :data:`WAIT` and :data:`TIMEOUT`.
    """

    def __init__(
        self, ranks: tuple[int, ...], name: str, *, wait: float | None = None, timeout: float | None = None
    ) -> None:
        self._key = hashlib.sha256(f"{ranks} {name}".encode()).hexdigest()[:16]
        self._default = distributed_c10d._get_default_store()
        self._store: Any = None  # of the agreement, once this rank has chosen one
        self._number = 0
        self.ranks = ranks
        self.index = ranks.index(rank())
        self.world = len(ranks)
        self.here = 0
        self.together: bool | None = None
        """Whether the ranks form a team; None until that is decided."""
        self.apart = False
        """Whether a rank waits for this one in another agreement: it watches something else."""
        self._wait = WAIT if wait is None else wait
        self._timeout = TIMEOUT if timeout is None else timeout
        self._channel: Any = None

    def meet(self) -> bool:
        """Return whether all ranks have come. The first call waits for them, and decides for all ranks.

        Raises an error of gloo if they have come but cannot be reached.
        """
        if self.together is not None:
            return self.together
        self._choose()
        try:
            self.together = self._settle(self._wait_for_all())
        except BaseException:  # Ctrl-C: nobody is to wait for this rank
            self.together = False
            self._settle(ALONE)
            raise
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

    def _choose(self) -> None:
        """Choose the first agreement that is open to this rank.

        It is over for a rank that has chosen it before, and once all that were left alone in it are closed.
        """
        over = True
        while over:
            self._number += 1
            self._store = _agreement(self._default, self._key, self._number)
            over = self._store.check([f"rank {self.index}"])
            if not over and self._store.check(["decision"]):
                over = self._store.add("closed", 0) >= self._store.add("attached", 0)
        self._store.set(f"rank {self.index}", "here")

    def _wait_for_all(self) -> str:
        """Wait for the other ranks; return what to decide. They decide alone if one does not come in time."""
        self.here = int(self._store.add("attached", 1))
        deadline, look_at, seen = time.monotonic() + self._wait, time.monotonic() + LOOK, ""
        own, following = str(self.ranks[self.index]), str(self.ranks[(self.index + 1) % self.world])
        waits = distributed_c10d.PrefixStore("nfi_monitor/waits", self._default)
        waits.set(own, json.dumps([self._key, self._number, self.ranks]))
        try:
            while self.here < self.world:
                now = time.monotonic()
                if now >= deadline or self._store.check(["decision"]):
                    return ALONE
                if now >= look_at and waits.check([following]):
                    look_at, before = now + LOOK, seen
                    seen = waits.get(following).decode()
                    # Twice, because the next rank may be about to go on.
                    if seen == before and self._is_elsewhere(*json.loads(seen)):
                        return APART
                time.sleep(0.01)
                self.here = int(self._store.add("attached", 0))
            return TOGETHER
        finally:
            waits.set(own, json.dumps(["", 0, []]))

    def _is_elsewhere(self, key: str, number: int, ranks: list[int]) -> bool:
        """Return whether a rank waits for this one in another agreement; it need not wait any longer then."""
        if key in ("", self._key) or self.ranks[self.index] not in ranks:
            return False
        _agreement(self._default, key, number).compare_set("decision", "", APART)
        return True

    def close(self) -> None:
        """Leave an agreement in which this rank was left alone, so that a later monitor makes a new one."""
        store, self._store = self._store, None
        if store is not None:
            store.add("closed", 1)

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
        if self.together is None:  # this rank has read no step
            self._choose()
            self.together = self._settle(ALONE)  # nobody can have counted this rank
            self._store.add("attached", 1)
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
        return self._settle(TOGETHER if here >= self.world else ALONE, f"{key}/decision")

    def disband(self) -> None:
        self.together = False
        self._channel = None

    def _settle(self, proposal: str, key: str = "decision") -> bool:
        """Return whether the ranks act together: the first proposal of any rank is the decision."""
        decided: Any = self._store.compare_set(key, "", proposal)
        decided = decided.decode() if isinstance(decided, bytes) else decided
        self.apart = decided == APART
        return bool(decided == TOGETHER)


def _agreement(store: Any, key: str, number: int) -> Any:
    """Return the part of the process group's store for one agreement."""
    return distributed_c10d.PrefixStore(f"nfi_monitor/{key}/{number}", store)
