"""Run the monitor's work at each optimizer step: capture, measure, judge, report, choose the next reading.

:class:`nfi_monitor.Monitor` is the public class in front of it.  The loop calls these parts, and none of them
imports the loop: :mod:`~nfi_monitor.engine.step_reader` reads a step, :mod:`~nfi_monitor.engine.loss_queue`
defers losses, :mod:`~nfi_monitor.ranks.membership` shares a reading with other processes, and
:mod:`~nfi_monitor.engine.judge` judges and reports it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor.capture import devices
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.head_probe import HeadProbe, Rows
from nfi_monitor.capture.host_transfer import HostTransfer
from nfi_monitor.capture.optimizer import OptimizerReader
from nfi_monitor.capture.probe_batch import ProbeBatch
from nfi_monitor.capture.reading_plan import ReadingPlan
from nfi_monitor.capture.recomputed import RowRecomputer
from nfi_monitor.capture.step_hooks import has_closure
from nfi_monitor.detect.attention import Attention
from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.detect.spike import QUIET
from nfi_monitor.engine.checks import Options
from nfi_monitor.engine.faults import Faults
from nfi_monitor.engine.head_check import HeadCheck
from nfi_monitor.engine.hooks import Pauses, RunHooks
from nfi_monitor.engine.judge import Judge
from nfi_monitor.engine.loss_queue import TOGETHER, LossQueue
from nfi_monitor.engine.loss_sources import LossSources
from nfi_monitor.engine.notes import NoteTaker
from nfi_monitor.engine.rank_search import RankSearch
from nfi_monitor.engine.row_values import RowValues
from nfi_monitor.engine.run_info import ContextReader, notes_json, run_json
from nfi_monitor.engine.schedule import Schedule, next_read, shared_schedule
from nfi_monitor.engine.silence import Silence
from nfi_monitor.engine.step_reader import StepReader
from nfi_monitor.engine.watch_head import watch_head
from nfi_monitor.measure.accumulator import RowAccumulator
from nfi_monitor.ranks.membership import Membership
from nfi_monitor.replay.recent_snapshots import RecentSnapshots
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report.sinks import Sinks, open_sinks
from nfi_monitor.types import Reading, Thresholds

if TYPE_CHECKING:
    from nfi_monitor.report.summary import Summary


class StepLoop:
    """Handle the hooks of one monitor, and own the parts that they call.

    Args:
        owner: the monitor. Until it is closed, the hooks keep the loop alive, and the loop keeps the monitor.
        optimizer, head: the watched optimizer, without wrappers, and the watched head, or None.
        options: the other arguments of the monitor, checked.
    """

    head_check: HeadCheck | None = None  # once attached
    _counts = False
    """Whether the optimizer step that runs now is one of the run's."""

    def __init__(
        self, owner: Any, model: nn.Module, optimizer: Optimizer, head: Head | None, options: Options
    ) -> None:
        self.owner, self.model, self.optimizer, self.head = owner, model, optimizer, head
        self.every, self.run_dir = options.every, options.run_dir
        self.stateful, self.thresholds = tuple(options.stateful), options.thresholds or Thresholds()
        self.step = 0  # optimizer steps completed
        self.wanted_step: int | None = 1  # the step that is captured now; None between readings
        self.next_read = 1  # the next step to read, unless a loss is unusual before
        self.closed = self.closing = False  # closing: while close() runs
        self.close_callbacks: list[Callable[[], object]] = []
        self.endings: list[Any] = []  # parts of close() that have not run to their end
        self.replays: list[ReplayVerdict] = []
        self._unplanned = False  # whether only an unusual loss is the reason to read the next step
        self.final_info: dict[str, Any] | None = None

        self.faults = Faults(self._report_fault, self._own_fault)
        failed = self.faults.failed
        self.reader = OptimizerReader(optimizer, head, failed)
        self.rows, self.transfer = RowAccumulator(), HostTransfer()
        probe = None if options.probe is None else ProbeBatch(model, *options.probe)
        self.step_reader = StepReader(self.reader, self.rows, probe, self.faults.is_off, failed)
        self.schedule = Schedule(options.overhead_budget)
        self.paused = Pauses(self.schedule.leave_out)
        self.hooks = RunHooks(optimizer, self._before_step, self._after_step, failed)
        capture = (self._captured_step, self._rows_arrived, failed, self.schedule.spend)
        self.probe = HeadProbe(*capture, head, self.step_reader.discard_rows)
        self.recomputer = RowRecomputer(head, self.probe, *capture)
        self.reports = Sinks([], self.faults.dropped, self.faults.missed)
        self.notes = NoteTaker(self.reports.note)
        self.silence = Silence(model, optimizer, head, self.notes.note, failed)
        self.membership = Membership(
            options.group,
            self.every,
            rows=self.rows,
            fill=lambda *message: self.step_reader.fill(self.losses, *message),
            next_read=shared_schedule(self.every),
            follow=self._follow,
            note=self.notes.note,
            failed=failed,
            failed_parts=self.faults.failed_parts,
        )
        self.rank_search = RankSearch(self.membership, self.schedule, self.faults, (model, optimizer, head))
        self.context_reader = ContextReader()
        self.detector = Detector(self.thresholds, self._read_context())
        self.losses = LossQueue(self.detector.is_unusual, self.thresholds)
        self.loss_sources = LossSources(self.losses, failed, self._ignores, self.silence)
        self.recent_snapshots = RecentSnapshots(model, optimizer, self.stateful, options.snapshot_limit)
        self.judge = Judge(
            self.detector,
            self.losses,
            self.transfer,
            self.reports,
            self.notes,
            self.faults,
            on_alert=options.on_alert,
            read_context=self._read_context,
            note_reading=self._note_reading,
            row_values=RowValues(self.probe, self.notes.note, self.notes.by_code, self.losses),
        )

    def attach(self, options: Options) -> None:
        """Find the other ranks, open the sinks, register the hooks. Until then nothing outside is touched."""
        apart = self.rank_search.begin()
        if self.membership.is_reporter:
            opened = open_sinks(options.console, options.run_dir, self.info)
            self.reports.sinks += [*opened, *options.sinks]
        self.membership.share_head(self.head, apart)
        self.reports.start(self.info())
        self.notes.optimizer(self.optimizer)
        if options.head is not False:
            self.notes.attached(self.model, self.head, self.reader)
        self.hooks.step.install()
        self.loss_sources.left_out = lambda: self.judge.forget_losses(self.step)
        self.head_check = watch_head(self, named=options.head is not None)

    @property
    def watched_module(self) -> nn.Module:
        """The head, or the model if there is no head. Only one open monitor may watch it."""
        return self.model if self.head is None else self.head.module

    # --- hooks -----------------------------------------------------------------------------------

    def recorded(self) -> bool:
        """Return whether a CUDA graph is being captured; then note it. Every hook returns at once then."""
        if not devices.capturing():
            return False
        self.notes.cuda_graph(self.step)
        return True

    def _ignores(self) -> bool:
        """Return whether this pass or step is none of the run's, or cannot be read."""
        idle = self.closed or bool(self.paused) or devices.is_traced()
        return idle or (devices.GRAPHS and self.recorded())

    def _captured_step(self) -> int | None:
        """Return the step to capture in the head's forward pass, or None."""
        if self._ignores():
            return None
        self.silence.passed()
        if self.step == 0:
            self.rank_search.again()
        step = self.wanted_step
        return None if step is None or self.faults.is_off("rows") else step

    def _rows_arrived(self, rows: Rows) -> None:
        if self.faults.is_off("rows") or self.closed or self.paused:
            return
        self.silence.arrived()
        self.step_reader.add(rows)

    def _before_step(self, given: Sequence[Any]) -> None:
        self._counts = not self._ignores()
        if not self._counts:
            return
        self.silence.begin_step()
        if self.step == 0 and not has_closure(given):  # in a closure, the model is yet to run
            self.rank_search.end()
        if self.recent_snapshots.pending:
            self._complete_snapshot()
        self.loss_sources.end_step()
        if self.head_check is not None:
            self.head_check.before_step()
        if self.wanted_step is None or self.faults.is_off("optimizer"):
            return
        started = time.perf_counter()
        try:
            alone = self.membership.exchange is None
            self.step_reader.begin(self.wanted_step, given, alone=alone)
        except Exception as error:
            self.faults.failed("optimizer", error)
        self.schedule.own_seconds += time.perf_counter() - started

    def _after_step(self) -> None:
        if not self._counts or self.closed:
            return
        started = time.perf_counter()
        if self.step == 0:
            self.rank_search.end()
        self.step += 1
        self.silence.stepped(self.step, self.hooks.is_on)
        self.detector.update_rates(self.step, self.reader.rates())
        read, unplanned, deferred = self.wanted_step is not None, self._unplanned, False
        try:
            # While a reading is being copied from an accelerator, check at each step whether it has arrived.
            deferred = not (read or self.transfer.waiting) and self.losses.defer(self.step)
            if not deferred:
                if read:
                    self._measure()
                elif self.losses.observed:
                    self._loss_only()
                if self.membership.exchange is None:
                    self.judge.drain()
                else:
                    self.judge.receive(self.membership.receive(self.step))
        except Exception as error:
            self.faults.failed("step", error)
        if deferred:
            if self.step + 1 == self.next_read:
                self.wanted_step = self.next_read
        else:
            if self.judge.released():  # on_alert has closed the monitor inside this step
                return
            self._end_step(read)
        if self.wanted_step is not None:
            self.rows.clear(self.wanted_step)
        now = time.perf_counter()
        self.schedule.own_seconds += now - started
        self.schedule.step_done(read, now, unplanned=unplanned)

    def _end_step(self, read: bool) -> None:
        """Drop this step's tensors, and plan the next readings."""
        try:
            self.losses.forget()
            if read:
                self.step_reader.forget()
                self.faults.next_reading()
            self.probe.forget()
            self._take_snapshot()
        except Exception as error:
            self.faults.failed("step", error)
        try:
            self.look_ahead()
        except Exception as error:
            # This rank does not know the next common step now, and the other ranks would wait for it.
            self.faults.failed("step", error)
            self.membership.drop_out(self.step)

    # --- measure ---------------------------------------------------------------------------------

    def _measure(self) -> None:
        """Read this step: for the exchange with the other ranks, or for this process alone."""
        if self.membership.exchange is not None:
            with torch.no_grad():
                if self.membership.measure(self.step):
                    return
        contents, packed = self.step_reader.read(self.step, self.losses)
        self.judge.judge_deferred()
        self.losses.flush(self.transfer)
        self.transfer.put(contents, packed)

    def _loss_only(self) -> None:
        """Judge the loss of a step that is not read: now on a CPU, later on an accelerator."""
        losses = self.losses
        loss = losses.mean()
        if loss is None:
            return
        if self.membership.exchange is not None:
            self.membership.exchange.keep_loss(self.step, loss)
        elif isinstance(loss, Tensor) and not devices.on_host(loss):
            losses.keep_late(self.step, loss)
        else:
            if self.transfer.waiting:  # an earlier reading is being copied from an accelerator
                self.judge.drain()
            elif losses.deferred:
                self.judge.judge_deferred()
            if self.transfer.waiting:  # the reading has not arrived, and must be judged before this loss
                self.transfer.put([self.step], torch.tensor([float(loss)], dtype=torch.float64, device="cpu"))
            else:
                self.judge.judge(Reading(self.step, {"loss": float(loss)}), full=False)

    def _read_context(self) -> RunContext:
        bits = 16 if "half_precision_loss" in self.notes.by_code else self.step_reader.loss_bits
        return self.context_reader.read(
            self.head,
            self.reader,
            no_classes=bool(self.rows.single_output),
            rank=self.membership.rank,
            loss_bits=bits,
            every_step=self.every == 1,
        )

    def _note_reading(self, reading: Reading) -> None:
        self.rows.learn_reading(reading.values)
        untrained = self.loss_sources.untrained
        self.notes.read(
            reading, self.detector, self.step_reader, self.probe, self.schedule.readings, untrained=untrained
        )
        self.notes.probe_refused(self.step_reader.probe_refused, reading.step)

    # --- plan ------------------------------------------------------------------------------------

    def look_ahead(self) -> None:
        """Choose the next step to read, and the losses that may be deferred, from the readings so far."""
        if self.every == 1:
            self.next_read = self.wanted_step = self.step + 1
            return
        detector = self.detector
        attention = detector.attention
        # Defer losses only in a healthy run of one process, if no sink takes readings.
        may_defer = attention.is_calm and self.membership.exchange is None and not self.reports.listening
        usual_below = detector.spike.usual_below(self.thresholds, TOGETHER + 1) if may_defer else -math.inf
        self.losses.look_ahead(usual_below, detector.spike.baseline.unit)
        tau = detector.context.tau
        schedule = self.schedule
        if isinstance(self.every, str) and schedule.decide(self.step, tau, can_reduce=self.can_reduce):
            self.notes.slowed(schedule, tau, self.step)
        if schedule.reduced_sample is not self.probe.plan.reduced_sample:
            self._set_plan(replace(self.probe.plan, reduced_sample=schedule.reduced_sample))
        self.next_read = self._next_planned(attention)
        self.wanted_step = self.next_read if self.next_read == self.step + 1 else None
        self._unplanned = detector.only_loss_unusual and self._next_planned(Attention.RARELY) != self.step + 1

    def _next_planned(self, attention: Attention) -> int:
        tau = self.detector.context.tau
        return next_read(self.step, self.every, attention, tau, self.schedule.healthy_interval)

    def can_reduce(self) -> bool:
        """Return whether a reduced sample would be smaller, and the run is healthy.

        A change of sample shifts the numbers by up to a percent, and a growth may be smaller than that."""
        calm = self.detector.attention is Attention.RARELY
        return calm and (self.probe.can_reduce or self.reader.can_reduce)

    def _follow(self, agreed: ReadingPlan) -> None:
        """Follow a new plan of the ranks. Drop the last step: later ones cannot be compared with it."""
        self.step_reader.memory = None
        self._set_plan(replace(agreed, reduced_sample=self.probe.plan.reduced_sample))

    def _set_plan(self, plan: ReadingPlan) -> None:
        self.probe.plan = self.reader.plan = plan

    # --- snapshots -------------------------------------------------------------------------------

    def _take_snapshot(self) -> None:
        """Take a snapshot if the run is at risk and one is due; never during a possible slingshot."""
        detector, kept = self.detector, self.recent_snapshots
        if not detector.at_risk or detector.spike.state != QUIET or detector.spike.streak:
            return
        if self.faults.is_off("snapshots") or not kept.due(self.step, detector.context.tau):
            return
        try:
            kept.take(self.step, detector.spike.state_dict(), detector.signals.decay)
        except Exception as error:
            self.faults.failed("snapshots", error)
        if kept.refused and kept.limit != "auto":
            self.notes.note("no_snapshots", f"No snapshots are kept: {kept.refused}.", self.step)

    def _complete_snapshot(self) -> None:
        started = time.perf_counter()
        with self.faults.guarded("snapshots"):
            self.recent_snapshots.complete()
        self.schedule.own_seconds += time.perf_counter() - started

    # --- reports ---------------------------------------------------------------------------------

    def _own_fault(self, part: str) -> None:
        if part in ("ranks", "step"):
            self.membership.failed_at = self.step

    def _report_fault(self, part: str, error: BaseException, off: bool) -> None:
        self.notes.failed(part, error, self.step, off=off)

    def info(self) -> dict[str, Any]:
        """Return the content of ``run.json``."""
        if self.final_info is None:
            return run_json(self)
        return {**self.final_info, "notes": notes_json(self.notes)}

    def summary(self) -> Summary:
        """Return the summary so far. Waits for readings that are still being copied to the host."""
        from nfi_monitor.report.summary import summarize

        self.judge.settle()
        judge, notes = self.judge, list(self.notes.by_code.values())
        return summarize(
            self.info(), judge.history, judge.phases, list(self.detector.alerts), notes, self.replays
        )
