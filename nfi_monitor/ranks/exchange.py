"""Exchange the readings of one measured step between the ranks of a team, in one sum of vectors.

The layout of the vector is fixed when the monitor is attached (:mod:`nfi_monitor.ranks.layout`).  Sums (rows,
features, losses, shards of step quantities) have the same position on every rank.  Maxima, flags and the
step's number must not be added, so each rank writes them to its own line of the vector.  One sum then
exchanges both kinds.  A rank without rows, or with a failed capture, sends zeros, because every rank must
join every exchange.

On an accelerator numbers reach the host late, and at another time on each rank.  There all ranks begin an
exchange ``lag`` steps after its step, and use its sum one step later.  So all ranks get the same phase and
the same schedule.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor.capture.devices import full_precision
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.host_transfer import HostTransfer
from nfi_monitor.capture.update import Update
from nfi_monitor.measure.accumulator import RowAccumulator, looks
from nfi_monitor.measure.late.head import late_head
from nfi_monitor.measure.late.packing import Late
from nfi_monitor.measure.memory import Memory
from nfi_monitor.measure.rows import MAXIMA, LossKind, finish
from nfi_monitor.measure.sharded.rows import HEADER, SHOWN, JoinedRows, join_shards, pack_shards
from nfi_monitor.measure.sharded.step import (
    HEAD_RANKS,
    HEAD_SUMS,
    TENSOR_SUMS,
    HeadParts,
    finish_head,
    finish_step,
    head_parts,
    step_parts,
)
from nfi_monitor.measure.step import SKIPPED, mean_statistics
from nfi_monitor.ranks import processes
from nfi_monitor.ranks import team as teams
from nfi_monitor.ranks.layout import (
    FLAGS,
    LARGEST,
    LINE,
    MEANS,
    OWN,
    WHOLE_ON_EACH_RANK,
    Layout,
    Message,
    Packed,
)
from nfi_monitor.ranks.reduced import Reduced, finish_losses, finish_values, indices
from nfi_monitor.ranks.row_totals import add_rows
from nfi_monitor.ranks.shape import Shape, Shares, survey
from nfi_monitor.ranks.team import Team

LAG = 2
"""Steps that the host may run ahead of an accelerator before an exchange waits for the numbers."""


class Exchange:
    """Exchange the readings of a team. All ranks make every call, at the same step."""

    def __init__(self, team: Team, shape: Shape, shares: Shares, places: Mapping[int, int]) -> None:
        """``places``: id of a parameter → its index among the optimizer's tensors."""
        self.team, self.shape, self._places = team, shape, places
        self._layout = Layout(shape, team.world)
        self._shares = shares
        self._lag = LAG if shape.late else 0
        self._transfer = HostTransfer()
        self._in_flight: deque[tuple[int, Callable[[], Tensor], Tensor | None]] = deque()
        self._losses: dict[int, Tensor | float] = {}
        self._sent = 0  # step of the last message
        self._means: deque[tuple[int, Tensor]] = deque(maxlen=2)
        self._probe_rows: Tensor | None = None
        self._own_mean: Tensor | None = None  # μ_G of this step, where all ranks have the same rows
        self._loss_kind: LossKind | None = None
        self._probed: deque[tuple[int, int, bool]] = deque()  # step, probe rows used, whether Δμ_G was used
        self._memory: Memory | None = None
        self._wrapper: weakref.ref[nn.Module] | None = None

    @classmethod
    def form(
        cls,
        model: nn.Module,
        optimizer: Optimizer,
        head: Head | None,
        ranks: tuple[int, ...],
        *,
        slots: int,
    ) -> Exchange:
        """Register this rank with the others. The first step that is read waits for them."""
        shape, shares = survey(model, optimizer, head, len(ranks), slots=slots)
        name = f"{type(model).__name__} {head.name if head is not None else None} {shape}"
        team = Team(ranks, name, timeout=1800.0 if shape.late else teams.TIMEOUT)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        exchange = cls(team, shape, shares, {id(param): place for place, param in enumerate(params)})
        wrapper = processes.wrapper_of(model)
        # Weak: the exchange of a closed monitor must not keep the model alive.
        exchange._wrapper = None if wrapper is None else weakref.ref(wrapper)
        return exchange

    @property
    def stops_early(self) -> bool:
        """Whether a rank may make fewer optimizer steps than the others (DDP's ``join()``)."""
        return processes.lets_ranks_stop_early(None if self._wrapper is None else self._wrapper())

    @property
    def reporter(self) -> int:
        """The global rank that reports for all ranks."""
        return self.team.ranks[0]

    # --- send --------------------------------------------------------------------------------------

    def message(self) -> Message:
        return Message(self._layout, self.team.index)

    def keep_loss(self, step: int, loss: Tensor | float) -> None:
        """Keep the loss of a step for the next exchange; drop the oldest loss if there are too many.

        The loss is copied, because the training may overwrite its tensor before the exchange.
        """
        self._losses[step] = loss.clone() if isinstance(loss, Tensor) else loss
        while len(self._losses) > self.shape.slots + 1:
            del self._losses[next(iter(self._losses))]

    def add_rows(self, message: Message, rows: RowAccumulator) -> None:
        """Add row statistics and features of this rank's micro-batches, if it has seen any."""
        share = self._shares.rows
        add_rows(message, rows, share)
        if rows.shards and rows.shard is not None:
            shard = rows.shard
            sent = pack_shards(rows.shards, shard.first, shard.classes, shard.group, self.shape.row_slots)
            place = self.team.index * self._layout.block
            for at, number in enumerate(sent.header):
                message.add("shards", number, place + at)
            message.add("shards", sent.shown, place + SHOWN)
            message.add("shards", sent.numbers, place + len(HEADER))
            message.own(FLAGS.index("wide_rows"), float(sent.numbers.dtype is torch.float64))
            if self._loss_kind is None and rows.loss_kind is not None:  # from a resumed run
                self._loss_kind = LossKind(*(known.cpu() for known in rows.loss_kind))
        total, features = rows.feature_total, rows.features
        if self.shape.same_rows_everywhere:
            self._own_mean = self._probe_rows = None
        if total is None or features is None or len(total[0]) != self.shape.features:
            return
        message.add("features", total[0] if share == 1 else total[0] * share)
        message.add("feature_count", total[1] if share == 1 else total[1] * share)
        if self.shape.same_rows_everywhere:
            self._own_mean, self._probe_rows = total[0] / total[1], features[: self.shape.probe_rows]
        elif self.shape.probe_rows and self.team.index == 0:
            message.add("probe_rows", features[: self.shape.probe_rows])

    def add_late_step(self, message: Message, late: Late[dict[str, float]]) -> None:
        """Add the step quantities that the host makes of a few tensors, once it has them."""
        message.defer(late, lambda message, values: self.add_values(message, self.whole(values)))

    def add_values(self, message: Message, values: Mapping[str, Tensor | float]) -> None:
        """Add quantities that every rank can compute alone."""
        for name, value in values.items():
            if name in OWN + LARGEST:
                message.own(LINE.index(name), value)
            elif name != "loss":
                message.add("means", value, MEANS.index(name))
                message.add("mean_counts", 1.0, MEANS.index(name))

    def whole(self, values: Mapping[str, Tensor | float]) -> Mapping[str, Tensor | float]:
        """Return the quantities that this rank can compute alone; with sharded layers, those of the head."""
        if not self.shape.sharded:
            return values
        return {name: value for name, value in values.items() if name in WHOLE_ON_EACH_RANK}

    def add_step(self, message: Message, update: Update | None, step: int) -> None:
        """Add this rank's sums for the step quantities. ``update`` None: this rank holds no shard."""
        if not self.shape.sharded:
            return
        message.add("step_ranks", 1.0)
        if update is None:
            self._memory = None
            return
        positions = [self._places.get(id(param), -1) for param in update.params]
        if -1 in positions:
            raise ValueError("parameters were added to the optimizer; attach a new monitor on every rank")
        shares = [self._shares.tensors[position] for position in positions]
        parts, self._memory = step_parts(update, positions, shares, self.shape.tensors, self._memory, step)
        message.add("step", parts.sums)
        message.add("tensors", parts.tensors)

    def add_head(self, message: Message, update: Update | None, step: int) -> None:
        """Add sums over this rank's classes of the head. ``update`` None: this rank holds no class."""
        if not self.shape.head_is_summed:
            return
        if self.shape.same_rows_everywhere:
            self._keep_mean(step, self._own_mean)
        if update is None:
            for name in HEAD_RANKS:
                message.add("head", 1.0, HEAD_SUMS.index(name))
            return
        moved, known = self._moved_mean(), self._probe_rows
        widths = (self.shape.features, self.shape.columns, self.shape.probe_rows)
        if not self.shape.head_sharded:  # every rank has the rest of the head whole
            message.defer(late_head(update.head_weight, self._shares.head, widths, moved), _add_head)
        else:
            _add_head(message, head_parts(update, self._shares.head, widths, known, moved))

    def _keep_mean(self, step: int, mean: Tensor | None) -> None:
        if mean is None:
            self._means.clear()
        else:
            self._means.append((step, mean))

    def _moved_mean(self) -> Tensor | None:
        """Return Δμ_G [d] of the last two steps, or None if they are not neighbours or a rank lacks one."""
        if len(self._means) < 2 or self._means[1][0] != self._means[0][0] + 1:
            return None
        return self._means[1][1] - self._means[0][1]

    def finish(self, message: Message, step: int, *, left: bool = False, failed: bool = False) -> Packed:
        """Add the step, its flags and the kept losses, and pack the message."""
        message.own(FLAGS.index("step"), float(step))
        message.own(FLAGS.index("left"), float(left))
        message.own(FLAGS.index("failed"), float(failed))
        for at, loss in self._losses.items():
            if 0 <= step - at <= self.shape.slots:
                if not isinstance(loss, Tensor) or loss.dtype is torch.float64:
                    message.own(FLAGS.index("wide_loss"), 1.0)
                message.add("losses", loss, step - at)
                message.add("loss_counts", 1.0, step - at)
        return message.pack()

    def empty(self, step: int, *, left: bool = False, failed: bool = False) -> Packed:
        """Return the message of a rank that joins an exchange without a reading."""
        self._losses.clear()
        return self.finish(self.message(), step, left=left, failed=failed)

    def send(self, packed: Packed, step: int, *, head_weight: Tensor | None = None) -> None:
        """Begin the copy of a message to the host.

        ``head_weight`` [K, d], if this rank has all of it: for quantities of the ranks' common μ_G."""
        self._losses.clear()
        self._sent = step
        rows = 0 if self._probe_rows is None else len(self._probe_rows)
        self._probed.append((step, rows, self._moved_mean() is not None))
        if head_weight is not None:
            packed.numbers.append((self._layout.at("whole_heads"), 1.0))
        without_tensor = packed._replace(tensor=torch.empty(0, device="cpu"))
        self._transfer.put((step, without_tensor, None if self.shape.late else head_weight), packed.tensor)

    # --- receive -----------------------------------------------------------------------------------

    def receive(self, step: int) -> list[Reduced]:
        """Return the exchanges due at this step, oldest first. Raises RuntimeError if a rank is gone."""
        arrived = []
        while self._in_flight and self._in_flight[0][0] < step:
            arrived.append(self._finish(*self._in_flight.popleft()))
        for label, numbers in self._transfer.take(due=lambda label: label[0] <= step - self._lag):
            at, packed, head_weight = label
            vector = packed.unpack(self._layout, self.team.index, numbers)
            self._in_flight.append((at, self.team.add_up(vector), head_weight))
        if not self._lag:
            while self._in_flight:
                arrived.append(self._finish(*self._in_flight.popleft()))
        return arrived

    def unread(self, step: int) -> bool:
        """Return whether steps up to this one were not exchanged yet. The same on all ranks."""
        return self._sent != step or bool(self._in_flight) or self._transfer.waiting

    def last(self, step: int) -> list[Reduced]:
        """Exchange what is left after the last step: earlier readings, then the losses since then."""
        self.send(self.finish(self.message(), step), step)
        late = step + self._lag
        received = [*self.receive(late), *self.receive(late + 1)]
        end = received.pop()
        losses = [*end.losses, *((step, value) for name, value in end.values.items() if name == "loss")]
        return [*received, replace(end, losses=losses, only_losses=True)]

    def _finish(self, step: int, wait: Callable[[], Tensor], head_weight: Tensor | None) -> Reduced:
        vector = wait()
        lines = self._layout.cut(vector, "lines").reshape(self.team.world, self._layout.line)
        line = {name: lines[:, place] for place, name in enumerate(LINE)}
        _, probed, moved = self._probed.popleft()
        # One rank in float32: sums of float32 numbers, rounded once, as one process would have added them.
        dtype = torch.float64 if line["wide_rows"].any() else torch.float32
        mean = self._mean_features(step, vector, dtype)

        joined = self._join_rows(step, vector, dtype) if self.shape.row_slots else None
        values = self._finish_rows(vector, line, joined, dtype)
        values |= finish_values(self._layout, vector, line)
        skipped = values.pop(SKIPPED, 0.0) > 0
        values |= self._finish_step(vector, values.get("learning_rate", math.nan))
        values |= self._finish_mean(vector, head_weight, mean)
        if self.shape.head_is_summed:
            values |= self._finish_head(vector, lines[:, len(LINE) :], mean, probed, moved)
        if not self.shape.same_rows_everywhere:
            self._take_probe_rows(vector)
        losses = finish_losses(self._layout, vector, step, wide=bool(line["wide_loss"].any()))
        if losses and losses[0][0] == step:
            values["loss"] = losses.pop(0)[1]
        return Reduced(
            step,
            values,
            losses[::-1],
            skipped,
            bool(line["single_output"].any()),
            failed=indices(line["failed"] > 0),
            left=indices(line["left"] > 0),
            joined_rows=joined,
            out_of_step=indices(line["step"] != step),
        )

    def _finish_rows(
        self, vector: Tensor, line: Mapping[str, Tensor], joined: JoinedRows | None, dtype: torch.dtype
    ) -> dict[str, float]:
        """Return the quantities of all ranks' rows. ``joined``: rows whose classes are on several ranks."""
        maxima = [float(line[name].amax()) for name in MAXIMA]
        sums = self._layout.cut(vector, "rows")
        if joined is not None:
            # Each set of ranks that completes a row counts once, and as often as its rows are the run's.
            share = self._shares.rows * self.team.world / joined.groups
            sums = sums + joined.sums * share
            maxima = [max(one, float(two)) for one, two in zip(maxima, joined.maxima, strict=True)]
        return finish(sums.to(dtype).tolist(), maxima, single_output=bool(line["single_output"].any()))

    def _finish_step(self, vector: Tensor, rate: float) -> dict[str, float]:
        """Return the quantities of a step with sharded tensors; none unless all ranks sent their shards."""
        cut = self._layout.cut
        if not self.shape.sharded or float(cut(vector, "step_ranks")) != self.team.world:
            return {}
        tensors = cut(vector, "tensors").reshape(len(TENSOR_SUMS), -1)
        return finish_step(cut(vector, "step"), tensors, self.shape.matrices, self.shape.head, rate)

    def _finish_mean(
        self, vector: Tensor, head_weight: Tensor | None, mean: Tensor | None
    ) -> dict[str, float]:
        """Return the quantities of μ_G [d], the mean features of all ranks."""
        # Only if all ranks can compute it: a value on one rank alone could make the ranks judge differently.
        whole_heads = float(self._layout.cut(vector, "whole_heads")) == self.team.world
        if head_weight is not None and whole_heads and mean is not None:
            before = self._means[0][1] if self._moved_mean() is not None else None
            with full_precision(head_weight):
                known = mean_statistics(head_weight, mean, before)
            return {name: float(value) for name, value in known.items()}
        return {} if mean is None else {"feature_mean_norm": float(torch.linalg.vector_norm(mean))}

    def _take_probe_rows(self, vector: Tensor) -> None:
        rows = self._layout.cut(vector, "probe_rows").reshape(-1, max(self.shape.features, 1))
        shown = rows.any(1)
        if shown.any():
            self._probe_rows = rows[shown]

    def _join_rows(self, step: int, vector: Tensor, dtype: torch.dtype) -> JoinedRows | None:
        blocks = self._layout.cut(vector, "shards").reshape(self.team.world, self._layout.block)
        known, outputs = self._loss_kind, self.shape.outputs
        joined = join_shards(blocks, outputs, known, look=looks(step), dtype=dtype)
        if joined is not None:
            self._loss_kind = joined.loss_kind
        return joined

    def _mean_features(self, step: int, vector: Tensor, dtype: torch.dtype) -> Tensor | None:
        count = self._layout.cut(vector, "feature_count").to(dtype)
        if not self.shape.features or not float(count) > 0:
            return None
        mean = self._layout.cut(vector, "features").to(dtype) / count
        if not self.shape.same_rows_everywhere:
            self._means.append((step, mean))
        return mean

    def _finish_head(
        self, vector: Tensor, extremes: Tensor, mean: Tensor | None, probed: int, moved: bool
    ) -> dict[str, float]:
        cut = self._layout.cut
        parts = HeadParts(
            sums=cut(vector, "head"),
            classifier=cut(vector, "classifier"),
            columns=cut(vector, "columns"),
            displaced=cut(vector, "displaced").reshape(2, -1),
            extremes=extremes.amax(0).reshape(2, -1),
        )
        outputs, world = self.shape.outputs, self.team.world
        return finish_head(parts, outputs, world, mean, probed, moved=moved, tied=self.shape.tied)


def _add_head(message: Message, parts: HeadParts) -> None:
    for name in ("classifier", "columns", "displaced"):
        message.add(name, getattr(parts, name))
    message.add("head", parts.sums)
    message.own(len(LINE), parts.extremes)
