"""This process's monitor among those of the ranks that train with it.

Once a rank falls out of step, each rank is read alone.  Each module here knows only those before it:
:mod:`~nfi_monitor.ranks.processes` finds who trains together, :mod:`~nfi_monitor.ranks.team` connects them,
:mod:`~nfi_monitor.ranks.exchange` exchanges what they measured of a step,
:mod:`~nfi_monitor.ranks.departure` answers for a monitor that was closed, and this one decides whether a
monitor is read together with others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor.capture import sharding
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.reading_plan import ReadingPlan
from nfi_monitor.capture.step_hooks import StepHooks
from nfi_monitor.detect.detector import Detector
from nfi_monitor.measure.accumulator import RowAccumulator
from nfi_monitor.ranks import processes
from nfi_monitor.ranks import team as teams
from nfi_monitor.ranks.departure import Departure, NextRead
from nfi_monitor.ranks.exchange import Exchange, Message, Reduced

RECENT = 64
"""Steps for which a rank's own fault explains that it and the others have lost each other."""

Fill = Callable[[Exchange, Message, int], "Tensor | None"]
"""``fill(exchange, message, step)`` adds what this process measured of a step to the message, and returns the
head's weight where this process holds all of it."""


class Membership:
    """``exchange``: with the ranks that are read together; None while this one is read alone. ``looking``:
    whether they may still be found.  ``rank``: the global rank that reports what this one sees.  ``plan``:
    what the ranks agreed to read of a sharded head.

    Args:
        group: as for :class:`nfi_monitor.Monitor`.
        every: likewise.
        rows: what this rank sees of the rows; learns what the others saw.
        fill: puts this rank's part of a reading into a message.
        next_read: the schedule that all ranks share.
        follow: called with the new plan whenever that changes, and when this rank parts from the others.
        note: ``note(code, message, step)`` says, once, why ranks are not read together.
        failed: ``failed(part, error)`` reports an error of this rank's own.
        quiet: the parts of this rank's monitor that failed.
    """

    def __init__(
        self,
        group: object,
        every: int | str,
        *,
        rows: RowAccumulator,
        fill: Fill,
        next_read: NextRead,
        follow: Callable[[ReadingPlan], None],
        note: Callable[[str, str, int], None],
        failed: Callable[[str, BaseException], None],
        quiet: AbstractSet[str],
    ) -> None:
        self.exchange: Exchange | None = None
        self.looking = group is not False
        self.rank = processes.rank()
        self.plan = ReadingPlan()
        self.failed_at: int | None = None  # the step of this rank's last fault of its own
        self._group, self._every = group, every
        self._rows, self._fill, self._next_read = rows, fill, next_read
        self._follow, self._note, self._failed, self._quiet = follow, note, failed, quiet

    @property
    def is_reporter(self) -> bool:
        """Whether this process is the one that reports."""
        alone = self._group is False or processes.processes(self._group) == 1
        return alone or processes.rank() == (0 if self.exchange is None else self.exchange.speaks)

    def may_act(self, step: int) -> bool:
        """As :meth:`nfi_monitor.Monitor.may_act`.

        Asked of the process group and not of the model, whose wrapper need not be one that is recognised: to
        act apart by mistake hangs a run, not to act costs a note.
        """
        if self.exchange is not None or processes.processes(self._group) == 1:
            return True
        self._note(
            "no_action",
            "Nothing is done about alerts: several processes run, they are not read together, and each would "
            "act by itself, at another step than the others. Alerts are told as usual, and what an Autopilot "
            "has changed stays as it is. Attach the monitor on every rank; where the ranks are not found, "
            "name them: group=torch.distributed.group.WORLD. A process that trains alone names a group of "
            "itself.",
            step,
        )
        return False

    def _broken(self, step: int) -> bool:
        """Whether a fault of its own, a moment ago, may have kept this rank from an exchange."""
        return self.failed_at is not None and step - self.failed_at <= RECENT

    # --- together, or apart ----------------------------------------------------------------------

    def find(self, model: nn.Module, optimizer: Optimizer, head: Head | None) -> str | None:
        """Look for the ranks that train together, and sign up; returns why that failed, if it did."""
        if not self.looking:
            return None
        try:
            ranks = processes.find_ranks(model, self._group)
            if ranks is not None:
                slots = min(self._every, 256) if isinstance(self._every, int) else 32
                self.exchange = Exchange.form(model, optimizer, head, ranks, slots=slots)
        except Exception as error:
            return f"their store cannot be reached ({type(error).__name__}: {error})"
        return None

    def share_head(self, head: Head | None, apart: str | None) -> None:
        """Read a part of the head's classes where the other ranks hold the rest. ``apart``: why :meth:`find`
        failed, if it did."""
        plan = self.plan
        if head is not None and sharding.is_sharded(head.weight):
            plan = replace(plan, head_outputs=head.outputs)  # logits of fewer classes are a part of them
        if self.exchange is not None and self.exchange.shape.head_sharded:
            plan = replace(plan, head_pooled=True, row_slots=self.exchange.shape.row_slots)
        if plan != self.plan:
            self.plan = plan
            self._follow(plan)
        if apart is not None:
            self.looking = False
            self._apart(apart, 0)

    def _meet(self, exchange: Exchange, step: int) -> bool:
        """Whether all ranks are here; the first call of each rank waits for the others."""
        try:
            if exchange.stops_early:
                why = "DDP's join() lets a rank that has run out of batches stop making optimizer steps"
                self._apart(why, step)
                return False
            if exchange.team.meet():
                self.rank = exchange.speaks
                return True
            why = (
                f"only {exchange.team.here} of {exchange.team.world} had attached a monitor (to this head, "
                f"under the same settings) within {teams.WAIT:g} seconds. Attach it on every rank, before "
                "the first optimizer step; or pass group=False, and nobody waits"
            )
        except Exception as error:
            why = f"they cannot be reached ({type(error).__name__}: {error})"
        self._apart(why, step)
        return False

    def _apart(self, why: str, step: int) -> None:
        """From here on this rank reads its own rows: the others are not there, or not at the same step."""
        if self.exchange is not None:
            self.exchange.team.disband()
            self.looking = False
            self.exchange = None
            self.plan = replace(self.plan, head_pooled=False, row_slots=0)
            self._follow(self.plan)
        if self._broken(step):  # that is why, and it has been said
            return
        self._note(
            "ranks_apart",
            f"The ranks are not read together: {why}. Each watches its own rows (and only whole tensors), "
            "rank 0 alone reports. Training is not affected.",
            step,
        )

    def drop_out(self, step: int) -> None:
        """After a fault with which this rank cannot go on with the others: they hear at once, as its end of
        their channel closes."""
        if self.exchange is not None:
            self._apart("this one has failed", step)

    def leave(self, hooks: StepHooks, step: int, detector: Detector) -> bool:
        """Tell the other ranks, with the next reading, that this one takes no part any more.

        Whether they wait for that; ``hooks``, the closed monitor's, are then taken over.
        """
        exchange = self.exchange
        if self._broken(step):
            self.drop_out(step)
            return False
        self.exchange = None
        try:
            if exchange is None or not exchange.team.leave():
                return False
        except RuntimeError:  # gloo's: the others are gone, and nobody is left to tell
            return False
        Departure(exchange, hooks, step, detector, self._next_read)
        return True

    # --- send ------------------------------------------------------------------------------------

    def measure(self, step: int) -> bool:
        """Send this rank's part of the step's reading; False: the step is read alone.

        Whatever fails in here, the others are not kept waiting.
        """
        exchange = self.exchange
        if exchange is None or not self._meet(exchange, step):
            return False
        message, weight = exchange.message(), None
        try:
            weight = self._fill(exchange, message, step)
            packed = exchange.finish(message, step, failed=bool(self._quiet))
        except Exception as error:
            self._failed("ranks", error)
            packed = exchange.nothing(step, failed=True)
        exchange.send(packed, step, head_weight=weight)
        return True

    # --- receive ---------------------------------------------------------------------------------

    def receive(self, step: int) -> Iterator[Reduced]:
        """Readings of all ranks that are due at this step: the same ones on each of them.

        Each is to be judged before the next is asked for: what is said here comes before or after it.
        """
        exchange = self.exchange
        if exchange is None:
            return
        try:
            received = exchange.receive(step)
        except Exception as error:
            if not isinstance(error, RuntimeError):  # gloo's tell of other ranks, all else is this one's own
                self._failed("ranks", error)
            self._apart(f"one of them is gone, or late ({type(error).__name__}: {error})", step)
            return
        rows = self._rows
        for reduced in received:
            if reduced.out_of_step:
                where = _named(exchange, reduced.out_of_step)
                self._apart(f"rank {where} is at another optimizer step than rank {processes.rank()}", step)
                return
            if reduced.single_output:
                rows.single_output = True
            if reduced.together is not None:
                rows.learn(reduced.together.loss_kind, reduced.together.absorbed)
            elsewhere = [
                index for index in reduced.failed if index != exchange.team.index
            ]  # its own it has said
            if elsewhere:
                self._note(
                    "failed_rank",
                    f"A part of the monitor failed on rank {_named(exchange, elsewhere)} and is off there; "
                    "the other ranks are still read, and training is not affected.",
                    reduced.step,
                )
            yield reduced
            if reduced.left:
                self._apart(f"the monitor of rank {_named(exchange, reduced.left)} was closed", step)
                return


def _named(exchange: Exchange, indices: Iterable[int]) -> str:
    return ", ".join(str(exchange.team.ranks[index]) for index in indices)
