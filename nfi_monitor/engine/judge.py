"""Judge the readings in the order of their steps, and report them.

Each reading comes from the step reader.  The detector judges it, the history stores it, and the sinks and
``on_alert`` get the alerts that it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from nfi_monitor.capture.host_transfer import HostTransfer
from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.judgement import Judgement
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.engine.faults import Faults
from nfi_monitor.engine.loss_queue import LossQueue
from nfi_monitor.engine.notes import NoteTaker
from nfi_monitor.engine.row_values import RowValues
from nfi_monitor.history import History
from nfi_monitor.measure.step import SKIPPED, with_non_finite
from nfi_monitor.report.sinks import Sinks
from nfi_monitor.types import Alert, Change, Phase, Reading

if TYPE_CHECKING:
    from nfi_monitor.ranks.reduced import Reduced


class Judge:
    """Pass readings and losses to the detector, and its results to the sinks.

    Args:
        detector: judges each reading.
        losses: the queue whose deferred losses are judged here.
        transfer: readings of this process that are being copied from an accelerator.
        reports, on_alert: get the readings and alerts.
        notes: gets a note for skipped steps.
        faults: gets errors of the detector and of ``on_alert``.
        read_context: returns the present settings of the optimizer for the head.
        note_reading: called after each full reading.
        row_values: leaves out what the rows do not show.
    """

    def __init__(
        self,
        detector: Detector,
        losses: LossQueue,
        transfer: HostTransfer,
        reports: Sinks,
        notes: NoteTaker,
        faults: Faults,
        *,
        on_alert: Callable[[Alert], None] | None,
        read_context: Callable[[], RunContext],
        note_reading: Callable[[Reading], None],
        row_values: RowValues,
    ) -> None:
        self.detector = detector
        self.recorded = History()
        """History of all judged readings, without the deferred losses."""
        self.phases: list[tuple[int, Phase]] = [(0, Phase.HEALTHY)]
        """Changes of the phase, as (step, new phase)."""
        self._released = False
        self._untrained_until = 0  # nobody trains on the losses up to this step
        self._losses, self._transfer = losses, transfer
        self._reports, self._notes, self._faults = reports, notes, faults
        self._on_alert = on_alert
        self._read_context, self._note_reading = read_context, note_reading
        self._row_values = row_values

    def release(self) -> None:
        """Stop judging: the monitor is closed and has released the model."""
        self._released = True

    def released(self) -> bool:
        """Return whether :meth:`release` was called, perhaps from inside ``on_alert``."""
        return self._released

    def forget_losses(self, step: int) -> None:
        """Judge no loss up to ``step``: nobody trains on them. Those that were judged are forgotten."""
        self._untrained_until = step
        with self._faults.guarded("detector"):
            self.detector.forget_losses()

    @property
    def history(self) -> History:
        """History of all readings so far. Deferred losses are judged first."""
        if self._losses.deferred:
            with self._faults.guarded("step"):
                self.judge_deferred()
        return self.recorded

    def settle(self) -> None:
        """Judge all readings and losses; wait for those that are still being copied to the host."""
        self.judge_deferred()
        self._losses.flush(self._transfer)
        self.drain(everything=True)

    def judge_deferred(self) -> None:
        """Judge the deferred losses."""
        ordinary: list[tuple[int, float]] = []
        for step, loss in self._losses.take_deferred():
            if self._absorbs(step, loss):
                self.recorded.append(step, {"loss": loss})
                ordinary.append((step, loss))
            else:
                self._reports.losses(ordinary, self.detector.phase)
                ordinary = []
                self.judge(Reading(step, {"loss": loss}), full=False)
        self._reports.losses(ordinary, self.detector.phase)

    def _absorbs(self, step: int, loss: float) -> bool:
        """Return whether the detector took the loss, because it begins nothing."""
        ordinary = False
        if not self._faults.is_off("detector"):
            with self._faults.guarded("detector"):
                ordinary = self.detector.absorb_ordinary_loss(step, loss)
        return ordinary

    def drain(self, *, everything: bool = False) -> None:
        """Judge the readings of this process alone that have arrived on the host."""
        for label, numbers in self._transfer.take(everything=everything):
            if isinstance(label, list):
                for step, loss in zip(label, numbers.tolist(), strict=True):
                    self.judge(Reading(step, {"loss": loss}), full=False)
                continue
            values = label.unpack(numbers, self._faults.failed)
            if values.pop(SKIPPED, 0.0) > 0:
                self._notes.skipped_step(label.step)
            else:
                self.judge(Reading(label.step, with_non_finite(values)), full=True)

    def receive(self, readings: Iterable[Reduced]) -> None:
        """Judge the joint readings of all ranks. Every rank judges the same numbers."""
        for reduced in readings:
            for step, loss in reduced.losses:
                self.judge(Reading(step, {"loss": loss}), full=False)
            if reduced.only_losses:
                continue
            if reduced.skipped:
                self._notes.skipped_step(reduced.step)
            else:
                self.judge(Reading(reduced.step, with_non_finite(reduced.values)), full=True)

    def judge(self, reading: Reading, *, full: bool) -> None:
        """Judge one reading and report it. ``full``: False for a loss alone, between two readings."""
        if self.released():
            return
        if reading.step <= self._untrained_until and "loss" in reading.values:
            if not full:
                return
            rest = {name: value for name, value in reading.values.items() if name != "loss"}
            reading = Reading(reading.step, rest)
        if full:
            values = self._row_values.known(reading.step, reading.values)
            if values is not reading.values:
                reading = Reading(reading.step, values)
        judgement = Judgement(self.detector.phase)
        if not self._faults.is_off("detector"):
            try:
                if full:
                    self.detector.context = self._read_context()
                judgement = self.detector.update(reading)
            except Exception as error:
                self._faults.failed("detector", error)
        for part, failure in judgement.failed:
            self._faults.failed(part, failure)
        if judgement.derived:
            reading = Reading(reading.step, {**reading.values, **judgement.derived})
        if judgement.phase is not self.phases[-1][1]:
            self.phases.append((reading.step, judgement.phase))
        self.recorded.append(reading.step, reading.values)
        self._reports.reading(reading, judgement.phase)
        for change, alert in judgement.changes:
            self.report(change, alert)
            if self.released():
                return
        if full:
            self._note_reading(reading)

    def report(self, change: Change, alert: Alert) -> None:
        """Give an alert to the sinks and to ``on_alert``, which may close the monitor."""
        self._reports.alert(alert, change)
        if self._on_alert is not None and not self._faults.is_off("on_alert"):
            try:
                self._on_alert(alert)
            except Exception as error:
                self._faults.failed("on_alert", error)
