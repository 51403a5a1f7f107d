"""Decide whether this process's monitor is read together with those of the other ranks.

Once a rank falls out of step, each rank is read alone.  Each module here knows only those before it:
:mod:`~nfi_monitor.ranks.processes` finds who trains together, :mod:`~nfi_monitor.ranks.team` connects them,
:mod:`~nfi_monitor.ranks.exchange` exchanges what they measured of a step, :mod:`~nfi_monitor.ranks.departure`
answers for a monitor that was closed, and this one is what the engine calls.
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
from nfi_monitor.ranks.exchange import Exchange
from nfi_monitor.ranks.layout import Message
from nfi_monitor.ranks.reduced import Reduced

RECENT = 64
"""Steps for which a rank's own fault explains why it fell out of step with the others."""

Fill = Callable[[Exchange, Message, int], "Tensor | None"]
"""``fill(exchange, message, step)`` adds what this process measured of a step to the message, and returns the
head's weight where this process holds all of it."""


class Membership:
    """``exchange``: with the ranks that are read together; None while this one is read alone. ``searching``:
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
        self.searching = group is not False
        self.rank = processes.rank()
        self.plan = ReadingPlan()
        self.failed_at: int | None = None  # the step of this rank's last fault of its own
        self._group, self._every = group, every
        self._rows, self._fill, self._next_read = rows, fill, next_read
        self._follow, self._note, self._failed, self._quiet = follow, note, failed, quiet

    @property
    def is_reporter(self) -> bool:
        """Whether this process reports: to the console, to files and to the user's sinks."""
        alone = self._group is False or processes.processes(self._group) == 1
        return alone or processes.rank() == (0 if self.exchange is None else self.exchange.reporter)

    def may_act(self, step: int) -> bool:
        """Return whether an alert may change the training; see ``monitor.port.may_act``.

        The process group decides, not the model, whose wrapper may be unknown: to act apart by mistake hangs
        a run, not to act costs a note.
        """
        if self.exchange is not None or processes.processes(self._group) == 1:
            return True
        self._note(
            "no_action",
            "Alerts do not change the training: several processes run that are not read together, and each "
            "would act at another step. Alerts are reported as usual, and what an Autopilot has changed "
            "stays as it is. Attach the monitor on every rank. If the ranks are not found, name them: "
            "group=torch.distributed.group.WORLD. For a process that trains alone, pass a group of itself.",
            step,
        )
        return False

    def _at_fault(self, step: int) -> bool:
        """Return whether a recent fault of its own may have kept this rank from an exchange."""
        return self.failed_at is not None and step - self.failed_at <= RECENT

    # --- together, or apart ----------------------------------------------------------------------

    def find(self, model: nn.Module, optimizer: Optimizer, head: Head | None) -> str | None:
        """Look for the ranks that train together, and sign up. Returns why that failed, if it did."""
        if not self.searching:
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
        """Plan to read this rank's classes of the head where the other ranks hold the rest.

        ``apart``: why :meth:`find` failed, if it did.
        """
        plan = self.plan
        if head is not None and sharding.is_sharded(head.weight):
            plan = replace(plan, head_outputs=head.outputs)  # logits of fewer classes are a part of them
        if self.exchange is not None and self.exchange.shape.head_sharded:
            plan = replace(plan, head_pooled=True, row_slots=self.exchange.shape.row_slots)
        if plan != self.plan:
            self.plan = plan
            self._follow(plan)
        if apart is not None:
            self.searching = False
            self._separate(apart, 0)

    def _meet(self, exchange: Exchange, step: int) -> bool:
        """Return whether all ranks are here. The first call of each rank waits for the others."""
        try:
            if exchange.stops_early:
                why = "DDP's join() lets a rank that has run out of batches stop making optimizer steps"
                self._separate(why, step)
                return False
            if exchange.team.meet():
                self.rank = exchange.reporter
                return True
            why = (
                f"only {exchange.team.here} of {exchange.team.world} had attached a monitor (to this head, "
                f"under the same settings) within {teams.WAIT:g} seconds. Attach it on every rank, before "
                "the first optimizer step; or pass group=False, and no rank waits"
            )
        except Exception as error:
            why = f"they cannot be reached ({type(error).__name__}: {error})"
        self._separate(why, step)
        return False

    def _separate(self, why: str, step: int) -> None:
        """Read this rank alone from here on: the others are not there, or not at the same step."""
        if self.exchange is not None:
            self.exchange.team.disband()
            self.searching = False
            self.exchange = None
            self.plan = replace(self.plan, head_pooled=False, row_slots=0)
            self._follow(self.plan)
        if self._at_fault(step):  # its own fault is the cause, and a note says so already
            return
        self._note(
            "ranks_apart",
            f"The ranks are not read together: {why}. Each watches its own rows (and only whole tensors), "
            "and only rank 0 reports. Training is not affected.",
            step,
        )

    def drop_out(self, step: int) -> None:
        """Leave the other ranks after a fault. They notice at once: this end of their channel closes."""
        if self.exchange is not None:
            self._separate("this one has failed", step)

    def leave(self, hooks: StepHooks, step: int, detector: Detector) -> bool:
        """Announce to the other ranks, with the next reading, that this one has closed its monitor.

        Returns whether they wait for that. ``hooks``, the closed monitor's, then belong to a
        :class:`~nfi_monitor.ranks.departure.Departure`.
        """
        exchange = self.exchange
        if self._at_fault(step):
            self.drop_out(step)
            return False
        self.exchange = None
        try:
            if exchange is None or not exchange.team.leave():
                return False
        except RuntimeError:  # gloo's: the others are gone
            return False
        Departure(exchange, hooks, step, detector, self._next_read)
        return True

    # --- send ------------------------------------------------------------------------------------

    def measure(self, step: int) -> bool:
        """Send this rank's part of the step's reading. False: this rank is read alone.

        Whatever fails, something is sent: the others wait for it.
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
        """Yield the readings of all ranks that are due at this step: the same ones on each rank.

        Judge each before taking the next: notes made here come before or after it.
        """
        exchange = self.exchange
        if exchange is None:
            return
        try:
            received = exchange.receive(step)
        except Exception as error:
            # gloo's RuntimeErrors are about other ranks, all other errors are this rank's own.
            if not isinstance(error, RuntimeError):
                self._failed("ranks", error)
            self._separate(f"one of them is gone, or late ({type(error).__name__}: {error})", step)
            return
        rows = self._rows
        for reduced in received:
            if reduced.out_of_step:
                where = _named(exchange, reduced.out_of_step)
                self._separate(
                    f"rank {where} is at another optimizer step than rank {processes.rank()}", step
                )
                return
            if reduced.single_output:
                rows.single_output = True
            if reduced.together is not None:
                rows.learn(reduced.together.loss_kind, reduced.together.absorbed)
            elsewhere = [
                index for index in reduced.failed if index != exchange.team.index
            ]  # this rank's own is noted already
            if elsewhere:
                self._note(
                    "failed_rank",
                    f"A part of the monitor failed on rank {_named(exchange, elsewhere)} and is off there; "
                    "the other ranks are still read, and training is not affected.",
                    reduced.step,
                )
            yield reduced
            if reduced.left:
                self._separate(f"the monitor of rank {_named(exchange, reduced.left)} was closed", step)
                return


def _named(exchange: Exchange, indices: Iterable[int]) -> str:
    return ", ".join(str(exchange.team.ranks[index]) for index in indices)
