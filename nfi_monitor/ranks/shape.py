"""Describe how the model, its rows and its head are distributed over the ranks of a team."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from nfi_monitor.capture import sharding
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.optimizer import gradient_columns
from nfi_monitor.measure.row_plan import FEATURE_ROWS
from nfi_monitor.measure.sharded.rows import FIELDS
from nfi_monitor.ranks import processes

PROBE_ELEMENTS = 1 << 15
"""Maximum number of feature entries exchanged to measure the displacement of a sharded head."""
ROW_SLOTS = 512
"""Maximum number of rows exchanged per step for class-sharded logits."""
ROW_NUMBERS = 1 << 18
"""Maximum size of all rows exchanged per step: 2 MiB. At least 8 rows of each rank are exchanged."""


@dataclass(frozen=True)
class Shape:
    """The facts that must be the same on all ranks; otherwise their vectors have different layouts.

    Attributes:
        features: d of the head; 0 where it is not known.
        outputs: K of the head.
        columns: columns of the head's gradient that are read.
        matrices: for each of the optimizer's tensors, whether it has two dimensions or more.
        head: index of the head's weight among the optimizer's tensors, or None.
        tied: whether the head shares its weight with an input embedding.
        sharded: whether some tensor is sharded over the ranks.
        head_sharded: whether the head is sharded along its classes.
        late: whether numbers come from an accelerator.
        slots: maximum number of losses between two readings.
        same_rows_everywhere: whether all ranks have the same rows, and the head is read by sums over classes.
        row_slots: maximum number of rows exchanged per step for class-sharded logits; 0 without such logits.
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
    same_rows_everywhere: bool
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
    def head_is_summed(self) -> bool:
        """Whether the head is read by sums over its classes: it is sharded, or μ_G reaches the host late."""
        return bool(self.features) and (self.head_sharded or self.late)


class Shares(NamedTuple):
    """1 / (number of ranks that hold the same part), for each tensor, the head's classes, and the rows."""

    tensors: tuple[float, ...]
    head: float
    rows: float


def survey(
    model: nn.Module, optimizer: Optimizer, head: Head | None, world: int, *, slots: int
) -> tuple[Shape, Shares]:
    """Return how a model is distributed over the ``world`` ranks that train it.

    ``slots``: maximum number of losses between two readings.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    flat = processes.flat_shards(processes.wrapper_of(model))
    weight = head.weight if head is not None else None
    of_weight = 1 if weight is None else sharding.shards(weight)
    features = outputs = columns = 0
    head_sharded = False
    if head is not None and weight is not None:
        outputs, features = head.outputs or 0, head.width or 0
        columns = gradient_columns(features, outputs)
        # A head that is sharded along its features, too, would need another exchange for every row.
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
        same_rows_everywhere=bool(features)
        and (head_sharded or late)
        and processes.same_rows_everywhere(model, world),
        row_slots=max(8, min(ROW_SLOTS, ROW_NUMBERS // (len(FIELDS) * world))) if parallel else 0,
    )
    shares = Shares(
        tensors=tuple(max(flat, sharding.shards(param)) / world for param in params),
        head=of_weight / world,
        rows=data_ranks / world,
    )
    return shape, shares
