"""What adapters of training frameworks and remedies call on a monitor, beside what a user calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from nfi_monitor.engine.loop import StepLoop

MOVED_TO_PORT = {
    "at_close": "at_close",
    "begin_step": "begin_step",
    "end_micro_batch": "end_micro_batch",
    "extras": "stateful",
    "guarded": "guarded",
    "may_act": "may_act",
    "sees_rows": "sees_rows",
}
"""Old attribute of a monitor → its name on ``monitor.port``."""


class AdapterPort:
    """``monitor.port``: for code that attaches a monitor to a framework, or acts on its alerts.

    A training loop of one's own needs nothing of it.  A new adapter calls, in this order:

    - :meth:`at_close` after the monitor is made, for what was registered with the framework along with it;
    - :meth:`begin_step` before each optimizer step, where the framework says when one begins;
    - :meth:`end_micro_batch` after each backward, where losses are read from the model's output
      (``monitor.observe_outputs()``) and the framework says when a micro-batch ends;
    - everything that its callbacks do inside :meth:`guarded`, so that it cannot stop the training;
    - :meth:`may_act` before it changes the training because of an alert.
    """

    def __init__(self, loop: StepLoop) -> None:
        self._loop = loop

    def begin_step(self) -> None:
        """Forget the losses that were observed since the last optimizer step.

        A step that a gradient scaler skipped leaves its loss behind; it is not the next step's.
        """
        self._loop.losses.observed.clear()

    def end_micro_batch(self) -> None:
        """Take the loss of the micro-batch whose backward is over.

        Needed only for gradient accumulation with a compiled model after ``monitor.observe_outputs()``:
        otherwise only the last micro-batch's loss is seen.
        """
        self._loop.end_micro_batch()

    def at_close(self, *endings: Callable[[], object]) -> None:
        """Call these when the monitor is closed, in this order. What one raises is reported once."""
        self._loop.endings += endings

    def guarded(self, part: str) -> AbstractContextManager[None]:
        """Run a block that must not stop the training: an exception in it is reported once, as ``part``'s."""
        return self._loop.faults.guarded(part)

    def may_act(self) -> bool:
        """Return whether an alert may change the training.

        False where several processes run that are not read together: each has alerts of its own, and would
        act at another step. A note then says so, once. ``on_alert`` is called all the same.
        """
        return self._loop.membership.may_act(self._loop.step)

    @property
    def sees_rows(self) -> bool:
        """False where a note said that no gradients reach the logits, and none has arrived since."""
        loop = self._loop
        return loop.probe.delivered > 0 or "head_never_fired" not in loop.notes.said

    @property
    def stateful(self) -> tuple[Any, ...]:
        """The objects beside model and optimizer that belong to a state of the run; none once closed."""
        return () if self._loop.closed else self._loop.stateful
