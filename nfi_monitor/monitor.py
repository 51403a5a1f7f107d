"""The one stateful public class: attaches, makes one pass per optimizer step, detaches.

capture → measure → detect → report: only this file knows all four.  What a process reads of a step is in
:mod:`~nfi_monitor.engine.step_reader`, which losses can wait in :mod:`~nfi_monitor.engine.loss_queue`, and whether other processes
read along in :mod:`~nfi_monitor.ranks.membership`; none of them knows the monitor.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor._version import __version__
from nfi_monitor.capture import devices
from nfi_monitor.capture.head import Head, find_head
from nfi_monitor.capture.head_probe import HeadProbe, Rows
from nfi_monitor.capture.host_transfer import HostTransfer
from nfi_monitor.capture.loss import LossProbe
from nfi_monitor.capture.optimizer import OptimizerReader
from nfi_monitor.capture.probe_batch import ProbeBatch
from nfi_monitor.capture.sampling import auto_interval, local
from nfi_monitor.capture.step_hooks import StepHooks
from nfi_monitor.capture.unwrap import choose
from nfi_monitor.detect.detector import Attention, Detector
from nfi_monitor.detect.judgement import Judgement
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.detect.spike import QUIET
from nfi_monitor.engine.loss_queue import TOGETHER, LossQueue
from nfi_monitor.engine.notes import NoteTaker
from nfi_monitor.engine.run_info import describe_run, read_context
from nfi_monitor.engine.schedule import Schedule, next_read
from nfi_monitor.engine.step_reader import StepReader
from nfi_monitor.errors import AlreadyMonitoredError, MonitorError
from nfi_monitor.history import History
from nfi_monitor.measure.accumulator import RowAccumulator
from nfi_monitor.measure.step import SKIPPED, with_non_finite
from nfi_monitor.measure.zero_sum import accumulation_dtype
from nfi_monitor.ranks import processes
from nfi_monitor.ranks.membership import Membership
from nfi_monitor.replay.recent_snapshots import RecentSnapshots
from nfi_monitor.replay.snapshots import Snapshot, check_extra
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report.sink import Sink
from nfi_monitor.report.sinks import Sinks, open_sinks
from nfi_monitor.types import Alert, AlertState, Change, Note, Phase, Reading, Thresholds

if TYPE_CHECKING:
    from rich.console import Console

    from nfi_monitor.replay.arm import Arm
    from nfi_monitor.report.explain.explanation import Explanation
    from nfi_monitor.report.summary import Summary

_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_OPEN: weakref.WeakSet[Monitor] = weakref.WeakSet()


class Monitor:
    """Watch a training run for slingshots. Attaches at once; detaches on ``close()`` or when ``with`` ends.

    Args:
        model: the module being trained (wrapped by DDP or torch.compile or not).
        optimizer: the optimizer whose ``step()`` updates it; wrappers are looked through. Of several, given
            as a list, the one that trains the head.
        head: the classifier head, as a module or by its qualified name; None finds it; False says that
            no module is the head and rows come from :meth:`tap` alone.
        run_dir: directory for ``run.json``, ``readings.jsonl``, ``alerts.jsonl`` and, where tensorboard is
            installed, event files. None writes nothing.
        console: True prints a line when something begins or ends, False or None nothing; or a ``Console``.
        on_alert: called with the :class:`Alert` whenever one begins, changes or ends. Where it has a method
            ``attach_monitor(monitor)``, that is called once before (:class:`nfi_monitor.remedies.Autopilot`).
        probe: a fixed batch ``(inputs, targets)`` whose margins are compared between readings: sees
            displacement that the head alone does not show (a head fed by LayerNorm). One extra forward
            pass per reading. ``inputs`` is a tensor, a tuple of arguments or a dict of keywords;
            ``targets`` int64, of the logits' shape without the class axis.
        thresholds: the constants of detection.
        every: "auto" reads sparsely while nothing is going on and every step once something is; an
            int reads the first optimizer step and those it divides.
        overhead_budget: share of the training's own time that healthy steps may cost. Where τ leaves room,
            ``every="auto"`` reads a small model less often for it, up to every τ/10 steps, and where that is
            not enough, from then on a quarter of the rows and coordinates (each said once); what is at risk
            is read as often as ever. None: what is read depends on τ alone, never on the clock.
        snapshots: while *at risk*, keep the last four states of the run in host memory, one every 2 τ, for
            :meth:`replay`. "auto" does so on a CPU while one takes at most 16 MiB; an int is the bytes all
            may take together, on any device; False keeps none.
        extras: what else belongs to a state: schedulers, gradient scalers, samplers, weight averages (with
            ``state_dict``/``load_state_dict``) and ``torch.Generator`` objects.
        sinks: further places that readings and alerts go to, on rank 0
            (:class:`nfi_monitor.report.sink.Sink`).
        group: the processes that train this model together, whose rows and shards make one reading. None
            finds them (DDP, FSDP, tensor parallel meshes); a ``ProcessGroup`` or a ``DeviceMesh`` names them;
            False reads and reports this process alone. Attach on every one of them: they agree on phase,
            cadence and alerts, ``on_alert`` is called on each, and the first of them reports. Read apart,
            adapters and the Autopilot act on no alert (:meth:`may_act`).

    Raises:
        HeadNotFoundError: no module, or more than one, could be the head; lists the candidates.
        AlreadyMonitoredError: another open monitor watches the same head.
        TypeError, ValueError: arguments of the wrong kind.

    Training is never changed: every hook returns None, tensors are detached before they are read, no
    random number is drawn.  Training is never stopped: what fails inside is reported once and goes quiet.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        head: nn.Module | str | bool | None = None,
        run_dir: str | PathLike[str] | None = None,
        console: bool | Console | None = True,
        on_alert: Callable[[Alert], None] | None = None,
        probe: tuple[Any, Tensor] | None = None,
        thresholds: Thresholds | None = None,
        every: int | str = "auto",
        overhead_budget: float | None = 0.01,
        snapshots: int | str | bool = "auto",
        extras: Sequence[Any] = (),
        sinks: Sequence[Sink] = (),
        group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Monitor needs a torch.nn.Module, got {type(model).__name__}.")
        if not (every == "auto" or (isinstance(every, int) and not isinstance(every, bool) and every >= 1)):
            raise ValueError(f'every={every!r}: use "auto" or a number of optimizer steps ≥ 1.')
        if overhead_budget is not None and not (
            isinstance(overhead_budget, (int, float)) and 0 < overhead_budget < math.inf
        ):
            raise ValueError(f"overhead_budget={overhead_budget!r}: use a share such as 0.01, or None.")
        if head is True:
            raise ValueError("head=True means nothing: name the module, or leave it out to have it found.")
        if thresholds is not None and not isinstance(thresholds, Thresholds):
            raise TypeError(f"thresholds must be a Thresholds(...), got {type(thresholds).__name__}.")
        if probe is not None and not (isinstance(probe, (tuple, list)) and len(probe) == 2):
            raise ValueError("probe must be a pair (inputs, targets).")
        if on_alert is not None and not callable(on_alert):
            raise TypeError(f"on_alert must be callable, got {type(on_alert).__name__}.")
        if isinstance(snapshots, bool) and not snapshots:
            snapshots = 0
        if not (snapshots == "auto" or (type(snapshots) is int and snapshots >= 0)):
            raise ValueError(f'snapshots={snapshots!r}: use "auto", False, or bytes that they may take.')
        if not isinstance(extras, Sequence):
            raise TypeError(f"extras must be a list, got {type(extras).__name__}: extras=[it].")
        for extra in extras:
            check_extra(extra)
        processes.check_group(group)
        self._head: Head | None = None if head is False else find_head(model, head)
        self._optimizer = choose(optimizer, self._head)
        self._key = self._head.module if self._head is not None else model
        if self._key in _WATCHED:
            where = self._head.describe() if self._head is not None else type(model).__name__
            raise AlreadyMonitoredError(
                f"{where} is already watched by an open monitor. Close it first (monitor.close(), or leave "
                "its with block); one monitor sees everything two would."
            )

        self._every = every
        self._model = model
        self._extras = tuple(extras)
        self._thresholds = thresholds or Thresholds()
        self._on_alert = on_alert
        self.run_dir = run_dir
        self._step = 0  # optimizer steps completed
        self._wanted_step: int | None = 1  # the step that is being captured, None between readings
        self._next_read = 1  # the next step to be read, as things stand
        self._stirred = False  # whether an unusual loss alone has the next step read
        self._quiet: set[str] = set()  # parts that failed and went quiet
        self._closed = False
        self._endings: list[Callable[[], object]] = []
        self._paused = 0
        self._final_info: dict[str, Any] | None = None

        self._reader = OptimizerReader(self._optimizer, self._head)
        self._rows = RowAccumulator()
        probe_batch = None if probe is None else ProbeBatch(model, *probe)
        self._meter = StepReader(self._reader, self._rows, probe_batch, self._quiet, self._failed)
        self._clock = Schedule(overhead_budget)
        self._probe = HeadProbe(self._captured_step, self._rows_arrived, self._failed, self._clock.spend)
        self._loss_probe: LossProbe | None = None
        self._reports = Sinks([], self._failed)
        self._notes = NoteTaker(self._reports.note)
        self._ranks = Membership(
            group, every, clock=self._clock, meter=self._meter, probe=self._probe, notes=self._notes
        )
        self._detector = Detector(self._thresholds, self._read_context())
        self._losses = LossQueue(self._detector.is_unusual, self._thresholds)
        self._outbox = HostTransfer()
        self._ring = RecentSnapshots(model, self._optimizer, self._extras, snapshots)
        self.replays: list[ReplayVerdict] = []
        """What replays of this run's slingshots have shown, oldest first."""
        self._history = History()
        self.phases: list[tuple[int, Phase]] = [(0, Phase.HEALTHY)]
        """(step, phase) whenever the phase changes."""

        apart = self._ranks.find(model, self._optimizer, self._head)
        if self._ranks.speaks:
            self._reports.sinks += [*open_sinks(console, run_dir, self._info), *sinks]
        self._ranks.share_head(self._head, apart)
        self._reports.start(self._info())
        self._notes.attached(self._head, self._reader)
        self._handles: list[Any] = [
            StepHooks(self._optimizer, self._before_step, self._after_step, self._failed)
        ]
        if self._head is not None:
            self._handles.append(self._head.module.register_forward_hook(self._probe, with_kwargs=True))
        _WATCHED.add(self._key)
        _OPEN.add(self)
        attach = getattr(on_alert, "attach_monitor", None)
        if attach is not None:
            try:
                attach(self)
            except BaseException:
                self.close()
                raise

    # --- the user's side -------------------------------------------------------------------------

    @torch.compiler.disable  # inside a compiled function one graph break; nothing in here is traced
    def observe_loss(self, loss: Tensor | float) -> None:
        """Tell the monitor the loss of this micro-batch; call it before ``optimizer.step()``.

        Never synchronises: a tensor is kept as it is and read with the step's other numbers.
        """
        if self._closed or self._paused:
            return
        try:
            if devices.GRAPHS and self._recorded():
                return
            self._losses.told.append(local(loss.detach()) if isinstance(loss, Tensor) else float(loss))
        except Exception as error:
            self._failed("observe_loss", error)

    def observe_outputs(self, scale: float = 1.0) -> None:
        """Read the loss from what the model returns (``output.loss``, ``output[0]``): no call per step.

        Where the model is told ``num_items_in_batch``, its losses are shares of the step's and are added up,
        times ``scale`` (the number of processes, if that counts the items of all of them).
        """
        if self._closed or self._loss_probe is not None:
            return

        def deliver(loss: Tensor, share: bool) -> None:
            self._losses.share = scale if share else None
            self.observe_loss(loss)

        self._loss_probe = LossProbe(deliver, self._failed)
        self._handles.append(self._model.register_forward_hook(self._loss_probe, with_kwargs=True))

    def begin_step(self) -> None:
        """For frameworks that say when an optimizer step begins: what a step that its gradient scaler skipped
        has left of its loss is forgotten."""
        self._losses.told.clear()

    def end_micro_batch(self) -> None:
        """Only for gradient accumulation with a compiled model after :meth:`observe_outputs`: call it after
        each backward, or only the last micro-batch's loss is seen."""
        if self._loss_probe is not None and not self._closed:
            try:
                self._loss_probe.collect()
            except Exception as error:
                self._failed("loss", error)

    @torch.compiler.disable
    def tap(self, logits: Tensor) -> Tensor:
        """Watch exactly this tensor [..., K] instead of the head's output; returns it unchanged.

        For logits that are no module's output, or are cast, scaled or capped between head and loss. Called
        outside of what is compiled it costs no graph break, inside one.
        """
        if not self._closed and not self._paused:
            try:
                if not (devices.GRAPHS and self._recorded()):
                    self._probe.tap(logits)
            except Exception as error:
                self._failed("rows", error)
        return logits

    @property
    def history(self) -> History:
        """Everything measured so far: ``history["zero_sum_violation"]`` → (steps, values). Asking for it
        judges the losses that waited. Assign a longer one (``History(max_rows=...)``) to thin less."""
        if self._losses.waiting:
            with self.guarded("step"):
                self._judge_waiting()
        return self._history

    @history.setter
    def history(self, history: History) -> None:
        self._history = history

    @property
    def alerts(self) -> list[Alert]:
        """All alerts, oldest first; a firing one is replaced by its newer state as it develops."""
        return list(self._detector.alerts)

    @property
    def phase(self) -> Phase:
        return self._detector.phase

    @property
    def notes(self) -> list[Note]:
        """What was said once: what could not be seen."""
        return list(self._notes.said.values())

    @property
    def step(self) -> int:
        """Optimizer steps seen so far."""
        return self._step

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that is watched, without wrappers. Raises MonitorError once closed."""
        if self._closed:
            raise MonitorError("A closed monitor has let go of the optimizer.")
        return self._optimizer

    @property
    def head(self) -> Head | None:
        """The classifier head that is watched; None where there is none, and once closed."""
        return None if self._closed else self._head

    @property
    def sees_rows(self) -> bool:
        """False where a note has said that no gradients come to the logits, and none has come since."""
        return self._probe.delivered > 0 or "head_never_fired" not in self._notes.said

    @property
    def tau(self) -> float:
        """τ = 1/(1−β2) in optimizer steps."""
        return self._detector.context.tau

    @property
    def extras(self) -> tuple[Any, ...]:
        """What else belongs to a state of the run; nothing once closed."""
        return () if self._closed else self._extras

    def may_act(self) -> bool:
        """Whether an alert may change the training: not where several processes run that are not read
        together, since each has alerts of its own. Says so once. ``on_alert`` is called all the same."""
        return self._ranks.may_act(self._step)

    def note(self, code: str, message: str) -> None:
        """Say something of your own where the monitor's notes go; once for each ``code``."""
        self._notes.note(code, message, self._step)

    def take_snapshot(self) -> Snapshot:
        """The run as it is after the last step, ``extras`` included. Raises MonitorError once closed."""
        if self._closed:
            raise MonitorError(
                "A closed monitor has let go of the model. Use Snapshot.take(step, model, ...)."
            )
        detector = self._detector
        return Snapshot.take(
            self._step,
            self._model,
            self._optimizer,
            self._extras,
            detector.spike.state_dict(),
            second_moment_decay=detector.signals.decay,
        )

    @contextmanager
    def guarded(self, part: str) -> Iterator[None]:
        """What runs in here must not stop a training: an exception is reported once, under this name."""
        try:
            yield
        except Exception as error:
            self._failed(part, error)

    def summary(self) -> Summary:
        """Everything so far as one object: rich prints it, ``json.dumps`` writes it."""
        from nfi_monitor.report.summary import summarize

        self._settle()
        return summarize(self._info(), self.history, self.phases, self.alerts, self.notes, self.replays)

    def explain(self, alert: Alert | str) -> Explanation:
        """An alert, or the one of this id, in plain words: what crossed what and when, and what was not seen.

        From the readings in ``history``; also after ``close()`` and in ``on_alert``. Raises ValueError,
        naming the known ids, for an alert that is not this monitor's.
        """
        from nfi_monitor.report.explain.compose import explain, find_alert

        # Nothing is drained here: on_alert is called from there, and an alert's readings are on record.
        found = find_alert(self._detector.alerts, alert)
        context = self._detector.context
        return explain(found, self.history, self.phases, self._thresholds, context, self.notes)

    @property
    def snapshots(self) -> list[Snapshot]:
        """States of the run while it was at risk, oldest first; kept after ``close()``, too."""
        return self._ring.snapshots

    def replay(
        self,
        step_fn: Callable[[int], Any],
        arms: Sequence[Arm] | None = None,
        steps: int | None = None,
        snapshot: Snapshot | None = None,
    ) -> ReplayVerdict:
        """Find the last slingshot's cause: go on from before it under each arm (:mod:`nfi_monitor.replay.run`).

        ``step_fn(step)`` does optimizer step number ``step`` as the run did, its data included, and returns
        the loss.  ``snapshot``: default the newest that is 2 τ before the slingshot, or else the oldest.
        ``steps``: default until max(2 τ, 20) steps after the slingshot.  The verdict is written to
        ``replays.jsonl`` and stands in the report; the run itself is not changed and may go on.

        Raises MonitorError, saying what is needed, without a snapshot or a usable ``step_fn``.
        """
        from nfi_monitor.replay.planning import plan
        from nfi_monitor.replay.run import RECIPE, STEP_FN, replay

        if not callable(step_fn):
            raise MonitorError(f"replay needs a function, got {type(step_fn).__name__}. {STEP_FN} {RECIPE}")
        if self._closed:
            raise MonitorError(
                "A closed monitor has let go of the model. Call monitor.replay before close(), inside the "
                "with block, or nfi_monitor.replay.run.replay(snapshot, step_fn, model=..., optimizer=...) with "
                f"one of monitor.snapshots. {RECIPE}"
            )
        self._settle()
        context = self._detector.context
        start = plan(self.alerts, self._ring, context.tau, snapshot, steps)
        taken = start.snapshot
        if taken.second_moment_decay == 0.0:  # of the user's own taking: the history knows
            read_at, decays = self.history["second_moment_decay"]
            known = decays[read_at <= taken.step]
            if len(known):
                taken = replace(taken, second_moment_decay=float(known[-1]))
        recorded = {int(step): float(loss) for step, loss in zip(*self.history["loss"], strict=True)}
        verdict = replay(
            taken,
            step_fn,
            arms,
            start.steps,
            model=self._model,
            optimizer=self._optimizer,
            head=self._head.module if self._head is not None else False,
            extras=self._extras,
            beta2=context.beta2,
            recorded=recorded,
            thresholds=self._thresholds,
        )
        verdict = replace(verdict, slingshot=None if start.slingshot is None else start.slingshot.id)
        self.replays.append(verdict)
        self._reports.replay(verdict)
        return verdict

    def weight_norms(self) -> dict[str, float]:
        """Euclidean norm of every parameter by its name, now. Reads all weights: on request, not per step."""
        if self._closed:
            raise MonitorError("weight_norms() reads the model, and a closed monitor has let go of it.")
        named = [(name, local(parameter.detach())) for name, parameter in self._model.named_parameters()]
        norms = [torch.linalg.vector_norm(value, dtype=accumulation_dtype(value.dtype)) for _, value in named]
        return {name: float(norm) for (name, _), norm in zip(named, norms, strict=True)}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While this is open, forwards, steps and losses are not the run's: nothing is seen, counted or said.

        For whatever trains the model on the side and puts it back afterwards, such as a replay.
        """
        started = time.perf_counter()
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            if not self._paused:
                self._clock.leave_out(time.perf_counter() - started)

    def at_close(self, *endings: Callable[[], object]) -> None:
        """Call these when the monitor is closed: for what was attached along with it."""
        self._endings += endings

    def close(self) -> None:
        """Detach all hooks and finish the reports. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        with self.guarded("close"):
            if self._ranks.leave(self._handles[0], self._step, self._detector):
                del self._handles[0]
        for handle in self._handles:
            with self.guarded("close"):
                handle.remove()
        self._handles.clear()
        for ending in self._endings:
            with self.guarded("close"):
                ending()
        self._endings.clear()
        _WATCHED.discard(self._key)
        _OPEN.discard(self)
        with self.guarded("close"):
            self._settle()
            self._ring.close()
        with self.guarded("close"):
            self._clock.finish()
        with self.guarded("close"):
            self._meter.let_go()
        with self.guarded("close"):  # never in the way of an exception of the user's own
            self._rows.clear(self._step + 1)
            self._probe.forget()
            self._final_info = self._info()
            if self._reports.sinks:
                for alert in self.alerts:
                    if alert.state is AlertState.FIRING:  # how far it got: files hold only what was told
                        self._reports.alert(alert, Change.UPDATE)
                self._reports.close(self._info(), self.summary())
        # The monitor may outlive the run for its history; the model and the optimizer must not for its sake.
        del self._model, self._optimizer, self._reader, self._head, self._key, self._extras

    def _abandon(self) -> None:
        """In a forked child: detach, and say nothing anywhere. Files, ranks and the run are the parent's."""
        self._closed = True
        for handle in self._handles:
            with suppress(Exception):
                handle.remove()
        self._handles.clear()
        self._reports.sinks.clear()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Detector, alerts and clock, in plain types, for the run's checkpoint. Readings are not in it, but
        what the next one is compared with is: a resumed run reads what the uninterrupted one would have."""
        # Losses that wait to be judged are a part of the state: judged here, a resumed run would differ.
        self._losses.flush(self._outbox)
        self._drain(everything=True)
        return {
            "version": __version__,
            "step": self._step,
            "detector": self._detector.state_dict(),
            "interval": self._clock.healthy,
            "lowered": self._clock.lowered,
            "phases": [[step, phase.value] for step, phase in self.phases],
            **self._meter.state_dict(self._step),
            "plain_losses": [[step, loss] for step, loss in self._losses.waiting],
            "notes": [[note.code, note.message, note.step] for note in self.notes],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off. Raises ValueError for a state of another kind."""
        if "detector" not in state or "step" not in state:
            raise ValueError(
                "Not a monitor's state: expected keys 'step' and 'detector', found "
                f"{sorted(map(str, state))[:8]}. Pass what monitor.state_dict() returned."
            )
        step = int(state["step"])
        waiting = [(int(waited), float(loss)) for waited, loss in state.get("plain_losses", [])]
        if step < self._step:
            # Losses that waited are judged once more.
            self._forget_after(min([step, *(waited - 1 for waited, _ in waiting)]))
        self._step = step
        self._detector.load_state_dict(state["detector"])
        self._ring.clear()
        if self._clock.budget is not None:
            self._clock.healthy = state.get("interval")
            self._clock.lowered = isinstance(self._every, str) and bool(state.get("lowered"))
        self.phases[:] = [(int(step), Phase(phase)) for step, phase in state["phases"]]
        weight = self._head.weight if self._head is not None else None
        device = weight.device if weight is not None else next(self._model.parameters()).device
        self._meter.load_state_dict(state, device)
        self._losses.waiting = waiting
        if self._ranks.pool is not None:  # none waits there, and all ranks have to know the same
            self._judge_waiting()
        self._rows.clear(self._step + 1)
        self._look_ahead()
        for code, message, step in state["notes"]:
            self._notes.said.setdefault(code, Note(code, message, int(step)))

    def _forget_after(self, last: int) -> None:
        """The run goes back: what was seen after step ``last`` will not have been."""
        self._losses.flush(self._outbox)
        self._outbox.take(everything=True)
        self._history.cut(last)
        self.replays[:] = [verdict for verdict in self.replays if verdict.snapshot_step <= last]
        self._reports.went_back()

    # --- hooks -----------------------------------------------------------------------------------

    def _recorded(self) -> bool:
        """Whether what goes on is only recorded, into a CUDA graph: then every hook leaves at once."""
        if not devices.capturing():
            return False
        self._notes.cuda_graph(self._step)
        return True

    def _captured_step(self) -> int | None:
        """For the head's forward. In the first it may turn out that DDP wraps the model after all."""
        if self._paused or (devices.GRAPHS and self._recorded()):
            return None
        if self._step == 0 and self._ranks.looking and self._ranks.pool is None and not self._closed:
            apart = self._ranks.find(self._model, self._optimizer, self._head)
            self._ranks.share_head(self._head, apart)
        return self._wanted_step

    def _rows_arrived(self, rows: Rows) -> None:
        if "rows" in self._quiet or self._closed or self._paused:
            return
        self._meter.add(rows)

    def _before_step(self, given: Sequence[Any]) -> None:
        if self._paused or (devices.GRAPHS and self._recorded()):
            return
        if self._ring.pending:
            self._complete_snapshot()
        if self._loss_probe is not None:
            self.end_micro_batch()
        if self._wanted_step is None or "optimizer" in self._quiet:
            return
        started = time.perf_counter()
        try:
            self._meter.begin(self._wanted_step, given)
        except Exception as error:
            self._failed("optimizer", error)
        self._clock.own += time.perf_counter() - started

    def _after_step(self) -> None:
        if self._paused or (devices.GRAPHS and self._recorded()):
            return
        started = time.perf_counter()
        self._step += 1
        read, stirred = self._wanted_step is not None, self._stirred
        aside = False
        try:
            # While a reading is on its way from an accelerator, each step asks for it.
            aside = not (read or self._outbox.waiting) and self._losses.defer(self._step)
            if not aside:
                if read:
                    with torch.no_grad():
                        self._measure()
                elif self._losses.told:
                    self._loss_only()
                if self._ranks.pool is None:
                    self._drain()
                else:
                    self._receive()
        except Exception as error:
            self._failed("step", error)
        if aside:
            if self._step + 1 == self._next_read:
                self._wanted_step = self._next_read
        else:
            if self._let_go():
                return
            try:
                self._losses.forget()
                if read:
                    self._meter.forget()
                self._probe.forget()
                self._take_snapshot()
            except Exception as error:
                self._failed("step", error)
            try:
                self._look_ahead()
            except Exception as error:
                # The other ranks count on this one at a step that it cannot tell.
                self._failed("step", error)
                self._ranks.drop_out(self._step)
        if self._wanted_step is not None:
            self._rows.clear(self._wanted_step)
        now = time.perf_counter()
        self._clock.own += now - started
        self._clock.step_done(read, now, stirred=stirred)

    def _look_ahead(self) -> None:
        """What the readings so far say of the next steps: how closely to look, and which loss is usual."""
        detector = self._detector
        attention = detector.attention
        # Losses wait only while nothing is going on, and nobody for each reading.
        patient = attention is Attention.RARELY and self._ranks.pool is None and not self._reports.listening
        usual_below = detector.spike.usual_below(self._thresholds, TOGETHER + 1) if patient else -math.inf
        self._losses.look_ahead(usual_below)
        tau = detector.context.tau
        if isinstance(self._every, str) and self._clock.decide(self._step, tau, can_lower=self._can_lower):
            self._notes.slowed(self._clock, tau, self._step)
        self._probe.lowered = self._meter.reader.lowered = self._clock.lowered
        self._next_read = self._next_planned(attention)
        self._wanted_step = self._next_read if self._next_read == self._step + 1 else None
        self._stirred = detector.only_loss_unusual and self._next_planned(Attention.RARELY) != self._step + 1

    def _next_planned(self, attention: Attention) -> int:
        tau = self._detector.context.tau
        return next_read(self._step, self._every, attention, tau, self._clock.healthy)

    def _can_lower(self) -> bool:
        """Whether there is more to read than a lowered reading holds, and nothing goes on meanwhile: two
        samples do not agree to the last per cent, and growth is told from less."""
        calm = self._detector.attention is Attention.RARELY
        return calm and (self._probe.can_lower or self._meter.reader.can_lower)

    def _take_snapshot(self) -> None:
        """At risk, now and then; from a slingshot's first unusual loss until its end, never."""
        detector = self._detector
        if not detector.at_risk or detector.spike.state != QUIET or detector.spike.streak:
            return
        if "snapshots" in self._quiet or not self._ring.due(self._step, detector.context.tau):
            return
        try:
            self._ring.take(self._step, detector.spike.state_dict(), detector.signals.decay)
        except Exception as error:
            self._failed("snapshots", error)
        if self._ring.refused and self._ring.limit != "auto":
            self._notes.note("no_snapshots", f"No snapshots are kept: {self._ring.refused}.", self._step)

    def _complete_snapshot(self) -> None:
        started = time.perf_counter()
        with self.guarded("snapshots"):
            self._ring.complete()
        self._clock.own += time.perf_counter() - started

    # --- measure ---------------------------------------------------------------------------------

    def _measure(self) -> None:
        """Read this step: as a part of what all ranks see, or all that this process sees."""
        if self._ranks.measure(self._step, self._losses):
            return
        contents, packed = self._meter.read(self._step, self._losses)
        self._judge_waiting()
        self._losses.flush(self._outbox)
        self._outbox.put(contents, packed)

    def _loss_only(self) -> None:
        """Between readings the loss alone: at once on a CPU, a batch of late ones on an accelerator."""
        losses = self._losses
        loss = losses.mean()
        if loss is None:
            return
        if self._ranks.pool is not None:
            self._ranks.pool.keep_loss(self._step, loss)
        elif isinstance(loss, Tensor) and not devices.on_host(loss):
            losses.keep_late(self._step, loss)
        else:
            if self._outbox.waiting:  # an earlier reading, from an accelerator
                self._drain()
            elif losses.waiting:
                self._judge_waiting()
            if self._outbox.waiting:  # not here yet: a loss must not be judged before it
                self._outbox.put([self._step], torch.tensor([float(loss)], dtype=torch.float64))
            else:
                self._judge(Reading(self._step, {"loss": float(loss)}), full=False)

    # --- detect and report -----------------------------------------------------------------------

    def _settle(self) -> None:
        """Judge all that was measured, and wait for what is still on its way."""
        self._judge_waiting()
        self._losses.flush(self._outbox)
        self._drain(everything=True)

    def _judge_waiting(self) -> None:
        for step, loss in self._losses.take_waiting():
            passed = False
            if "detector" not in self._quiet:
                with self.guarded("detector"):
                    passed = self._detector.absorb_ordinary_loss(step, loss)
            if passed:
                self._history.append(step, {"loss": loss})
            else:
                self._judge(Reading(step, {"loss": loss}), full=False)

    def _drain(self, *, everything: bool = False) -> None:
        """Judge what has arrived on the host: of a rank that is read alone, the others put nothing there."""
        for label, numbers in self._outbox.take(everything=everything):
            if isinstance(label, list):
                for step, loss in zip(label, numbers, strict=True):
                    self._judge(Reading(step, {"loss": loss}), full=False)
                continue
            values = label.unpack(numbers)
            if values.pop(SKIPPED, 0.0) > 0:
                self._notes.skipped_step(label.step)
            else:
                self._judge(Reading(label.step, with_non_finite(values)), full=True)

    def _receive(self) -> None:
        """Judge what all ranks have measured, once a step and by all of them alike."""
        for reduced in self._ranks.receive(self._step):
            for step, loss in reduced.losses:
                self._judge(Reading(step, {"loss": loss}), full=False)
            if reduced.skipped:
                self._notes.skipped_step(reduced.step)
            else:
                self._judge(Reading(reduced.step, with_non_finite(reduced.values)), full=True)

    def _let_go(self) -> bool:
        """Whether a close() from inside on_alert has just come back to here."""
        return not hasattr(self, "_reader")

    def _judge(self, reading: Reading, *, full: bool) -> None:
        if self._let_go():
            return
        verdict = Judgement(self._detector.phase)
        if "detector" not in self._quiet:
            try:
                if full:
                    self._detector.context = self._read_context()
                verdict = self._detector.update(reading)
            except Exception as error:
                self._failed("detector", error)
        for part, failure in verdict.failed:
            self._failed(part, failure)
        if verdict.derived:
            reading = Reading(reading.step, {**reading.values, **verdict.derived})
        if verdict.phase is not self.phases[-1][1]:
            self.phases.append((reading.step, verdict.phase))
        self._history.append(reading.step, reading.values)
        self._reports.reading(reading, verdict.phase)
        for change, alert in verdict.changes:
            self._report(change, alert)
            if self._let_go():
                return
        if full:
            self._notes.read(
                reading,
                self._detector.signals,
                self._probe,
                self._rows,
                self._detector.spike.negative,
                self._clock.readings,
                self._reader,
            )

    def _report(self, change: Change, alert: Alert) -> None:
        self._reports.alert(alert, change)
        if self._on_alert is not None and "on_alert" not in self._quiet:
            try:
                self._on_alert(alert)
            except Exception as error:
                self._failed("on_alert", error)

    def _read_context(self) -> RunContext:
        no_classes = bool(self._rows.single_output)
        return read_context(self._head, self._reader, no_classes=no_classes, rank=self._ranks.rank)

    # --- reports ---------------------------------------------------------------------------------

    def _failed(self, part: str, error: BaseException) -> None:
        """Report an error of the monitor's own once; that part is quiet from now on, training goes on."""
        if part in ("ranks", "step"):
            with suppress(AttributeError):  # closed
                self._ranks.failed_at = self._step
        if part in self._quiet:
            return
        self._quiet.add(part)
        # Saying so may fail as well (a console that is gone): then there is nothing left to tell it to.
        with suppress(Exception):
            self._notes.failed(part, error, self._step)

    def _info(self) -> dict[str, Any]:
        """What ``run.json`` holds."""
        if self._final_info is not None:
            notes = [asdict(note) for note in self.notes]
            return {**self._final_info, "notes": notes}
        auto = self._clock.healthy or auto_interval(self._detector.context.tau)
        every = self._every if isinstance(self._every, int) else auto
        clock, training = self._clock, self._clock.training
        return {
            **describe_run(self._model, self._head, self._reader),
            "level": self._probe.level,
            "tau": round(self._detector.context.tau, 6),
            "every": self._every,
            "interval": every,
            "thresholds": self._thresholds.to_json(),
            "steps": self._step,
            "absorbing_classes": self._meter.absorbing_classes(),
            "notes": [asdict(note) for note in self.notes],
            "overhead": {
                "seconds": clock.own,
                "share": clock.own / training if training > 0 else None,
                "measured_steps": clock.readings,
            },
            "run_dir": None if self.run_dir is None else str(self.run_dir),
        }


def _after_fork() -> None:
    """A worker that was forked has inherited the hooks, but what it runs is not this run."""
    for monitor in list(_OPEN):
        monitor._abandon()
    _OPEN.clear()
    _WATCHED.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def open_monitors(model: nn.Module, optimizer: Any) -> list[Monitor]:
    """The monitors that would take steps of this optimizer or of this model for the run's."""
    modules = set(model.modules())
    return [monitor for monitor in _OPEN if monitor._optimizer is optimizer or monitor._key in modules]
