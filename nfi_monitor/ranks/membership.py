"""Decide whether this rank's monitor is read together with the monitors of the other ranks.

Once a rank falls out of step, each rank is read alone.  The engine calls this module only.  Each of these
modules imports only the earlier ones: :mod:`~nfi_monitor.ranks.processes` finds the processes that train
together, :mod:`~nfi_monitor.ranks.team` connects them, :mod:`~nfi_monitor.ranks.exchange` exchanges their
numbers of a step, :mod:`~nfi_monitor.ranks.departure` answers for a closed monitor.
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
"""Number of steps in which an earlier fault of this rank counts as the reason why it fell out of step."""

Fill = Callable[[Exchange, Message, int], "Tensor | None"]
"""``fill(exchange, message, step)`` adds this process's numbers of a step to the message.  It returns the
head's weight if this process holds all of it, else None."""


class Membership:
    """Read this rank together with the other ranks, or alone.

    Attributes:
        exchange: the exchange with the ranks that are read together; None while this rank is read alone.
        searching: whether other ranks may still be found.
        rank: the global rank that reports the readings of this rank.
        plan: how the ranks agreed to read a sharded head.

    Args:
        group, every: as for :class:`nfi_monitor.Monitor`.
        rows: this rank's rows; it also gets the facts about the loss that the joined rows show.
        fill: adds this rank's numbers of a step to a message.
        next_read: the schedule that all ranks share.
        follow: called with the plan when it changes, and when this rank is read alone from then on.
        note: ``note(code, message, step)`` makes a note once.
        failed: ``failed(part, error)`` reports an error of this rank.
        failed_parts: the parts of this rank's monitor that failed.
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
        failed_parts: AbstractSet[str],
    ) -> None:
        self.exchange: Exchange | None = None
        self._team: teams.Team | None = None  # the last one that this rank has left
        self.searching = group is not False
        self.rank = processes.rank()
        self.plan = ReadingPlan()
        self.failed_at: int | None = None  # step of the last error on this rank
        self._group, self._every = group, every
        self._rows, self._fill, self._next_read = rows, fill, next_read
        self._follow, self._note, self._failed, self._failed_parts = follow, note, failed, failed_parts

    @property
    def is_reporter(self) -> bool:
        """Whether this process reports: to the console, to files and to the user's sinks."""
        alone = self._group is False or processes.processes(self._group) == 1
        return alone or processes.rank() == (0 if self.exchange is None else self.exchange.reporter)

    def may_act(self, step: int) -> bool:
        """Return whether an alert may change the training; see ``monitor.port.may_act``.

        This depends on the process group, not on the model, whose wrapper may be unknown.  A rank that acts
        alone by mistake makes the run hang; a rank that does not act only makes a note.
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

    @property
    def processes(self) -> int:
        """Number of running processes, or of those in the given group."""
        return processes.processes(self._group)

    def none_found(self) -> None:
        """Note that several processes run, and no rank is known that trains this model."""
        self.searching = False
        if self.processes > 1:
            self._separate(
                f"{self.processes} processes run, and neither DistributedDataParallel nor FSDP was found "
                "around this model. If they train one model, pass group=torch.distributed.group.WORLD; if "
                "each trains a model of its own, pass group=False",
                0,
            )

    def _at_fault(self, step: int) -> bool:
        """Return whether a recent error on this rank may be why it missed an exchange."""
        return self.failed_at is not None and step - self.failed_at <= RECENT

    # --- join and separate ------------------------------------------------------------------------

    def find(self, model: nn.Module, optimizer: Optimizer, head: Head | None) -> str | None:
        """Find the ranks that train together, and register with them. Returns the reason if that failed."""
        if not self.searching:
            return None
        try:
            ranks = processes.find_ranks(model, self._group)
            if ranks is not None:
                self.exchange = self._form(model, optimizer, head, ranks)
        except Exception as error:
            return f"their store cannot be reached ({type(error).__name__}: {error})"
        return None

    def _form(
        self, model: nn.Module, optimizer: Optimizer, head: Head | None, ranks: tuple[int, ...]
    ) -> Exchange:
        slots = min(self._every, 256) if isinstance(self._every, int) else 32
        return Exchange.form(model, optimizer, head, ranks, slots=slots)

    def watch(self, model: nn.Module, optimizer: Optimizer, head: Head | None) -> bool:
        """Register with the ranks anew, for another head. Returns False if they have already met.

        The first output of the model shows the head on every rank, before the first step.
        """
        exchange = self.exchange
        if exchange is None:
            return True
        if exchange.team.together is not None:
            return False
        self.exchange = self._form(model, optimizer, head, exchange.team.ranks)
        self.share_head(head, None)
        return True

    def share_head(self, head: Head | None, apart: str | None) -> None:
        """Plan to read this rank's classes of the head if the head is sharded.

        ``apart``: the reason if :meth:`find` failed.
        """
        plan = self.plan
        if head is not None and sharding.is_sharded(head.weight):
            plan = replace(plan, head_outputs=head.outputs)  # then logits with fewer classes are a shard
        if self.exchange is not None and self.exchange.shape.head_sharded:
            plan = replace(plan, head_summed=True, row_slots=self.exchange.shape.row_slots)
        if plan != self.plan:
            self.plan = plan
            self._follow(plan)
        if apart is not None:
            self.searching = False
            self._separate(apart, 0)

    def _meet(self, exchange: Exchange, step: int) -> bool:
        """Return whether all ranks have attached, after waiting; if not, read this rank alone."""
        try:
            if exchange.stops_early:
                why = "DDP's join() lets a rank that has run out of batches stop making optimizer steps"
                self._separate(why, step)
                return False
            if exchange.team.meet():
                self.rank = exchange.reporter
                return True
            if exchange.team.apart:
                self._separate(
                    "another rank watches another head, or under other settings. Attach the monitor in the "
                    "same way on every rank; or pass group=False, and no rank waits",
                    step,
                )
                return False
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
        """Read this rank alone from now on, and note the reason ``why``."""
        if self.exchange is not None:
            self._team = self.exchange.team
            self._team.disband()
            self.searching = False
            self.exchange = None
            self.plan = replace(self.plan, head_summed=False, row_slots=0)
            self._follow(self.plan)
        if self._at_fault(step):  # the error on this rank is the cause, and has a note already
            return
        self._note(
            "ranks_apart",
            f"The ranks are not read together: {why}. Each watches its own rows (and only whole tensors), "
            "and only rank 0 reports. Training is not affected.",
            step,
        )

    def drop_out(self, step: int) -> None:
        """Leave the other ranks after an error. They notice at once, because the connection closes."""
        if self.exchange is not None:
            self._separate("the monitor failed on this rank", step)

    def leave(self, hooks: StepHooks, step: int, detector: Detector) -> bool:
        """Announce to the other ranks, with the next reading, that this rank has closed its monitor.

        Returns whether they wait for that.  In that case a :class:`~nfi_monitor.ranks.departure.Departure`
        takes over ``hooks``, those of the closed monitor.
        """
        if self._at_fault(step):
            self.drop_out(step)
        exchange, self.exchange = self.exchange, None
        try:
            if exchange is None or not exchange.team.leave():
                team = self._team if exchange is None else exchange.team
                if team is not None:
                    team.close()
                return False
        except RuntimeError:  # raised by gloo: the other ranks are gone
            return False
        except BaseException:  # Ctrl-C: the other ranks notice at once, because the connection closes
            if exchange is not None:
                exchange.team.disband()
            raise
        Departure(exchange, hooks, step, detector, self._next_read)
        return True

    def last_readings(self, step: int) -> list[Reduced]:
        """Return the joint readings that are left when all ranks close their monitors after this step.

        None if a rank does not close now: the others then go on without this one.
        """
        exchange = self.exchange
        if exchange is None or exchange.team.together is not True or self._at_fault(step):
            return []
        try:
            if not exchange.unread(step) or not exchange.team.all_close(step):
                return []
            received = exchange.last(step)
        except RuntimeError:  # raised by gloo: a rank is gone
            return []
        exchange.team.disband()  # all are closed: none waits for an answer
        return [reduced for reduced in received if not reduced.out_of_step]

    # --- send ------------------------------------------------------------------------------------

    def measure(self, step: int) -> bool:
        """Send this rank's numbers of the step. Returns False if this rank is read alone.

        After an error an empty message is sent, because the other ranks wait for one.
        """
        exchange = self.exchange
        if exchange is None or not self._meet(exchange, step):
            return False
        message, weight = exchange.message(), None
        try:
            weight = self._fill(exchange, message, step)
            packed = exchange.finish(message, step, failed=bool(self._failed_parts))
        except Exception as error:
            exchange.send(exchange.empty(step, failed=True), step, head_weight=weight)
            self._failed("ranks", error)
        else:
            exchange.send(packed, step, head_weight=weight)
        return True

    # --- receive ---------------------------------------------------------------------------------

    def receive(self, step: int) -> Iterator[Reduced]:
        """Yield the joint readings that are due at this step. Every rank gets the same readings.

        Judge each reading before you take the next: the notes made here then have the right order.
        """
        exchange = self.exchange
        if exchange is None:
            return
        try:
            received = exchange.receive(step)
        except Exception as error:
            # A RuntimeError of gloo is about other ranks. Any other error happened on this rank.
            if not isinstance(error, RuntimeError):
                self._failed("ranks", error)
            self._separate(f"one of the other ranks is gone or late ({type(error).__name__}: {error})", step)
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
            if reduced.joined_rows is not None:
                rows.learn(reduced.joined_rows.loss_kind, reduced.joined_rows.absorbed)
            # An error on this rank has a note already.
            elsewhere = [index for index in reduced.failed if index != exchange.team.index]
            if elsewhere:
                self._note(
                    "failed_rank",
                    f"A part of the monitor failed on rank {_named(exchange, elsewhere)} and is left out "
                    "there; the other ranks are still read, and training is not affected.",
                    reduced.step,
                )
            yield reduced
            if reduced.left:
                self._separate(f"the monitor of rank {_named(exchange, reduced.left)} was closed", step)
                return


def _named(exchange: Exchange, indices: Iterable[int]) -> str:
    return ", ".join(str(exchange.team.ranks[index]) for index in indices)
