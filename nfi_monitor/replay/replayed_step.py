"""Which optimizer step a replay repeats at the moment, and what stands in the way of a replay.

Remedies that are switched on ask here: in a replay each acts at the steps at which it acted in the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.optim import Optimizer


class _Replay:
    step: int | None = None


REPLAY = _Replay()
"""``step``: the optimizer step that is being replayed; None in the run itself. An attribute and not a
function: it is read in each training step, outside of any try block."""

Objection = Callable[[Optimizer], "str | None"]
"""Returns why steps of this optimizer cannot be replayed; None where they can be."""

OBJECTIONS: list[Objection] = []
"""Asked before a replay begins. Remedies add theirs: this package does not know them."""


@contextmanager
def replaying(step: int) -> Iterator[None]:
    """Mark optimizer step ``step`` as the one that is being replayed, while this is open."""
    REPLAY.step = step
    try:
        yield
    finally:
        REPLAY.step = None


def acts(since: int | None) -> bool:
    """Return whether a remedy that was switched on after step ``since`` (None: not known) acts now."""
    return REPLAY.step is None or since is None or REPLAY.step > since
