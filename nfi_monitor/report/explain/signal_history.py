"""Compute the detector's signals again from a run's readings, and choose the steps to search for causes.

The detector judges averages, not single readings.  So this module averages the readings with the detector's
own code (:class:`~nfi_monitor.detect.signals.Signals`).  Rejected: raw readings, because they cross a
threshold many times where the average crosses it once.  The steps of their crossings are not the step at
which the alert began.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from nfi_monitor.detect.rules import LEVELS
from nfi_monitor.detect.signals import Signals
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.history import History
from nfi_monitor.types import Alert, AlertKind, AlertState, Note, Phase, Reading, Thresholds

LEAD_UP = 3.0
"""Shortest time in τ before an alert that is searched for causes: the build-up begins in a healthy phase."""
FINITE = {
    "loss": "the loss",
    "head_loss": "the loss at the head",
    "gradient_norm": "the gradient norm",
    "weight_norm": "the weight norm",
    "non_finite_rows": "rows",
}
"""Quantity that can be NaN or Inf → its name in texts. ``non_finite_rows`` is the number of such rows."""

_EVENT = (Phase.SLINGSHOT, Phase.RECOVERING)


class Series(NamedTuple):
    """A signal's values, and the steps at which they were read."""

    steps: list[int]
    values: list[float]


class SignalHistory:
    """Compute the detector's signals of a whole run, once for any number of alerts.

    ``series``: name of a signal → its values.  ``starts`` and ``ends``: the first step of each slingshot, and
    the first step after it.
    """

    def __init__(
        self,
        history: History,
        phases: Sequence[tuple[int, Phase]],
        limits: Thresholds,
        context: RunContext,
        notes: Sequence[Note],
    ) -> None:
        self.history, self.phases, self.notes = history, phases, notes
        self.limits, self.context = limits, context
        edges = list(pairwise(phases))
        self.ends = [step for (_, was), (step, phase) in edges if was in _EVENT and phase not in _EVENT]
        self.starts = [step for (_, was), (step, phase) in edges if was not in _EVENT and phase in _EVENT]
        self.series: dict[str, Series] = {}
        self.first_step: int | None = None
        self.last_step = 0
        self._replay()

    def _replay(self) -> None:
        """Update the signals with each reading. Reset them at slingshots, as the detector does."""
        readings: dict[int, dict[str, float]] = {}
        for name in self.history.names():
            steps, column = self.history[name]
            for step, value in zip(steps.tolist(), column.tolist(), strict=True):
                readings.setdefault(step, {})[name] = value
        signals, starts, ends = Signals(), set(self.starts), set(self.ends)
        self.first_step, self.last_step = min(readings, default=None), max(readings, default=0)
        for step in sorted(readings):
            values = readings[step]
            if values.keys() <= {"loss"}:
                self._keep("loss", step, values.get("loss", math.nan), finite=False)
                if step in starts:
                    signals.restart()
                if step in ends:
                    signals.calm()
                continue  # the detector does not update its averages where only the loss was read
            reading = Reading(step, values)
            try:
                signals.update(reading, self.context.tau, self.limits)
            except ArithmeticError:  # numbers that no training has: a record that somebody changed
                continue
            if step in ends:
                signals.calm()
            for level in LEVELS:
                if any(name in values for name in level.made_of):
                    self._keep(level.signal, step, level.value(signals, reading, self.context))
            if "update_rms" in values:
                self._keep("update_jump", step, signals.update_jump)
            self._keep("learning_rate", step, values.get("learning_rate", math.nan))
            for name in FINITE:
                if name in values:
                    self._keep(name, step, values[name], finite=False)
            if step in starts:
                signals.restart()

    def _keep(self, key: str, step: int, value: float, *, finite: bool = True) -> None:
        if math.isfinite(value) or not finite:
            series = self.series.setdefault(key, Series([], []))
            series.steps.append(step)
            series.values.append(value)

    def window(self, alert: Alert) -> tuple[int, int, int, str]:
        """Return the steps to search for causes: (earliest, first, last, why the search begins there).

        A crossing is traced back to ``earliest`` at most.
        """
        last_end = max((step for step in self.ends if step <= alert.first_step), default=None)
        begin = self.first_step if self.first_step is not None else alert.first_step
        earliest = begin if last_end is None else max(last_end, begin)
        healthy = None
        for (step, phase), following in zip(self.phases, [*self.phases[1:], None], strict=True):
            if phase is Phase.HEALTHY and step < alert.first_step:
                until = alert.first_step if following is None else min(following[0], alert.first_step)
                healthy = max(until - 1, 1)
        lead_up = alert.first_step - math.ceil(LEAD_UP * self.context.tau)
        first, why = lead_up, f"from {LEAD_UP:g} τ (τ = {self.context.tau:.4g} steps) before the alert began"
        if healthy is None or healthy < lead_up:
            first, why = healthy or earliest, "since the run was last healthy"
        if first <= earliest:
            ended = last_end is not None and last_end >= begin
            first, why = earliest, "since the last slingshot ended" if ended else "since the readings began"
        last = alert.last_step
        if alert.kind in (AlertKind.SLINGSHOT, AlertKind.NON_FINITE):
            last = alert.first_step - 1  # readings of the event itself show its effect, not its cause
        else:
            if alert.state is AlertState.FIRING:
                # If the process was killed, the alert's last step in the files is older than the readings.
                last = max(last, self.last_step)
            last = min([last, *(step - 1 for step in self.starts if step > alert.first_step)])
        last = max(last, min(first, alert.first_step))
        return earliest, min(first, last), last, why
