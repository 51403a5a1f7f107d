"""Lay out the vector that the ranks of a team add up, and fill in one rank's share of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nfi_monitor.capture import devices
from nfi_monitor.measure.late.packing import Failed, Late, Outline
from nfi_monitor.measure.rows import MAXIMA, SUMS
from nfi_monitor.measure.sharded.rows import FIELDS, HEADER
from nfi_monitor.measure.sharded.step import HEAD_SUMS, STEP_SUMS, TENSOR_SUMS
from nfi_monitor.measure.step import SKIPPED
from nfi_monitor.quantities import QUANTITIES, Merge, merged_by
from nfi_monitor.ranks.shape import Shape

T = TypeVar("T")
FLAGS = ("step", "left", "failed", "single_output", "wide_rows", "wide_loss")
"""Numbers in a rank's line: the step; then flags (1 or 0): the monitor leaves, a part of it failed, the head
has one output, rows are float64, losses are float64."""
OWN = merged_by(Merge.FIRST_RANK)
"""Quantities taken from the first rank that has them, as one process takes them from its first micro-batch.
The maximum over all ranks would be over more rows than the thresholds were chosen for."""
LARGEST = (*merged_by(Merge.LARGEST_RANK), SKIPPED)
"""Quantities of which the maximum over the ranks is used."""
LINE = (*FLAGS, *MAXIMA, *OWN, *LARGEST)
"""Names of the numbers in a rank's line."""
WHOLE_ON_EACH_RANK = (
    *OWN, "head_weight_norm", "classifier_mean_norm", "zero_sum_violation_weight", "zero_sum_violation_bias",
)  # fmt: skip
"""Quantities that every rank can compute alone although layers are sharded."""
MEANS = tuple(name for name in QUANTITIES if name not in OWN + LARGEST + merged_by(Merge.LOSS))
"""Quantities of which the mean over the ranks is used."""


class Layout:
    """Hold the position of each field in the vector."""

    def __init__(self, shape: Shape, world: int) -> None:
        self.line = len(LINE) + (2 * (shape.probe_rows + 1) if shape.head_is_summed else 0)
        self.block = len(HEADER) + len(FIELDS) * shape.row_slots if shape.row_slots else 0
        fields = {
            "rows": len(SUMS),
            "features": shape.features,
            "feature_count": 1,
            "means": len(MEANS),
            "mean_counts": len(MEANS),
            "losses": shape.slots + 1,
            "loss_counts": shape.slots + 1,
            "step_ranks": 1,
            "whole_heads": 1,
            "step": len(STEP_SUMS) if shape.sharded else 0,
            "tensors": len(TENSOR_SUMS) * shape.tensors if shape.sharded else 0,
            "head": len(HEAD_SUMS) if shape.head_is_summed else 0,
            "classifier": shape.features if shape.head_is_summed else 0,
            "columns": shape.columns if shape.head_is_summed else 0,
            "displaced": 2 * shape.probe_rows,
            "probe_rows": 0 if shape.same_rows_everywhere else shape.probe_rows * shape.features,
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


class Message:
    """Collect one rank's part of the vector: tensors on their device, numbers on the host."""

    def __init__(self, layout: Layout, index: int) -> None:
        self._layout = layout
        self._own = layout.at("lines") + index * layout.line
        self.tensors: list[tuple[int, Tensor]] = []
        self.failed: Failed = lambda part, error: None  # gets errors on the host
        self.late: list[tuple[Late[Any], Callable[[Message, Any], None]]] = []
        self.numbers: list[tuple[int, float]] = [
            (self._own + place, -math.inf) for place in range(len(FLAGS), layout.line)
        ]

    def add(self, name: str, value: Tensor | float, place: int = 0) -> None:
        self._put(self._layout.at(name) + place, value)

    def own(self, place: int, value: Tensor | float) -> None:
        """Put ``value`` into this rank's line."""
        self._put(self._own + place, value)

    def _put(self, position: int, value: Tensor | float) -> None:
        if isinstance(value, Tensor):
            self.tensors.append((position, value.detach().reshape(-1)))
        else:
            self.numbers.append((position, float(value)))

    def vector(self) -> Tensor:
        """Return the whole vector, float64. Everything is on the host by now."""
        whole = torch.zeros(self._layout.size, dtype=torch.float64, device="cpu")
        positions, known = zip(*self.numbers, strict=True)
        whole[list(positions)] = torch.tensor(known, dtype=torch.float64, device="cpu")
        lines = self._layout.at("lines")
        for position, tensor in self.tensors:
            part = whole[position : position + len(tensor)]
            part.copy_(torch.maximum(part, tensor) if position >= lines else part + tensor)
        return whole

    def defer(self, late: Late[T], add: Callable[[Message, T], None]) -> None:
        """Send tensors; once they are on the host, call ``add`` with a message and what they become."""
        self.late.append((late, add))

    def pack(self) -> Packed:
        """Return all tensors in one vector, with the position of each."""
        places = [(position, tensor.numel()) for position, tensor in self.tensors]
        parts = [tensor for _, tensor in self.tensors]
        parts += [part for late, _ in self.late for part in late.flat]
        parts = devices.together(parts)
        rest = [(late.outline(), add) for late, add in self.late]
        return Packed(torch.cat(parts) if parts else torch.empty(0), places, self.numbers, rest, self.failed)


class Packed(NamedTuple):
    """One rank's part of the vector, to be copied to the host.

    ``tensor`` [Σ lengths], ``places`` (position, length) of its parts, ``numbers`` (position, value).
    ``late``: what the end of ``tensor`` becomes on the host, and how that is added to a message.
    """

    tensor: Tensor
    places: list[tuple[int, int]]
    numbers: list[tuple[int, float]]
    late: list[tuple[Outline[Any], Callable[[Message, Any], None]]]
    failed: Failed

    def unpack(self, layout: Layout, index: int, arrived: Tensor) -> Tensor:
        """Return the whole vector, float64, of the rank ``index``. ``arrived``: ``tensor``, on the host."""
        message = Message(layout, index)
        message.numbers += self.numbers
        for position, length in self.places:
            message.tensors.append((position, arrived[:length].double()))
            arrived = arrived[length:]
        for outline, add in self.late:
            found, arrived = outline.read(arrived, self.failed)
            if found is None:
                message.own(FLAGS.index("failed"), 1.0)
            else:
                add(message, found)
        return message.vector()
