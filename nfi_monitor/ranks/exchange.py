"""What the ranks of a team tell each other of one measured step: one vector each, one sum.

The vector has a layout fixed at attach.  Sums (rows, features, losses, shards of step quantities) stand at
the same place on every rank; what has to be compared and not added (maxima, flags, the step's number) stands
in a line that each rank has for itself, so that one sum brings both.  A rank that saw nothing, or whose
capture failed, sends zeros: it always joins.

On an accelerator numbers reach the host late, and on each rank at another time.  There an exchange is begun
``lag`` steps after its step and taken up one step later, on all ranks alike, so that what depends on it
(phase, cadence) is decided equally everywhere.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor.capture import devices, sharding
from nfi_monitor.capture.devices import full_precision
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.host_transfer import HostTransfer
from nfi_monitor.capture.optimizer import Update, gradient_columns
from nfi_monitor.measure.accumulator import FEATURE_ROWS, RowAccumulator, looks
from nfi_monitor.measure.rows import MAXIMA, SUMS, LossKind, finish
from nfi_monitor.measure.sharded.rows import FIELDS, HEADER, SHOWN, Together, merged, together
from nfi_monitor.measure.sharded.step import (
    HEAD_RANKS,
    HEAD_SUMS,
    STEP_SUMS,
    TENSOR_SUMS,
    HeadParts,
    finish_head,
    finish_step,
    head_parts,
    step_parts,
)
from nfi_monitor.measure.step import SKIPPED, Memory, mean_statistics
from nfi_monitor.quantities import QUANTITIES
from nfi_monitor.ranks import processes
from nfi_monitor.ranks import team as teams
from nfi_monitor.ranks.team import Team

LAG = 2
"""Steps after which an accelerator's numbers are waited for: so far the host may run ahead of the device."""
PROBE_ELEMENTS = 1 << 15
"""Feature rows made known to all ranks for the displacement of a sharded head: as many as fit in here."""
ROW_SLOTS = 512
"""Rows a step of which ranks tell each other what their classes show, where logits are cut along them ..."""
ROW_NUMBERS = 1 << 18
"""... and fewer where many ranks do: all of that together takes at most 2 MiB, but for 8 rows of each."""
FLAGS = ("step", "left", "failed", "single_output", "wide_rows", "wide_loss")
"""The step's number; 1 for a closed monitor's last words, where a part of it has failed, for a head with one
output, for rows and for losses that are not float32."""
_OWN = ("logit_displacement", "logit_displacement_rms")
"""Of the rows that a rank keeps features of: taken from the first rank that has any, as one process takes
them from the first micro-batch.  The largest of all ranks would be of more rows than the thresholds mean."""
_LARGEST = ("margin_displacement", SKIPPED)
_LINE = (*FLAGS, *MAXIMA, *_OWN, *_LARGEST)
_HEAD = (
    *_OWN, "head_weight_norm", "classifier_mean_norm", "zero_sum_violation_weight", "zero_sum_violation_bias",
)  # fmt: skip
_MEAN = tuple(name for name in QUANTITIES if name not in _OWN + _LARGEST + ("loss",))


@dataclass(frozen=True)
class Shape:
    """What all ranks have to have in common for their vectors to mean the same.

    ``features`` d of the head (0: not known), ``outputs`` K, ``columns`` of the head's gradient that are
    read; ``matrices``: which of the optimizer's tensors have two dimensions or more, ``head``: which is the
    head's weight, or None.  ``sharded``: some tensor is cut over the ranks; ``head_sharded``: the head is,
    along its classes.  ``late``: numbers come from an accelerator.  ``slots``: losses between two readings.
    ``alike``: all ranks have the same rows, and the head is pooled.  ``row_slots``: rows told of where logits
    may be cut, else 0.
    """

    features: int
    outputs: int
    columns: int
    matrices: tuple[bool, ...]
    head: int | None
    tied: bool
    sharded: bool
    head_sharded: bool
    late: bool
    slots: int
    alike: bool
    row_slots: int

    @property
    def tensors(self) -> int:
        return len(self.matrices)

    @property
    def probe_rows(self) -> int:
        if not self.head_sharded or not self.features:
            return 0
        return max(1, min(FEATURE_ROWS, PROBE_ELEMENTS // self.features))

    @property
    def pooled_head(self) -> bool:
        """Whether the head is read by sums over classes: it is cut, or what it needs of μ_G comes late."""
        return bool(self.features) and (self.head_sharded or self.late)


class Shares(NamedTuple):
    """1 over the number of ranks that hold the same: part of each tensor, classes of the head, rows."""

    tensors: tuple[float, ...]
    head: float
    rows: float


def survey(
    model: nn.Module, optimizer: Optimizer, head: Head | None, world: int, *, slots: int
) -> tuple[Shape, Shares]:
    """How a model lies on the ``world`` ranks that train it."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    flat = processes.flat_shards(processes.wrapper_of(model))
    weight = head.weight if head is not None else None
    of_weight = 1 if weight is None else sharding.shards(weight)
    features = outputs = columns = 0
    head_sharded = False
    if head is not None and weight is not None:
        outputs, features = head.outputs or 0, weight.shape[1 - head.class_axis]
        columns = gradient_columns(features, outputs)
        # Cut along its features, too, a head would need another exchange for every row.
        along_classes = sharding.shards(weight, head.class_axis)
        head_sharded = sharding.is_sharded(weight) and along_classes == of_weight
    data_ranks = processes.data_ranks(model, world)
    parallel = head_sharded and outputs > 1 and data_ranks < world  # the rest is tensor parallel
    late = processes.any_accelerator(model)
    shape = Shape(
        features=features,
        outputs=outputs,
        columns=columns,
        matrices=tuple(param.ndim > 1 for param in params),
        head=next((place for place, param in enumerate(params) if param is weight), None),
        tied=head.tied if head is not None else False,
        sharded=flat > 1 or any(sharding.is_sharded(param) for param in params),
        head_sharded=head_sharded,
        late=late,
        slots=slots,
        alike=bool(features) and (head_sharded or late) and processes.rows_alike(model, world),
        row_slots=max(8, min(ROW_SLOTS, ROW_NUMBERS // (len(FIELDS) * world))) if parallel else 0,
    )
    shares = Shares(
        tensors=tuple(max(flat, sharding.shards(param)) / world for param in params),
        head=of_weight / world,
        rows=data_ranks / world,
    )
    return shape, shares


class Layout:
    """Where everything stands in the vector."""

    def __init__(self, shape: Shape, world: int) -> None:
        self.line = len(_LINE) + (2 * (shape.probe_rows + 1) if shape.pooled_head else 0)
        self.block = len(HEADER) + len(FIELDS) * shape.row_slots if shape.row_slots else 0
        fields = {
            "rows": len(SUMS),
            "features": shape.features,
            "feature_count": 1,
            "means": len(_MEAN),
            "mean_counts": len(_MEAN),
            "losses": shape.slots + 1,
            "loss_counts": shape.slots + 1,
            "step_ranks": 1,
            "whole_heads": 1,
            "step": len(STEP_SUMS) if shape.sharded else 0,
            "tensors": len(TENSOR_SUMS) * shape.tensors if shape.sharded else 0,
            "head": len(HEAD_SUMS) if shape.pooled_head else 0,
            "classifier": shape.features if shape.pooled_head else 0,
            "columns": shape.columns if shape.pooled_head else 0,
            "displaced": 2 * shape.probe_rows,
            "probe_rows": 0 if shape.alike else shape.probe_rows * shape.features,
            "shards": world * self.block,
            "lines": world * self.line,
        }
        self.fields: dict[str, tuple[int, int]] = {}
        self.size = 0
        for name, length in fields.items():
            self.fields[name] = (self.size, length)
            self.size += length

    def at(self, name: str) -> int:
        return self.fields[name][0]

    def cut(self, vector: Tensor, name: str) -> Tensor:
        start, length = self.fields[name]
        return vector[start : start + length]


@dataclass
class Reduced:
    """One step as all ranks have seen it. ``values`` is empty where nobody measured anything."""

    step: int
    values: dict[str, float]
    losses: list[tuple[int, float]]
    """(step, loss) of the steps since the reading before, oldest first."""
    skipped: bool
    single_output: bool
    failed: list[int] = field(default_factory=list)
    """Ranks on which a part of the monitor failed: their share is missing."""
    left: list[int] = field(default_factory=list)
    """Ranks (of the team) that take part for the last time."""
    together: Together | None = None
    """Rows whose classes are on several ranks, if there are any."""
    out_of_step: list[int] = field(default_factory=list)
    """Ranks that are at another step than this one: they cannot be read together."""


class Message:
    """What one rank has to say, put together where it is and on the host."""

    def __init__(self, layout: Layout, index: int) -> None:
        self._layout = layout
        self._own = layout.at("lines") + index * layout.line
        self.tensors: list[tuple[int, Tensor]] = []
        self.numbers: list[tuple[int, float]] = [
            (self._own + place, -math.inf) for place in range(len(FLAGS), layout.line)
        ]

    def add(self, name: str, value: Tensor | float, place: int = 0) -> None:
        self._put(self._layout.at(name) + place, value)

    def own(self, place: int, value: Tensor | float) -> None:
        """In this rank's line."""
        self._put(self._own + place, value)

    def _put(self, position: int, value: Tensor | float) -> None:
        if isinstance(value, Tensor):
            self.tensors.append((position, value.detach().reshape(-1).double()))
        else:
            self.numbers.append((position, float(value)))

    def pack(self) -> Packed:
        """One tensor, and where its parts belong."""
        places = [(position, tensor.numel()) for position, tensor in self.tensors]
        parts = devices.together([tensor for _, tensor in self.tensors])
        return Packed(torch.cat(parts) if parts else torch.empty(0), places, self.numbers)


class Packed(NamedTuple):
    """``tensor`` [Σ lengths], ``places`` (position, length) of its parts, ``numbers`` (position, value)."""

    tensor: Tensor
    places: list[tuple[int, int]]
    numbers: list[tuple[int, float]]


class Exchange:
    """Exchanges the readings of a team. Every call is made by all ranks at the same step."""

    def __init__(self, team: Team, shape: Shape, shares: Shares, places: Mapping[int, int]) -> None:
        """``places``: id of a parameter → which of the optimizer's tensors it is."""
        self.team, self.shape, self._places = team, shape, places
        self._layout = Layout(shape, team.world)
        self._shares = shares
        self._lag = LAG if shape.late else 0
        self._outbox = HostTransfer()
        self._under_way: deque[tuple[int, Callable[[], Tensor], Tensor | None]] = deque()
        self._losses: dict[int, Tensor | float] = {}
        self._means: deque[tuple[int, Tensor]] = deque(maxlen=2)
        self._probe_rows: Tensor | None = None
        self._own_mean: Tensor | None = None  # μ_G of this step, where all ranks have the same rows
        self._loss_kind: LossKind | None = None
        self._probed: deque[tuple[int, int, bool]] = deque()  # per step: probe rows used, Δμ_G used
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
        """Sign this rank up. Whether the others come is asked at the first step that is read."""
        shape, shares = survey(model, optimizer, head, len(ranks), slots=slots)
        name = f"{type(model).__name__} {head.name if head is not None else None} {shape}"
        line = Team(ranks, name, timeout=1800.0 if shape.late else teams.TIMEOUT)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        pool = cls(line, shape, shares, {id(param): place for place, param in enumerate(params)})
        wrapper = processes.wrapper_of(model)
        # Weak: what a closed monitor leaves behind must not keep the model alive.
        pool._wrapper = None if wrapper is None else weakref.ref(wrapper)
        return pool

    @property
    def stops_early(self) -> bool:
        """Whether a rank may have made fewer optimizer steps than the others."""
        return processes.lets_ranks_stop_early(None if self._wrapper is None else self._wrapper())

    @property
    def speaks(self) -> int:
        """The global rank that reports for all."""
        return self.team.ranks[0]

    # --- send --------------------------------------------------------------------------------------

    def message(self) -> Message:
        return Message(self._layout, self.team.index)

    def keep_loss(self, step: int, loss: Tensor | float) -> None:
        """A loss between readings goes with the next exchange; of more than fit, the latest.

        A copy: whose tensor it is may write into it meanwhile.
        """
        self._losses[step] = loss.clone() if isinstance(loss, Tensor) else loss
        while len(self._losses) > self.shape.slots + 1:
            del self._losses[next(iter(self._losses))]

    def add_rows(self, message: Message, rows: RowAccumulator) -> None:
        """Row statistics and features of this rank's micro-batches, if it has seen any."""
        share = self._shares.rows
        if rows.sums is not None and rows.maxima is not None:
            message.add("rows", rows.sums if share == 1 else rows.sums * share)
            message.own(len(FLAGS), rows.maxima)
            message.own(FLAGS.index("wide_rows"), float(rows.sums.dtype is torch.float64))
            message.own(FLAGS.index("single_output"), float(bool(rows.single_output)))
        if rows.shards and rows.shard is not None:
            shard = rows.shard
            sent = merged(rows.shards, shard.first, shard.classes, shard.group, self.shape.row_slots)
            place = self.team.index * self._layout.block
            for at, number in enumerate(sent.header):
                message.add("shards", number, place + at)
            message.add("shards", sent.shown, place + SHOWN)
            message.add("shards", sent.numbers, place + len(HEADER))
            message.own(FLAGS.index("wide_rows"), float(sent.numbers.dtype is torch.float64))
            if self._loss_kind is None and rows.loss_kind is not None:  # a resumed run's
                self._loss_kind = LossKind(*(known.cpu() for known in rows.loss_kind))
        total, features = rows.feature_total, rows.features
        if self.shape.alike:
            self._own_mean = self._probe_rows = None
        if total is None or features is None or len(total[0]) != self.shape.features:
            return
        message.add("features", total[0] if share == 1 else total[0] * share)
        message.add("feature_count", total[1] if share == 1 else total[1] * share)
        if self.shape.alike:
            self._own_mean, self._probe_rows = total[0] / total[1], features[: self.shape.probe_rows]
        elif self.shape.probe_rows and self.team.index == 0:
            message.add("probe_rows", features[: self.shape.probe_rows])

    def add_values(self, message: Message, values: Mapping[str, Tensor | float]) -> None:
        """Quantities that are whole on every rank that has them."""
        for name, value in values.items():
            if name in _OWN + _LARGEST:
                message.own(_LINE.index(name), value)
            elif name != "loss":
                message.add("means", value, _MEAN.index(name))
                message.add("mean_counts", 1.0, _MEAN.index(name))

    def whole(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a step's quantities those that a rank can read whole: all, or the head's with sharded layers."""
        if not self.shape.sharded:
            return values
        return {name: value for name, value in values.items() if name in _HEAD}

    def add_step(self, message: Message, update: Update | None, step: int) -> None:
        """This rank's shards; ``update`` None: it holds none."""
        if not self.shape.sharded:
            return
        message.add("step_ranks", 1.0)
        if update is None:
            self._memory = None
            return
        positions = [self._places[id(param)] for param in update.params]
        shares = [self._shares.tensors[position] for position in positions]
        parts, self._memory = step_parts(update, positions, shares, self.shape.tensors, self._memory, step)
        message.add("step", parts.sums)
        message.add("tensors", parts.tensors)

    def add_head(self, message: Message, update: Update | None, step: int) -> None:
        """This rank's classes of the head; ``update`` None: it holds none."""
        if not self.shape.pooled_head:
            return
        if self.shape.alike:
            self._keep_mean(step, self._own_mean)
        if update is None:
            for name in HEAD_RANKS:
                message.add("head", 1.0, HEAD_SUMS.index(name))
            return
        if not self.shape.head_sharded:  # the rest of it is whole on every rank
            update = replace(update, head_weight_grad=None, head_bias_grad=None, head_weight_update=None)
        moved, known = self._moved_mean(), self._probe_rows
        widths = (self.shape.features, self.shape.columns, self.shape.probe_rows)
        parts = head_parts(update, self._shares.head, widths, known, moved)
        for name in ("classifier", "columns", "displaced"):
            message.add(name, getattr(parts, name))
        message.add("head", parts.sums)
        message.own(len(_LINE), parts.extremes)

    def _keep_mean(self, step: int, mean: Tensor | None) -> None:
        if mean is None:
            self._means.clear()
        else:
            self._means.append((step, mean))

    def _moved_mean(self) -> Tensor | None:
        """Δμ_G of the newest two neighbouring steps that all ranks know."""
        if len(self._means) < 2 or self._means[1][0] != self._means[0][0] + 1:
            return None
        return self._means[1][1] - self._means[0][1]

    def finish(self, message: Message, step: int, *, left: bool = False, failed: bool = False) -> Packed:
        """Add what every message holds: the step, its flags, and the losses that were kept."""
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

    def nothing(self, step: int, *, left: bool = False, failed: bool = False) -> Packed:
        """The message of a rank that has nothing to say, but is there."""
        self._losses.clear()
        return self.finish(self.message(), step, left=left, failed=failed)

    def send(self, packed: Packed, step: int, *, head_weight: Tensor | None = None) -> None:
        """``head_weight`` [K, d], if whole: for the quantities that need the mean features of all ranks."""
        self._losses.clear()
        rows = 0 if self._probe_rows is None else len(self._probe_rows)
        self._probed.append((step, rows, self._moved_mean() is not None))
        if head_weight is not None:
            packed.numbers.append((self._layout.at("whole_heads"), 1.0))
        label = (step, packed.places, packed.numbers, None if self.shape.late else head_weight)
        self._outbox.put(label, packed.tensor)

    # --- receive -----------------------------------------------------------------------------------

    def receive(self, step: int) -> list[Reduced]:
        """What is due at this step, oldest first; raises RuntimeError when a rank is gone."""
        arrived = []
        while self._under_way and self._under_way[0][0] < step:
            arrived.append(self._finish(*self._under_way.popleft()))
        for label, numbers in self._outbox.take(due=lambda label: label[0] <= step - self._lag):
            at, places, host, head_weight = label
            vector = torch.zeros(self._layout.size, dtype=torch.float64)
            positions, known = zip(*host, strict=True)
            vector[list(positions)] = torch.tensor(known, dtype=torch.float64)
            values, start = torch.tensor(numbers, dtype=torch.float64), 0
            for position, length in places:
                vector[position : position + length] = values[start : start + length]
                start += length
            self._under_way.append((at, self.team.add_up(vector), head_weight))
        if not self._lag:
            while self._under_way:
                arrived.append(self._finish(*self._under_way.popleft()))
        return arrived

    def _finish(self, step: int, wait: Callable[[], Tensor], head_weight: Tensor | None) -> Reduced:
        vector = wait()
        cut = self._layout.cut
        lines = cut(vector, "lines").reshape(self.team.world, self._layout.line)
        line = {name: lines[:, place] for place, name in enumerate(_LINE)}
        _, probed, moved = self._probed.popleft()
        # One rank in float32: sums of float32 numbers, rounded once, as one process would have added them.
        dtype = torch.float64 if line["wide_rows"].any() else torch.float32
        mean = self._mean_features(step, vector, dtype)

        values: dict[str, float] = {}
        single_output = bool(line["single_output"].any())
        maxima = [float(line[name].amax()) for name in MAXIMA]
        sums = cut(vector, "rows")
        joined = self._join_rows(step, vector, dtype) if self.shape.row_slots else None
        if joined is not None:
            # Each set of ranks that completes a row counts once, and as often as its rows are the run's.
            share = self._shares.rows * self.team.world / joined.groups
            sums = sums + joined.sums * share
            maxima = [max(one, float(two)) for one, two in zip(maxima, joined.maxima, strict=True)]
        values |= finish(sums.to(dtype).tolist(), maxima, single_output=single_output)
        counts = cut(vector, "mean_counts").tolist()
        for name, total, count in zip(_MEAN, cut(vector, "means").tolist(), counts, strict=True):
            if count > 0:
                values[name] = total / count
        values |= {name: _first(line[name]) for name in _OWN if _any(line[name])}
        values |= {name: float(line[name].amax()) for name in _LARGEST if _any(line[name])}
        skipped = values.pop(SKIPPED, 0.0) > 0
        if self.shape.sharded and float(cut(vector, "step_ranks")) == self.team.world:
            rate = values.get("learning_rate", math.nan)
            tensors = cut(vector, "tensors").reshape(len(TENSOR_SUMS), -1)
            values |= finish_step(cut(vector, "step"), tensors, self.shape.matrices, self.shape.head, rate)
        # Only if all ranks can: what one of them concludes alone would part their decisions.
        whole_heads = float(cut(vector, "whole_heads")) == self.team.world
        if head_weight is not None and whole_heads and mean is not None:
            before = self._means[0][1] if self._moved_mean() is not None else None
            with full_precision(head_weight):
                known = mean_statistics(head_weight, mean, before)
            values |= {name: float(value) for name, value in known.items()}
        elif mean is not None:
            values["feature_mean_norm"] = float(torch.linalg.vector_norm(mean))
        if self.shape.pooled_head:
            values |= self._finish_head(vector, lines[:, len(_LINE) :], mean, probed, moved)
        if not self.shape.alike:
            rows = cut(vector, "probe_rows").reshape(-1, max(self.shape.features, 1))
            shown = rows.any(1)
            if shown.any():
                self._probe_rows = rows[shown]
        # As above: the mean of float32 losses is a float32.
        counted = cut(vector, "loss_counts")
        means = cut(vector, "losses") / counted
        means = means if line["wide_loss"].any() else means.float()
        losses = [
            (step - slot, loss)
            for slot, (loss, count) in enumerate(zip(means.tolist(), counted.tolist(), strict=True))
            if count > 0
        ]
        if losses and losses[0][0] == step:
            values["loss"] = losses.pop(0)[1]
        return Reduced(
            step,
            values,
            losses[::-1],
            skipped,
            single_output,
            failed=_where(line["failed"] > 0),
            left=_where(line["left"] > 0),
            together=joined,
            out_of_step=_where(line["step"] != step),
        )

    def _join_rows(self, step: int, vector: Tensor, dtype: torch.dtype) -> Together | None:
        blocks = self._layout.cut(vector, "shards").reshape(self.team.world, self._layout.block)
        known, outputs = self._loss_kind, self.shape.outputs
        joined = together(blocks, outputs, known, look=looks(step), dtype=dtype)
        if joined is not None:
            self._loss_kind = joined.loss_kind
        return joined

    def _mean_features(self, step: int, vector: Tensor, dtype: torch.dtype) -> Tensor | None:
        count = self._layout.cut(vector, "feature_count").to(dtype)
        if not self.shape.features or not float(count) > 0:
            return None
        mean = self._layout.cut(vector, "features").to(dtype) / count
        if not self.shape.alike:
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


def _any(values: Tensor) -> bool:
    return bool((values != -math.inf).any())


def _first(values: Tensor) -> float:
    return next(float(value) for value in values.tolist() if value != -math.inf)


def _where(condition: Tensor) -> list[int]:
    return [index for index, holds in enumerate(condition.tolist()) if holds]
