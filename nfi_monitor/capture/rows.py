"""Hold the sampled rows of one forward pass while backward passes add to their gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nfi_monitor.capture.backward_pass import Change, Pass, SeveralPasses, change
from nfi_monitor.capture.sharding import ClassShard


@dataclass
class Rows:
    """Sampled rows of one forward pass: gradient [n, K], logits [n, K], features [n, d] or None.

    While this object is alive, further backward passes through the same graph are added to it.
    """

    grad: Tensor
    logits: Tensor
    features: Tensor | None
    total: int  # number of rows of the whole batch
    shard: ClassShard | None = None  # set if this rank holds only some of the classes
    graph: Callable[[], object] = lambda: None
    """Returns None once the graph is freed: then no further gradient can arrive."""
    passes: SeveralPasses | None = None
    """The gradients of all backward passes, if there was more than one."""
    normalized: bool = False
    """Whether the logits are log-probabilities, which do not show the mean logit."""
    recomputed: Tensor | None = None
    """For recomputed rows: whether they are the run's rows, bool, 0-d. If not, they do not count."""
    features_from: tuple[int, int] | None = None
    """:func:`memory_of` the features in the forward pass; None if that is not known."""
    kind: Pass = Pass.TRAINS
    """The kind of the backward passes that count so far."""

    def add(self, grad: Tensor, kind: Pass = Pass.TRAINS) -> None:
        """Add the gradient [n, K] of a further backward pass, if it counts."""
        what = change(self.kind, kind)
        if what is Change.ADD:
            self._sum_up(grad)
        elif what is Change.REPLACE:
            self.kind = kind
            self._start_anew(grad)

    def _sum_up(self, grad: Tensor) -> None:
        if self.passes is None:
            self.passes = SeveralPasses(self.grad, self.logits)
        self.passes.add(grad)

    def _start_anew(self, grad: Tensor) -> None:
        self.grad, self.passes = grad.clone(), None

    def finished(self, loss_dtype: torch.dtype | None = None) -> Rows:
        """Return the rows with the gradient of all backward passes. ``loss_dtype``: of the observed loss.

        Features whose memory was freed or written to since the forward pass are left out.
        """
        rows = self if self.passes is None else replace(self, grad=self.passes.sum(), passes=None)
        gone = self.features_from is not None and self.features_from != memory_of(self.features)
        return replace(rows, features=None, features_from=None) if gone else rows


def memory_of(tensor: Tensor | None = None) -> tuple[int, int] | None:
    """Return the version of a tensor, which each write raises, and the bytes of its storage."""
    return None if tensor is None else (tensor._version, tensor.untyped_storage().nbytes())
