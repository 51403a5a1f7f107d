"""Judge what was measured, in the order of the steps, and report it.

A reading comes here on its way from the step reader to the sinks.  The detector judges it, the history keeps
it, the sinks and ``on_alert`` receive what it changes.
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
from nfi_monitor.history import History
from nfi_monitor.measure.step import SKIPPED, with_non_finite
from nfi_monitor.report.sinks import Sinks
from nfi_monitor.types import Alert, Change, Phase, Reading

if TYPE_CHECKING:
    from nfi_monitor.ranks.reduced import Reduced


class Judge:
    """Feeds the detector.

    Args:
        detector: judges.
        losses: those that wait are judged here.
        transfer: readings of this process that may be on their way from an accelerator.
        reports, on_alert: where readings and alerts go.
        notes: where skipped steps are said.
        faults: an error of the detector's or of ``on_alert``'s goes there.
        read_context: how the optimizer trains the head as things stand.
        note_reading: called after each full reading that was judged.
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
    ) -> None:
        self.detector = detector
        self.recorded = History()
        """What was judged so far, without the losses that wait."""
        self.phases: list[tuple[int, Phase]] = [(0, Phase.HEALTHY)]
        """(step, phase) whenever the phase changes."""
        self._released = False
        self._losses, self._transfer = losses, transfer
        self._reports, self._notes, self._faults = reports, notes, faults
        self._on_alert = on_alert
        self._read_context, self._note_reading = read_context, note_reading

    def release(self) -> None:
        """Judge nothing any more: the monitor was closed and has let go of the model."""
        self._released = True

    def released(self) -> bool:
        """Return whether :meth:`release` was called, perhaps from inside ``on_alert``."""
        return self._released

    @property
    def history(self) -> History:
        """What was measured so far. The losses that wait are judged first."""
        if self._losses.deferred:
            with self._faults.guarded("step"):
                self.judge_deferred()
        return self.recorded

    def settle(self) -> None:
        """Judge all that was measured, and wait for what is still on its way."""
        self.judge_deferred()
        self._losses.flush(self._transfer)
        self.drain(everything=True)

    def judge_deferred(self) -> None:
        """Judge the losses that wait in the queue."""
        for step, loss in self._losses.take_deferred():
            passed = False
            if "detector" not in self._faults.quiet:
                with self._faults.guarded("detector"):
                    passed = self.detector.absorb_ordinary_loss(step, loss)
            if passed:
                self.recorded.append(step, {"loss": loss})
            else:
                self.judge(Reading(step, {"loss": loss}), full=False)

    def drain(self, *, everything: bool = False) -> None:
        """Judge what has arrived on the host: of a rank that is read alone, the others put nothing there."""
        for label, numbers in self._transfer.take(everything=everything):
            if isinstance(label, list):
                for step, loss in zip(label, numbers, strict=True):
                    self.judge(Reading(step, {"loss": loss}), full=False)
                continue
            values = label.unpack(numbers)
            if values.pop(SKIPPED, 0.0) > 0:
                self._notes.skipped_step(label.step)
            else:
                self.judge(Reading(label.step, with_non_finite(values)), full=True)

    def receive(self, readings: Iterable[Reduced]) -> None:
        """Judge what all ranks have measured, once a step and by all of them alike."""
        for reduced in readings:
            for step, loss in reduced.losses:
                self.judge(Reading(step, {"loss": loss}), full=False)
            if reduced.skipped:
                self._notes.skipped_step(reduced.step)
            else:
                self.judge(Reading(reduced.step, with_non_finite(reduced.values)), full=True)

    def judge(self, reading: Reading, *, full: bool) -> None:
        """Judge one reading and report it. ``full``: False for a loss alone, between two readings."""
        if self.released():
            return
        judgement = Judgement(self.detector.phase)
        if "detector" not in self._faults.quiet:
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
        if self._on_alert is not None and "on_alert" not in self._faults.quiet:
            try:
                self._on_alert(alert)
            except Exception as error:
                self._faults.failed("on_alert", error)
