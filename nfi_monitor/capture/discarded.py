"""Find out whether the gradients of earlier backward passes were discarded before they reached a step.

``optimizer.zero_grad()`` between two backward passes discards the first one's gradients: the actor's loss
that runs through the critic, the first pass of SAM, a trial pass.  Rows of such a pass do not count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Discards:
    """Call ``discarded`` when the gradients of earlier backward passes of a step are gone."""

    def __init__(self, discarded: Callable[[], object]) -> None:
        self._discarded = discarded
        self._last: int | None = None  # number of the last backward pass of this step

    def arrived(self, weight: Tensor | None) -> None:
        """Look at the ``weight`` of the head, whose gradient this backward pass is about to accumulate."""
        before, self._last = self._last, graph_task()
        if before not in (None, self._last) and is_discarded(weight):
            self._discarded()

    def end_step(self) -> None:
        """Begin another optimizer step."""
        self._last = None


def graph_task() -> int:
    """Return the number of the running backward pass; -1 outside of one, or if torch does not say."""
    current = getattr(torch._C, "_current_graph_task_id", None)
    return -1 if current is None else int(current())


def is_discarded(weight: Tensor | None) -> bool:
    """Return whether the gradient of ``weight``, which an earlier backward pass accumulated, is gone.

    Call it in a tensor hook of another backward pass.  False where a gradient may be kept elsewhere between
    micro-batches: in several processes (ZeRO, FSDP), and in ``main_grad``.
    """
    if type(weight) is not nn.Parameter or not weight.requires_grad or weight.grad is not None:
        return False
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not (several or hasattr(weight, "main_grad"))
