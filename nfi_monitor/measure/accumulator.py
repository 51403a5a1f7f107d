"""Merge the rows of the micro-batches of one optimizer step, on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nfi_monitor.capture import devices
from nfi_monitor.capture.head_probe import Rows
from nfi_monitor.capture.sharding import ClassShard
from nfi_monitor.measure import global_means
from nfi_monitor.measure.late.packing import Late
from nfi_monitor.measure.late.rows import KnownLoss, absorbed_classes, late_rows
from nfi_monitor.measure.native_rows import row_statistics
from nfi_monitor.measure.row_plan import FEATURE_ROWS, HostRows, RowPlans
from nfi_monitor.measure.rows import (
    MISMATCH,
    OTHER_LOSS,
    LossKind,
    RowStatistics,
    corrected,
    single_output_statistics,
)
from nfi_monitor.measure.sharded.rows import ShardRows, shard_rows

LOOK_FIRST = 8
"""Number of optimizer steps at the start of a run in which the kind of loss is always checked."""
LOOK_EVERY = 64
"""Later, the kind of loss is checked in one of so many steps: it rarely changes, and the check doubles the
work."""
SAME_SLOPE = 0.1
"""Relative change of the factor between the head's logits and those of the loss that needs no second look."""
MOVES, MOVING = 1e-3, 16
"""Relative change of that factor, after which the loss is checked in so many readings, too: the factor may be
trained, or have a schedule."""
RARELY = 8
"""While rows are none of a cross-entropy's, the loss is checked in one of so many readings: what looks like
another loss may be a factor that is still near 1."""


def looks(step: int) -> bool:
    """Return whether the kind of loss is checked in optimizer step ``step``."""
    return step <= LOOK_FIRST or step % LOOK_EVERY == 0


class Facts(NamedTuple):
    """What the last reading said of the loss, see :class:`~nfi_monitor.measure.loss_kind.LossKind`."""

    eps: float
    slope: float
    other_loss: int
    """0: a cross-entropy; 1: some rows are none of it; 2: most."""

    @classmethod
    def of(cls, values: Mapping[str, float]) -> Facts:
        share = values.get("mismatch_fraction", 0.0)
        slope = values.get("logit_scale", 1.0)
        return cls(values["loss_epsilon"], slope, (share > MISMATCH) + (share > OTHER_LOSS))

    def differ(self, before: Facts) -> bool:
        """Return whether the loss looks like another one than before."""
        if self.eps != before.eps or self.other_loss != before.other_loss:
            return True
        return not abs(self.slope - before.slope) <= SAME_SLOPE * abs(before.slope)


class RowAccumulator:
    """Merge the row statistics of micro-batches.

    ``absorbed`` counts absorbed rows by class over the whole run.  ``devices`` are those on which rows were
    seen.  Only rows on the first of them are merged, until a step has rows on another one alone.
    """

    def __init__(self) -> None:
        self.devices: list[torch.device] = []
        self.absorbed: dict[int, float] = {}
        self.single_output: bool | None = None
        self._known = KnownLoss()
        self._plans = RowPlans()
        self.sums: Tensor | None = None
        self.shards: list[ShardRows] = []  # rows whose other classes are on other ranks
        self.facts: Facts | None = None
        self.look_again = False
        self._slope: float | None = None  # when it has moved last
        self._moving = 0  # readings until it counts as constant
        self._readings = 0
        self.late: list[Late[RowStatistics]] = []  # rows whose statistics the host makes later
        self._elsewhere: torch.device | None = None  # where this step had rows that were not merged
        self.clear(1)

    def clear(self, step: int) -> None:
        """Start optimizer step ``step`` (counted from 1)."""
        if self._elsewhere is not None and not self.measured and not self.shards:
            self.devices = [self._elsewhere]  # the model was moved, or the first pass was a foreign one
        self._elsewhere = None
        self._step, self._kind_before = step, self.loss_kind
        self.sums = None
        self.maxima: Tensor | None = None
        self.numbers: HostRows | None = None  # in place of sums and maxima, where the host knows them
        self.shards, self.late = [], []
        self.shard: ClassShard | None = None
        self.features: Tensor | None = None
        self._feature_sum: Tensor | None = None
        self._feature_count: Tensor | float | None = None

    @property
    def loss_kind(self) -> LossKind | None:
        """The facts about the loss, on the host; on an accelerator, up to the last look that has arrived."""
        return self._known.kind

    @loss_kind.setter
    def loss_kind(self, kind: LossKind | None) -> None:
        if kind is None or kind is not self._known.kind:
            self._known = KnownLoss()  # rows on their way add what they show to the old one
            self._known.kind = kind

    @property
    def measured(self) -> bool:
        """Whether rows of this step were measured whole."""
        return self.numbers is not None or self.sums is not None or bool(self.late)

    def look_ahead(self, waiting: Sequence[Rows]) -> None:
        """Learn the kind of loss from all passes of the first step, before the first of them is measured.

        The gradient of one pass may be nothing but rounding, which only the size of the others shows.
        """
        kind = None
        for rows in waiting:
            # On an accelerator, the kind of loss is known some steps later in any case.
            if rows.shard is None and rows.logits.shape[-1] > 1 and devices.on_host(rows.grad):
                kind = row_statistics(rows.grad, rows.logits, rows.total, kind).loss_kind
        self.loss_kind = kind

    def discard(self) -> None:
        """Forget the rows of this step so far, and what they have shown of the loss."""
        self.loss_kind = self._kind_before
        self.clear(self._step)

    def learn_reading(self, values: Mapping[str, float]) -> None:
        """Look again in the next reading if this one shows another loss than the one before.

        One odd pass must not decide what the rows are held against until the next regular look.
        """
        if "loss_epsilon" not in values:
            return
        facts, before = Facts.of(values), self.facts
        known = self._slope if self._slope is not None else 1.0 if before is None else before.slope
        moved = abs(facts.slope - known) > MOVES * known
        self._slope = facts.slope if moved else known
        self._moving = MOVING if moved else max(self._moving - 1, 0)
        self._readings += 1
        self.look_again = (
            self._moving > 0
            or (before is not None and facts.differ(before))
            or (facts.other_loss > 0 and self._readings % RARELY == 0)
        )
        self.facts = facts

    def add(self, rows: Rows) -> None:
        """Measure rows, and add them to those of this step."""
        device = rows.grad.device
        if device not in self.devices:
            # The backward pass of each device runs in a thread of its own. Appending makes the first device
            # the same for all threads.
            self.devices.append(device)
        if device != self.devices[0]:
            self._elsewhere = device
            return
        self.single_output = rows.shard is None and rows.logits.shape[-1] == 1
        look = self.look_again or looks(self._step)
        kind = self.loss_kind
        if kind is not None and not look and self.sums is None and rows.shard is None:
            found = self._plans.measure(rows, kind)
            if found is not None:
                self._add_numbers(found)
                return
        with torch.no_grad(), devices.full_precision(rows.grad):
            self.settle()
            self._add_tensors(rows, look=look)

    def _add_tensors(self, rows: Rows, *, look: bool) -> None:
        """Measure rows with a tensor for each result."""
        if self.single_output:
            self._merge(rows, single_output_statistics(rows.grad, rows.logits, rows.total))
            return
        if rows.shard is not None:
            self._add_shard(rows, rows.shard)
            return
        if not devices.on_host(rows.grad) and len(rows.grad):
            late, counts = late_rows(rows, self._known, look=look)
            self.late.append(late)
            self._add_features(rows, counts)
            return
        statistics = row_statistics(rows.grad, rows.logits, rows.total, self.loss_kind, look=look)
        self.loss_kind = statistics.loss_kind
        self._merge(rows, corrected(statistics, rows.normalized, len(rows.grad), rows.recomputed))

    def _add_shard(self, rows: Rows, shard: ClassShard) -> None:
        look = looks(self._step) or self.loss_kind is None
        level = None if self.loss_kind is None else self.loss_kind.level
        part = shard_rows(rows.grad, rows.logits, shard.first, rows.total, level, look=look)
        self.shards.append(part)
        self.shard = shard
        self._add_features(rows, part.counts)

    def learn(self, loss_kind: LossKind, absorbed: Mapping[int, int]) -> None:
        """Keep the facts from the joined rows of all ranks: kind of loss, absorbed rows by class."""
        self.loss_kind = loss_kind
        self.count_absorbed(absorbed)

    def count_absorbed(self, absorbed: Mapping[int, int]) -> None:
        """Add absorbed rows by class."""
        for index, count in absorbed.items():
            self.absorbed[index] = self.absorbed.get(index, 0.0) + count

    def _add_numbers(self, found: HostRows) -> None:
        """Add rows whose numbers the host knows."""
        before, count = self.numbers, found.counted
        if before is None:
            self.numbers = found
        else:
            self.numbers = found._replace(
                sums=[a + b for a, b in zip(before.sums, found.sums, strict=True)],
                # As torch.maximum: NaN stays.
                maxima=[
                    a if a >= b or a != a else b for a, b in zip(before.maxima, found.maxima, strict=True)
                ],
                wide=before.wide or found.wide,
            )
        self.count_absorbed(found.absorbed)
        if found.feature_sum is None:
            return
        if self._feature_sum is None or self._feature_count is None:
            self._feature_sum, self._feature_count, self.features = found.feature_sum, count, found.features
        else:
            self._feature_sum = self._feature_sum + found.feature_sum
            self._feature_count = self._feature_count + count

    def settle(self) -> None:
        """Make tensors of the numbers: other rows are added to them, or the other ranks need them."""
        if self.numbers is not None:
            known, self.numbers = self.numbers, None
            dtype = torch.float64 if known.wide else torch.float32
            self.sums = torch.tensor(known.sums, dtype=dtype, device="cpu")
            self.maxima = torch.tensor(known.maxima, dtype=dtype, device="cpu")

    def _merge(self, rows: Rows, statistics: RowStatistics) -> None:
        if self.sums is None or self.maxima is None:
            self.sums, self.maxima = statistics.sums, statistics.maxima
        else:
            self.sums = self.sums + statistics.sums
            self.maxima = torch.maximum(self.maxima, statistics.maxima)
        self.count_absorbed(absorbed_classes(statistics))
        self._add_features(rows, statistics.counts)

    def _add_features(self, rows: Rows, counts: Tensor) -> None:
        if rows.features is not None:
            features = rows.features
            if features.dtype not in (torch.float32, torch.float64):
                features = features.float()
            total = global_means.feature_sum(features, counts)
            count = counts.sum()
            if self._feature_sum is None or self._feature_count is None:
                self._feature_sum, self._feature_count = total, count
                # A copy, so that these rows do not keep the features of the whole batch until the step.
                self.features = features[:FEATURE_ROWS].clone()
            else:
                self._feature_sum = self._feature_sum + total
                self._feature_count = self._feature_count + count

    @property
    def feature_total(self) -> tuple[Tensor, Tensor] | None:
        """Return Σ h [d] over the rows that count, and their number; None without features."""
        if self._feature_sum is None or self._feature_count is None:
            return None
        count = self._feature_count
        if not isinstance(count, Tensor):
            count = torch.tensor(count, dtype=self._feature_sum.dtype, device=self._feature_sum.device)
        return self._feature_sum, count

    @property
    def feature_mean(self) -> Tensor | None:
        """Return μ_G [d] over the rows that count; NaN where none does, None without features."""
        total, count = self._feature_sum, self._feature_count
        return None if total is None or count is None else total / count

    def most_absorbed(self, limit: int | None) -> list[tuple[int, float]]:
        """Return (class, absorbed rows), largest count first."""
        return sorted(self.absorbed.items(), key=lambda item: (-item[1], item[0]))[:limit]
