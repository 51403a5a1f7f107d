"""Hold the optimizer step that a replay repeats now, and the objections to a replay.

Active remedies read the step here: in a replay each acts at the same steps as in the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.optim import Optimizer


class _Replay:
    step: int | None = None


REPLAY = _Replay()
"""``step``: the optimizer step that is replayed now; None outside a replay.  It is an attribute and not a
function, because it is read in each training step, outside of any try block."""

Objection = Callable[[Optimizer], "str | None"]
"""Returns the reason why steps of this optimizer cannot be replayed, or None."""

OBJECTIONS: list[Objection] = []
"""Functions that a replay calls before it begins. Remedies add theirs, because this package imports none."""


@contextmanager
def replaying(step: int) -> Iterator[None]:
    """Set the optimizer step that is replayed, inside a block."""
    REPLAY.step = step
    try:
        yield
    finally:
        REPLAY.step = None


def acts(since: int | None) -> bool:
    """Return whether a remedy that began after step ``since`` (None: unknown) acts at the present step."""
    return REPLAY.step is None or since is None or REPLAY.step > since
