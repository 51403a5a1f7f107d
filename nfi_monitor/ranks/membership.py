"""This process's monitor among those of the ranks that train with it.

Four modules share what many processes need, and each knows only those named before it:
:mod:`~nfi_monitor.ranks.processes`, who trains together, and a line between them; :mod:`~nfi_monitor.ranks.exchange`, what
is said over it of one step; :mod:`~nfi_monitor.ranks.departure`, which answers for a monitor that was closed; and this
one, which tells a monitor whether it is read together with others: from the search for them until one of them
does not keep up, from when on each is read alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor.capture import sharding
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.head_probe import HeadProbe
from nfi_monitor.capture.step_hooks import StepHooks
from nfi_monitor.detect.detector import Detector
from nfi_monitor.engine.loss_queue import LossQueue
from nfi_monitor.engine.notes import NoteTaker
from nfi_monitor.engine.schedule import Schedule
from nfi_monitor.engine.step_reader import StepReader, full_precision
from nfi_monitor.measure.step import SKIPPED
from nfi_monitor.ranks import processes
from nfi_monitor.ranks import team as teams
from nfi_monitor.ranks.departure import Departure
from nfi_monitor.ranks.exchange import Exchange
from nfi_monitor.ranks.layout import Message
from nfi_monitor.ranks.reduced import Reduced

RECENT = 64
"""Steps for which a rank's own fault explains that it and the others have lost each other."""


class Membership:
    """``pool``: the ranks that are read together, None while this one is read alone.  ``looking``: whether
    they may still be found.  ``rank``: the global rank that reports what this one sees.

    Args:
        group: as for :class:`nfi_monitor.Monitor`.
        every: likewise.
        clock: the budget is given up once ranks are found.
        meter: what this rank measures.
        probe: sees this rank's rows.
        notes: hears, once, why ranks are not read together.
    """

    def __init__(
        self,
        group: Any,
        every: int | str,
        *,
        clock: Schedule,
        meter: StepReader,
        probe: HeadProbe,
        notes: NoteTaker,
    ) -> None:
        self.pool: Exchange | None = None
        self.looking = group is not False
        self.rank = processes.rank()
        self.failed_at: int | None = None  # the step of this rank's last fault of its own
        self._group, self._every = group, every
        self._clock, self._meter, self._probe, self._notes = clock, meter, probe, notes

    @property
    def speaks(self) -> bool:
        """Whether this process is the one that reports."""
        alone = self._group is False or processes.processes(self._group) == 1
        return alone or processes.rank() == (0 if self.pool is None else self.pool.reporter)

    def may_act(self, step: int) -> bool:
        """As :meth:`nfi_monitor.Monitor.may_act`.

        Asked of the process group and not of the model, whose wrapper need not be one that is recognised: to
        act apart by mistake hangs a run, not to act costs a note.
        """
        if self.pool is not None or processes.processes(self._group) == 1:
            return True
        self._notes.note(
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
                self.pool = Exchange.form(model, optimizer, head, ranks, slots=slots)
                # Ranks have to agree on the cadence, and no two clocks do.
                self._clock.budget = self._clock.healthy = None
                self._clock.lowered = False
        except Exception as error:
            return f"their store cannot be reached ({type(error).__name__}: {error})"
        return None

    def share_head(self, head: Head | None, apart: str | None) -> None:
        """Read a part of the head's classes where the other ranks hold the rest. ``apart``: why :meth:`find`
        failed, if it did."""
        if head is not None and sharding.is_sharded(head.weight):
            self._probe.outputs = head.outputs  # logits of fewer classes are a part of them
        if self.pool is not None and self.pool.shape.head_sharded:
            self._meter.reader.pooled, self._probe.row_slots = True, self.pool.shape.row_slots
        if apart is not None:
            self.looking = False
            self._apart(apart, 0)

    def _meet(self, pool: Exchange, step: int) -> bool:
        """Whether all ranks are here; the first call of each rank waits for the others."""
        try:
            if pool.stops_early:
                why = "DDP's join() lets a rank that has run out of batches stop making optimizer steps"
                self._apart(why, step)
                return False
            if pool.team.meet():
                self.rank = pool.reporter
                return True
            why = (
                f"only {pool.team.here} of {pool.team.world} had attached a monitor (to this head, under the "
                f"same settings) within {teams.WAIT:g} seconds. Attach it on every rank, before the "
                "first optimizer step; or pass group=False, and nobody waits"
            )
        except Exception as error:
            why = f"they cannot be reached ({type(error).__name__}: {error})"
        self._apart(why, step)
        return False

    def _apart(self, why: str, step: int) -> None:
        """From here on this rank reads its own rows: the others are not there, or not at the same step."""
        if self.pool is not None:
            self.pool.team.disband()
            self.looking = False
            self.pool, self._meter.memory, self._meter.reader.pooled = None, None, False
            self._probe.row_slots = 0
        if self._broken(step):  # that is why, and it has been said
            return
        self._notes.note(
            "ranks_apart",
            f"The ranks are not read together: {why}. Each watches its own rows (and only whole tensors), "
            "rank 0 alone reports. Training is not affected.",
            step,
        )

    def drop_out(self, step: int) -> None:
        """After a fault with which this rank cannot go on with the others: they hear at once, as its end of
        their channel closes."""
        if self.pool is not None:
            self._apart("this one has failed", step)

    def leave(self, hooks: StepHooks, step: int, detector: Detector) -> bool:
        """Tell the other ranks, with the next reading, that this one takes no part any more.

        Whether they wait for that; ``hooks``, the closed monitor's, are then taken over.
        """
        pool = self.pool
        if self._broken(step):
            self.drop_out(step)
            return False
        self.pool = None
        try:
            if pool is None or not pool.team.leave():
                return False
        except RuntimeError:  # gloo's: the others are gone, and nobody is left to tell
            return False
        Departure(pool, hooks, step, detector, self._every)
        return True

    # --- send ------------------------------------------------------------------------------------

    def measure(self, step: int, losses: LossQueue) -> bool:
        """This rank's part of the step's reading; False: it is read alone.

        Whatever fails in here, the others are not kept waiting.
        """
        pool = self.pool
        if pool is None or not self._meet(pool, step):
            return False
        message, weight = pool.message(), None
        try:
            weight = self._fill(pool, message, step, losses)
            packed = pool.finish(message, step, failed=bool(self._meter.quiet))
        except Exception as error:
            self._meter.failed("ranks", error)
            packed = pool.nothing(step, failed=True)
        pool.send(packed, step, head_weight=weight)
        return True

    def _fill(self, pool: Exchange, message: Message, step: int, losses: LossQueue) -> Tensor | None:
        """Everything that this rank has measured; returns the head's weight, where it is whole."""
        meter = self._meter
        pool.add_rows(message, meter.rows)
        values: dict[str, Tensor] = {}
        weight = None
        if "optimizer" not in meter.quiet:
            try:
                weight = self._fill_step(pool, message, step)
            except Exception as error:
                meter.failed("optimizer", error)
        meter.add_probe(values, step)
        pool.add_values(message, values)
        loss = losses.mean()
        if loss is not None:
            pool.keep_loss(step, loss)
        return weight

    def _fill_step(self, pool: Exchange, message: Message, step: int) -> Tensor | None:
        update = self._meter.update(step)
        values: dict[str, Tensor | float] = {}
        if update is not None:
            values["learning_rate"] = update.lr
            if update.found_inf is not None:
                values[SKIPPED] = update.found_inf
            if not pool.shape.head_sharded:
                values |= pool.whole(self._meter.statistics(update, None, step))
        pool.add_values(message, values)
        with full_precision(None if update is None else update.grad):
            pool.add_step(message, update, step)
            pool.add_head(message, update, step)
        return None if update is None or pool.shape.head_sharded else update.head_weight

    # --- receive ---------------------------------------------------------------------------------

    def receive(self, step: int) -> Iterator[Reduced]:
        """Readings of all ranks that are due at this step: the same ones on each of them.

        Each is to be judged before the next is asked for: what is said here comes before or after it.
        """
        pool = self.pool
        if pool is None:
            return
        try:
            received = pool.receive(step)
        except Exception as error:
            if not isinstance(error, RuntimeError):  # gloo's tell of other ranks, all else is this one's own
                self._meter.failed("ranks", error)
            self._apart(f"one of them is gone, or late ({type(error).__name__}: {error})", step)
            return
        rows = self._meter.rows
        for reduced in received:
            if reduced.out_of_step:
                where = _named(pool, reduced.out_of_step)
                self._apart(f"rank {where} is at another optimizer step than rank {processes.rank()}", step)
                return
            if reduced.single_output:
                rows.single_output = True
            if reduced.together is not None:
                rows.learn(reduced.together.loss_kind, reduced.together.absorbed)
            elsewhere = [index for index in reduced.failed if index != pool.team.index]  # its own it has said
            if elsewhere:
                self._notes.note(
                    "failed_rank",
                    f"A part of the monitor failed on rank {_named(pool, elsewhere)} and is off there; "
                    "the other ranks are still read, and training is not affected.",
                    reduced.step,
                )
            yield reduced
            if reduced.left:
                self._apart(f"the monitor of rank {_named(pool, reduced.left)} was closed", step)
                return


def _named(pool: Exchange, indices: Iterable[int]) -> str:
    return ", ".join(str(pool.team.ranks[index]) for index in indices)
