"""Answer the other ranks once more for a monitor that was closed.

The ranks of a team read the same steps because they judge the same numbers.  A rank that closes its monitor
must still take part in the next exchange: the others wait for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from nfi_monitor.capture import devices
from nfi_monitor.capture.step_hooks import StepHooks
from nfi_monitor.detect.attention import Attention
from nfi_monitor.detect.detector import Detector
from nfi_monitor.measure.step import with_non_finite
from nfi_monitor.ranks.exchange import Exchange
from nfi_monitor.types import Reading

NextRead = Callable[[int, Attention, float], int]
"""``next_read(step, attention, tau)``: the first optimizer step after ``step`` that all ranks read."""


class Departure:
    """Keep a closed monitor's hooks until the other ranks know that it is closed, then remove them.

    The other ranks wait for this one in the exchange of the next step that is read.  On an accelerator, where
    readings arrive late, they also wait at the steps right after it.
    """

    def __init__(
        self, exchange: Exchange, hooks: StepHooks, step: int, detector: Detector, next_read: NextRead
    ) -> None:
        """``hooks``: those of the closed monitor, reused because it may be closed from inside one of them."""
        self._exchange, self._step, self._next_read_after = exchange, step, next_read
        self._detector = copy.deepcopy(detector)  # a copy, so that the closed monitor's alerts do not change
        self._next_read = self._look_ahead()
        self._hooks = hooks
        hooks.serve(lambda given: None, self._after_step, lambda part, error: None)

    def _after_step(self) -> None:
        if devices.capturing():
            return
        self._step += 1
        try:
            if self._step == self._next_read:
                self._exchange.send(self._exchange.empty(self._step, left=True), self._step)
            for reduced in self._exchange.receive(self._step):
                if reduced.left or reduced.out_of_step:
                    self._hooks.remove()
                    return
                for step, loss in reduced.losses:
                    self._detector.update(Reading(step, {"loss": loss}))
                if not reduced.skipped:
                    self._detector.update(Reading(reduced.step, with_non_finite(reduced.values)))
            self._next_read = self._look_ahead()
        except Exception:  # the other ranks are gone, so none waits
            self._hooks.remove()

    def _look_ahead(self) -> int:
        detector = self._detector
        return self._next_read_after(self._step, detector.attention, detector.context.tau)
