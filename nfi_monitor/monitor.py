"""The one stateful public class: attaches, makes one pass per optimizer step, detaches.

capture → measure → detect → report: only this file knows all four.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor import distributed
from nfi_monitor._version import __version__
from nfi_monitor.cadence import Clock, next_read
from nfi_monitor.capture import placement
from nfi_monitor.capture.head import Head, HeadProbe, Rows, find_head
from nfi_monitor.capture.loss import LossProbe
from nfi_monitor.capture.optimizer import OptimizerReader, StepHooks, choose, has_closure
from nfi_monitor.capture.outbox import Outbox
from nfi_monitor.capture.probe_batch import ProbeBatch
from nfi_monitor.capture.ring import SnapshotRing
from nfi_monitor.capture.sampling import auto_interval, local
from nfi_monitor.capture.snapshots import Snapshot, check_extra
from nfi_monitor.detect.causal import ReplayVerdict
from nfi_monitor.detect.detector import Attention, Context, Detector, Verdict
from nfi_monitor.detect.spike import QUIET
from nfi_monitor.errors import AlreadyMonitoredError, MonitorError
from nfi_monitor.history import History
from nfi_monitor.leaver import Leaver
from nfi_monitor.measure.accumulator import RowAccumulator
from nfi_monitor.measure.rows import MAXIMA, SUMS, LossKind, finish
from nfi_monitor.measure.step import SKIPPED, Memory, step_statistics, with_non_finite
from nfi_monitor.measure.zero_sum import accumulation_dtype
from nfi_monitor.notes import NoteTaker
from nfi_monitor.pool import Message, Pool
from nfi_monitor.report.fanout import Fanout, open_sinks
from nfi_monitor.report.sink import Sink
from nfi_monitor.run_info import describe_run
from nfi_monitor.types import Alert, AlertKind, AlertState, Change, Note, Phase, Reading, Thresholds

if TYPE_CHECKING:
    from rich.console import Console

    from nfi_monitor.arms import Arm
    from nfi_monitor.report.explain import Explanation
    from nfi_monitor.report.summary import Summary

_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_OPEN: weakref.WeakSet[Monitor] = weakref.WeakSet()
_ROW_WIDTH = len(SUMS) + len(MAXIMA)
_TOGETHER = 32  # losses judged at once: code that runs once a step finds none of itself in the CPU's caches


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
        console: True prints a line when something begins or ends, False nothing; or a rich ``Console``.
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
            ``every="auto"`` reads a small model less often for it, up to every τ/10 steps (said once); what
            is at risk is read as closely as ever. None: the cadence depends on τ alone, never on the clock.
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
            cadence and alerts, ``on_alert`` is called on each, and the first of them reports.

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
        console: bool | Console = True,
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
        if overhead_budget is not None and not 0 < overhead_budget < math.inf:
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
        for extra in extras:
            check_extra(extra)
        distributed.check_group(group)
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
        self._rank = distributed.rank()
        self._group = group
        self._looking = group is not False  # for ranks that train together
        self._pool: Pool | None = None  # the ranks that are read together
        self._model = model
        self._reader = OptimizerReader(self._optimizer, self._head)
        self._thresholds = thresholds or Thresholds()
        self._rows = RowAccumulator()
        self._detector = Detector(self._thresholds, self._read_context())
        self._clock = Clock(overhead_budget)
        apart = self._find_pool()
        self._outbox = Outbox()
        self._memory: Memory | None = None
        self._extras = tuple(extras)
        self._ring = SnapshotRing(model, self._optimizer, self._extras, snapshots)
        self.replays: list[ReplayVerdict] = []
        """What replays of this run's slingshots have shown, oldest first."""
        self._probe_batch = None if probe is None else ProbeBatch(model, *probe)
        self._on_alert = on_alert
        self._history = History()
        self.phases: list[tuple[int, Phase]] = [(0, Phase.HEALTHY)]
        """(step, phase) whenever the phase changes."""
        self.run_dir = run_dir

        self._step = 0  # optimizer steps completed
        self._wanted_step: int | None = 1  # the step that is being captured, None between readings
        self._losses: list[Tensor | float] = []
        self._loss_share: float | None = None  # not None: losses, times this, add up to the step's
        self._late_losses: list[tuple[int, Tensor]] = []  # on an accelerator: not copied yet
        self._plain_losses: list[tuple[int, float]] = []  # on the host: not judged yet, see _is_plain
        self._attention = self._detector.attention
        self._usual_below = -math.inf
        self._next_read = 1  # the next step to be read, as things stand
        self._before: Any = None
        self._quiet: set[str] = set()  # parts that failed and went quiet
        self._closed = False
        self._paused = 0
        self._final_info: dict[str, Any] | None = None

        speaks = group is False or distributed.rank() == (0 if self._pool is None else self._pool.speaks)
        told = [*open_sinks(console, run_dir, self._info), *sinks] if speaks else []
        self._reports = Fanout(told, self._failed)
        self._notes = NoteTaker(self._reports.note)
        self._probe = HeadProbe(self._captured_step, self._rows_arrived, self._failed)
        self._loss_probe: LossProbe | None = None
        self._share_head(apart)
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

    def observe_loss(self, loss: Tensor | float) -> None:
        """Tell the monitor the loss of this micro-batch; call it before ``optimizer.step()``.

        Never synchronises: a tensor is kept as it is and read with the step's other numbers.
        """
        if self._closed or self._paused:
            return
        try:
            self._losses.append(local(loss.detach()) if isinstance(loss, Tensor) else float(loss))
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
            self._loss_share = scale if share else None
            self.observe_loss(loss)

        self._loss_probe = LossProbe(deliver, self._failed)
        self._handles.append(self._model.register_forward_hook(self._loss_probe, with_kwargs=True))

    def begin_step(self) -> None:
        """For frameworks that say when an optimizer step begins: what a step that its gradient scaler skipped
        has left of its loss is forgotten."""
        self._losses.clear()

    def end_micro_batch(self) -> None:
        """Only for gradient accumulation with a compiled model after :meth:`observe_outputs`: call it after
        each backward, or only the last micro-batch's loss is seen."""
        if self._loss_probe is not None and not self._closed:
            self._loss_probe.collect()

    def tap(self, logits: Tensor) -> Tensor:
        """Watch exactly this tensor [..., K] instead of the head's output; returns it unchanged.

        For logits that are no module's output, or are cast, scaled or capped between head and loss.
        """
        if not self._closed and not self._paused:
            self._probe.tap(logits)
        return logits

    @property
    def history(self) -> History:
        """Everything measured so far: ``history["zero_sum_violation"]`` → (steps, values). Assign a longer
        one (``History(max_rows=...)``) to have less of it thinned."""
        if self._plain_losses:
            with self.guarded("step"):
                self._judge_plain_losses()
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
    def tau(self) -> float:
        """τ = 1/(1−β2) in optimizer steps."""
        return self._detector.context.tau

    @property
    def extras(self) -> tuple[Any, ...]:
        """What else belongs to a state of the run; nothing once closed."""
        return () if self._closed else self._extras

    def note(self, code: str, message: str) -> None:
        """Say something of your own where the monitor's notes go; once for each ``code``."""
        self._notes.note(code, message, self._step)

    def take_snapshot(self) -> Snapshot:
        """The run as it is after the last step, ``extras`` included. Raises MonitorError once closed."""
        if self._closed:
            raise MonitorError(
                "A closed monitor has let go of the model. Use Snapshot.take(step, model, ...)."
            )
        return Snapshot.take(self._step, self._model, self._optimizer, self._extras)

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
        from nfi_monitor.report.explain import explain, find_alert

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
        """Find the last slingshot's cause: go on from before it under each arm (:mod:`nfi_monitor.replay`).

        ``step_fn(step)`` does optimizer step number ``step`` as the run did, its data included, and returns
        the loss.  ``snapshot``: default the newest that is 2 τ before the slingshot, or else the oldest.
        ``steps``: default until max(2 τ, 20) steps after the slingshot.  The verdict is written to
        ``replays.jsonl`` and stands in the report; the run itself is not changed and may go on.

        Raises MonitorError, saying what is needed, without a snapshot or a usable ``step_fn``.
        """
        from nfi_monitor.detect.causal import margin
        from nfi_monitor.replay import RECIPE, STEP_FN, replay

        if self._closed:
            raise MonitorError(
                "A closed monitor has let go of the model. Call monitor.replay before close(), inside the "
                "with block, or nfi_monitor.replay.replay(snapshot, step_fn, model=..., optimizer=...) with "
                "one of monitor.snapshots."
            )
        if not callable(step_fn):
            raise MonitorError(f"replay needs a function, got {type(step_fn).__name__}. {STEP_FN} {RECIPE}")
        self._settle()
        tau = self._detector.context.tau
        slingshot = next((a for a in reversed(self.alerts) if a.kind is AlertKind.SLINGSHOT), None)
        if snapshot is None:
            snapshot = self._snapshot_before(slingshot, tau)
        if slingshot is not None and slingshot.first_step <= snapshot.step:
            slingshot = None  # the given snapshot is of later: what comes is another one
        if steps is None and slingshot is not None:
            steps = slingshot.first_step - snapshot.step + margin(tau)
        recorded = {int(step): float(loss) for step, loss in zip(*self.history["loss"], strict=True)}
        verdict = replay(
            snapshot,
            step_fn,
            arms,
            steps,
            model=self._model,
            optimizer=self._optimizer,
            head=self._head.module if self._head is not None else False,
            extras=self._extras,
            beta2=self._detector.context.beta2,
            recorded=recorded,
            thresholds=self._thresholds,
        )
        verdict = replace(verdict, slingshot=None if slingshot is None else slingshot.id)
        self.replays.append(verdict)
        self._reports.replay(verdict)
        return verdict

    def _snapshot_before(self, slingshot: Alert | None, tau: float) -> Snapshot:
        """The newest at least 2 τ before the slingshot, or the oldest there is."""
        kept = self.snapshots
        before = [s for s in kept if slingshot is None or s.step < slingshot.first_step]
        if before:
            early = [
                s for s in before if slingshot is None or s.step <= slingshot.first_step - round(2 * tau)
            ]
            return early[-1] if early else before[0]
        if kept and slingshot is not None:
            why = f"those kept are of steps {kept[0].step:,}–{kept[-1].step:,}, after the slingshot began"
        elif self._ring.refused:
            why = self._ring.refused
        elif not self._ring.limit:
            why = "the monitor was told to keep none"
        else:
            why = "one is taken when an at-risk alert begins, and none has, or it failed (see monitor.notes)"
        raise MonitorError(
            f"No snapshot to replay from: {why}. Pass snapshots=<bytes> to Monitor (say snapshots=4 << 30), "
            "or take one yourself with Snapshot.take(step, model, optimizer, extras) and pass snapshot=."
        )

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

    def close(self) -> None:
        """Detach all hooks and finish the reports. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        with self.guarded("close"):
            self._leave()
        for handle in self._handles:
            with self.guarded("close"):
                handle.remove()
        self._handles.clear()
        _WATCHED.discard(self._key)
        _OPEN.discard(self)
        try:
            self._settle()
            self._ring.close()
        except Exception as error:
            self._failed("close", error)
        with self.guarded("close"):
            self._clock.finish()
        self._before, self._memory = None, None
        try:
            self._rows.clear(self._step + 1)
            self._probe.forget()
            self._final_info = self._info()
            if self._reports.sinks:
                for alert in self.alerts:
                    if alert.state is AlertState.FIRING:  # how far it got: files hold only what was told
                        self._reports.alert(alert, Change.UPDATE)
                self._reports.close(self._info(), self.summary())
        except Exception as error:  # never in the way of an exception of the user's own
            self._failed("close", error)
        # The monitor may outlive the run for its history; the model and the optimizer must not for its sake.
        del self._model, self._optimizer, self._reader, self._probe_batch, self._head, self._key, self._extras

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
        self._flush_losses()
        self._drain(everything=True)
        memory = self._memory
        return {
            "version": __version__,
            "step": self._step,
            "detector": self._detector.state_dict(),
            "interval": self._clock.healthy,
            "phases": [[step, phase.value] for step, phase in self.phases],
            "absorbing_classes": self._absorbing_classes(limit=None),
            "loss_kind": None if self._rows.loss_kind is None else [float(x) for x in self._rows.loss_kind],
            "loss_kind_dtypes": [str(x.dtype).removeprefix("torch.") for x in self._rows.loss_kind or ()],
            "single_output": self._rows.single_output,
            # Only the step right after it is compared with it.
            "plain_losses": [[step, loss] for step, loss in self._plain_losses],
            "last_step": None if memory is None or memory.step != self._step else memory.state_dict(),
            "probe": None if self._closed or self._probe_batch is None else self._probe_batch.state_dict(),
            "notes": [[note.code, note.message, note.step] for note in self.notes],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off. Raises ValueError for a state of another kind."""
        if "detector" not in state or "step" not in state:
            raise ValueError(
                "Not a monitor's state: expected keys 'step' and 'detector', found "
                f"{sorted(map(str, state))[:8]}. Pass what monitor.state_dict() returned."
            )
        self._step = int(state["step"])
        self._detector.load_state_dict(state["detector"])
        if self._clock.budget is not None:
            self._clock.healthy = state.get("interval")
        self.phases[:] = [(int(step), Phase(phase)) for step, phase in state["phases"]]
        self._rows.earlier_classes = {int(k): float(count) for k, count in state["absorbing_classes"]}
        device = self._device()
        if state["loss_kind"] is not None:
            dtypes = [getattr(torch, name) for name in state.get("loss_kind_dtypes") or ["float32"] * 4]
            self._rows.loss_kind = LossKind(
                *(
                    torch.tensor(x, dtype=t, device=device)
                    for x, t in zip(state["loss_kind"], dtypes, strict=True)
                )
            )
        self._rows.single_output = state.get("single_output")
        if state.get("last_step") is not None:
            self._memory = Memory.from_state(state["last_step"], device)
        if self._probe_batch is not None and state.get("probe") is not None:
            self._probe_batch.load_state_dict(state["probe"])
        self._plain_losses[:] = [(int(step), float(loss)) for step, loss in state.get("plain_losses", [])]
        self._rows.clear(self._step + 1)
        self._look_ahead()
        for code, message, step in state["notes"]:
            self._notes.said.setdefault(code, Note(code, message, int(step)))

    def _device(self) -> torch.device:
        weight = self._head.weight if self._head is not None else None
        return weight.device if weight is not None else next(self._model.parameters()).device

    # --- hooks -----------------------------------------------------------------------------------

    def _captured_step(self) -> int | None:
        """For the head's forward. In the first it may turn out that DDP wraps the model after all."""
        if self._paused:
            return None
        if self._looking and self._step == 0 and self._pool is None and not self._closed:
            self._share_head(self._find_pool())
        return self._wanted_step

    def _rows_arrived(self, rows: Rows) -> None:
        if "rows" in self._quiet or self._closed or self._paused:
            return
        started = time.perf_counter()
        with torch.no_grad(), _full_precision(rows.grad.device.type):
            self._rows.add(rows)
        self._clock.own += time.perf_counter() - started

    def _before_step(self, given: Sequence[Any]) -> None:
        if self._paused:
            return
        if self._ring.pending:
            self._complete_snapshot()
        if self._loss_probe is not None:
            self.end_micro_batch()
        if self._wanted_step is None or "optimizer" in self._quiet:
            return
        started = time.perf_counter()
        try:
            with torch.no_grad():
                self._before = self._reader.before(self._wanted_step, closure=has_closure(given))
        except Exception as error:
            self._failed("optimizer", error)
        self._clock.own += time.perf_counter() - started

    def _after_step(self) -> None:
        if self._paused:
            return
        started = time.perf_counter()
        self._step += 1
        read = self._wanted_step is not None
        if self._is_plain():
            self._losses.clear()
            if self._step + 1 == self._next_read:
                self._wanted_step = self._next_read
        else:
            try:
                if read:
                    with torch.no_grad():
                        self._measure()
                elif self._losses:
                    self._loss_only()
                if self._pool is not None:
                    self._receive(self._pool)
                self._drain()
            except Exception as error:
                self._failed("step", error)
            if self._let_go():
                return
            self._take_snapshot()
            self._losses.clear()
            self._loss_share = None
            self._before = None
            self._probe.forget()
            self._look_ahead()
        if self._wanted_step is not None:
            self._rows.clear(self._wanted_step)
        now = time.perf_counter()
        self._clock.own += now - started
        self._clock.step_done(read, now)

    def _is_plain(self) -> bool:
        """A step that is not read, whose loss begins nothing: put aside, to be judged with the next few.

        Only while nothing is going on and nobody waits for each reading.  What is judged does not change by
        it, nor when something is seen: the loss that may begin a slingshot is judged at once.
        """
        if self._wanted_step is not None or self._usual_below < 0:
            return False
        if not self._losses:
            return True
        loss = self._losses[0]
        if len(self._losses) > 1 or self._loss_share is not None or len(self._plain_losses) >= _TOGETHER:
            return False
        if isinstance(loss, Tensor):
            if loss.ndim or not placement.on_host(loss):
                return False
            loss = loss.item()
        if not 0.0 <= loss < self._usual_below or self._detector.stirs(self._step, loss):
            return False
        self._plain_losses.append((self._step, loss))
        return True

    def _look_ahead(self) -> None:
        """What the readings so far say of the next steps: how closely to look, and which loss is usual."""
        detector = self._detector
        self._attention = detector.attention
        patient = self._attention is Attention.RARELY and self._pool is None and not self._reports.listening
        self._usual_below = detector.spike.usual_below(self._thresholds) if patient else -math.inf
        tau = detector.context.tau
        if self._clock.decide(self._step, tau):
            self._notes.slowed(self._clock, tau, self._step)
        self._next_read = next_read(self._step, self._every, self._attention, tau, self._clock.healthy)
        self._wanted_step = self._next_read if self._next_read == self._step + 1 else None

    def _take_snapshot(self) -> None:
        """At risk, now and then; from a slingshot's first unusual loss until its end, never."""
        detector = self._detector
        if not detector.at_risk or detector.spike.state != QUIET or detector.spike.streak:
            return
        if "snapshots" in self._quiet or not self._ring.due(self._step, detector.context.tau):
            return
        try:
            self._ring.take(self._step, detector.spike.state_dict())
        except Exception as error:
            self._failed("snapshots", error)
        if self._ring.refused and self._ring.limit != "auto":
            self._notes.note("no_snapshots", f"No snapshots are kept: {self._ring.refused}.", self._step)

    def _complete_snapshot(self) -> None:
        started = time.perf_counter()
        try:
            self._ring.complete()
        except Exception as error:
            self._failed("snapshots", error)
        self._clock.own += time.perf_counter() - started

    # --- measure ---------------------------------------------------------------------------------

    def _measure(self) -> None:
        """One packed vector for this step: row sums, row maxima, step quantities, loss."""
        if self._pool is not None and self._meet(self._pool):
            self._measure_together(self._pool)
            return
        packed: list[Tensor] = []
        has_rows = self._rows.sums is not None and self._rows.maxima is not None
        if self._rows.sums is not None and self._rows.maxima is not None:
            packed += [self._rows.sums, self._rows.maxima]
        values: dict[str, Tensor] = {}
        host: dict[str, float] = {}
        if self._before is not None and "optimizer" not in self._quiet:
            try:
                values, host = self._measure_step()
            except Exception as error:
                self._failed("optimizer", error)
        self._measure_probe(values)
        loss = self._step_loss()
        if isinstance(loss, Tensor):
            values["loss"] = loss
        elif loss is not None:
            host["loss"] = loss
        if values:
            packed.append(torch.stack([*values.values()]))
        label = (self._step, has_rows, tuple(values), host, bool(self._rows.single_output))
        self._judge_plain_losses()
        self._flush_losses()
        self._outbox.put(label, torch.cat(packed) if packed else torch.empty(0))

    def _measure_probe(self, values: dict[str, Tensor]) -> None:
        if self._probe_batch is not None and "probe" not in self._quiet:
            try:
                displacement = self._probe_batch.displacement(self._step)
                if displacement is not None:
                    values["margin_displacement"] = displacement
            except Exception as error:
                self._failed("probe", error)

    def _measure_step(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What the optimizer step did: quantities on the device, and those known on the host."""
        update = self._reader.after(self._before, self._step)
        if update is None:
            self._memory = None
            return {}, {}
        values, self._memory = step_statistics(
            update, self._rows.features, self._rows.feature_mean, self._memory, self._step
        )
        if isinstance(update.lr, Tensor):
            values["learning_rate"] = update.lr
        elif math.isfinite(update.lr):
            return values, {"learning_rate": update.lr}
        return values, {}

    def _step_loss(self) -> Tensor | float | None:
        """Mean over the micro-batches, in the widest precision given; a 0-d tensor or a number.

        A micro-batch whose loss is NaN or Inf counts only if all are: a gradient scaler that skipped a step
        leaves that step's loss behind.
        """
        if not self._losses:
            return None
        if len(self._losses) == 1 and self._loss_share is None and getattr(self._losses[0], "ndim", 0) == 0:
            return self._losses[0]  # the usual case, and one that every step passes through: no kernel
        with torch.no_grad():
            tensors = [x.mean(dtype=_mean_dtype(x)) for x in self._losses if isinstance(x, Tensor)]
            numbers = [loss for loss in self._losses if not isinstance(loss, Tensor)]
            if numbers:
                finite = [number for number in numbers if math.isfinite(number)] or numbers
                return sum(finite) / len(finite)
            losses = torch.stack(tensors)
            mean = torch.where(torch.isfinite(losses), losses, torch.nan).nanmean()
            return mean if self._loss_share is None else mean * (len(tensors) * self._loss_share)

    def _loss_only(self) -> None:
        """Between readings the loss alone: at once on a CPU, a batch of late ones on an accelerator."""
        loss = self._step_loss()
        if loss is None:
            return
        if self._pool is not None:
            self._pool.keep_loss(self._step, loss)
        elif isinstance(loss, Tensor) and not placement.on_host(loss):
            self._late_losses.append((self._step, loss))
        else:
            self._judge_plain_losses()
            self._judge(Reading(self._step, {"loss": float(loss)}), full=False)

    def _judge_plain_losses(self) -> None:
        # Taken first: what an alert calls may ask for the history, and come back to here.
        losses, self._plain_losses = self._plain_losses, []
        for step, loss in losses:
            if "detector" not in self._quiet and self._detector.pass_by(step, loss):
                self._history.append(step, {"loss": loss})
            else:
                self._judge(Reading(step, {"loss": loss}), full=False)

    def _settle(self) -> None:
        """Judge all that was measured, and wait for what is still on its way."""
        self._judge_plain_losses()
        self._flush_losses()
        self._drain(everything=True)

    def _flush_losses(self) -> None:
        if self._late_losses:
            steps = [step for step, _ in self._late_losses]
            packed = torch.stack([loss.reshape(()) for _, loss in self._late_losses])
            self._late_losses.clear()
            self._outbox.put(steps, packed)

    # --- many processes --------------------------------------------------------------------------

    def _find_pool(self) -> str | None:
        """Look for the ranks that train together, and sign up; returns why that failed, if it did."""
        if not self._looking:
            return None
        try:
            ranks = distributed.find_ranks(self._model, self._group)
            if ranks is not None:
                slots = min(self._every, 256) if isinstance(self._every, int) else 32
                self._pool = Pool.form(self._model, self._optimizer, self._head, ranks, slots=slots)
                # Ranks have to agree on the cadence, and no two clocks do.
                self._clock.budget = self._clock.healthy = None
        except Exception as error:
            return f"their store cannot be reached ({type(error).__name__}: {error})"
        return None

    def _share_head(self, apart: str | None) -> None:
        """Read a part of the head's classes where the other ranks hold the rest."""
        head = self._head
        if head is not None and distributed.is_sharded(head.weight):
            self._probe.outputs = head.outputs  # logits of fewer classes are a part of them
        if self._pool is not None and self._pool.shape.head_sharded:
            self._reader.pooled, self._probe.row_slots = True, self._pool.shape.row_slots
        if apart is not None:
            self._looking = False
            self._apart(apart)

    def _meet(self, pool: Pool) -> bool:
        """Whether all ranks are here; the first call of each rank waits for the others."""
        try:
            if pool.stops_early:
                self._apart(
                    "DDP's join() lets a rank that has run out of batches stop making optimizer steps"
                )
                return False
            if pool.team.meet():
                self._rank = pool.speaks
                return True
            why = (
                f"only {pool.team.here} of {pool.team.world} had attached a monitor (to this head, under the "
                f"same settings) within {distributed.WAIT:g} seconds. Attach it on every rank, before the "
                "first optimizer step; or pass group=False, and nobody waits"
            )
        except Exception as error:
            why = f"they cannot be reached ({type(error).__name__}: {error})"
        self._apart(why)
        return False

    def _apart(self, why: str) -> None:
        """From here on this rank reads its own rows: the others are not there, or not at the same step."""
        if self._pool is not None:
            self._pool.team.disband()
            self._looking = False
            self._pool, self._memory, self._reader.pooled = None, None, False
            self._probe.row_slots = 0
        self._notes.note(
            "ranks_apart",
            f"The ranks are not read together: {why}. Each watches its own rows (and only whole tensors), "
            "rank 0 alone reports. Training is not affected.",
            self._step,
        )

    def _measure_together(self, pool: Pool) -> None:
        """This rank's part of the step's reading. Whatever fails here, the others are not kept waiting."""
        message, weight = pool.message(), None
        try:
            weight = self._fill(pool, message)
            packed = pool.finish(message, self._step, failed=bool(self._quiet))
        except Exception as error:
            self._failed("ranks", error)
            packed = pool.nothing(self._step, failed=True)
        pool.send(packed, self._step, head_weight=weight)

    def _fill(self, pool: Pool, message: Message) -> Tensor | None:
        """Everything that this rank has measured; returns the head's weight, where it is whole."""
        pool.add_rows(message, self._rows)
        values: dict[str, Tensor] = {}
        weight = None
        if "optimizer" not in self._quiet:
            try:
                weight = self._fill_step(pool, message)
            except Exception as error:
                self._failed("optimizer", error)
        self._measure_probe(values)
        pool.add_values(message, values)
        loss = self._step_loss()
        if loss is not None:
            pool.keep_loss(self._step, loss)
        return weight

    def _fill_step(self, pool: Pool, message: Message) -> Tensor | None:
        update = None if self._before is None else self._reader.after(self._before, self._step)
        values: dict[str, Tensor | float] = {}
        if update is not None:
            values["learning_rate"] = update.lr
            if update.found_inf is not None:
                values[SKIPPED] = update.found_inf
            if not pool.shape.head_sharded:
                rows, memory = self._rows.features, self._memory
                whole, self._memory = step_statistics(update, rows, None, memory, self._step)
                values |= pool.whole(whole)
        pool.add_values(message, values)
        pool.add_step(message, update, self._step)
        pool.add_head(message, update, self._step)
        return None if update is None or pool.shape.head_sharded else update.head_weight

    def _receive(self, pool: Pool) -> None:
        """Readings of all ranks that are due at this step: the same ones on each of them."""
        try:
            received = pool.receive(self._step)
        except Exception as error:
            self._apart(f"one of them is gone, or late ({type(error).__name__}: {error})")
            return
        for reduced in received:
            if reduced.out_of_step:
                where = ", ".join(str(pool.team.ranks[index]) for index in reduced.out_of_step)
                self._apart(f"rank {where} is at another optimizer step than rank {distributed.rank()}")
                return
            if reduced.single_output:
                self._rows.single_output = True
            if reduced.together is not None:
                self._rows.learn(reduced.together.loss_kind, reduced.together.absorbed)
            if reduced.failed:
                where = ", ".join(str(pool.team.ranks[index]) for index in reduced.failed)
                self._notes.note(
                    "failed_rank",
                    f"A part of the monitor failed on rank {where} and is off there; the other ranks are "
                    "still read, and training is not affected.",
                    reduced.step,
                )
            for step, loss in reduced.losses:
                self._judge(Reading(step, {"loss": loss}), full=False)
            if reduced.skipped:
                self._notes.skipped_step(reduced.step)
            else:
                self._judge(Reading(reduced.step, with_non_finite(reduced.values)), full=True)
            if reduced.left:
                where = ", ".join(str(pool.team.ranks[index]) for index in reduced.left)
                self._apart(f"the monitor of rank {where} was closed")
                return

    def _leave(self) -> None:
        """Tell the other ranks, with the next reading, that this one takes no part any more."""
        pool, self._pool = self._pool, None
        if pool is not None and pool.team.leave():
            Leaver(pool, self._handles.pop(0), self._step, self._detector, self._every)

    # --- detect and report -----------------------------------------------------------------------

    def _drain(self, *, everything: bool = False) -> None:
        if self._pool is not None:
            return  # what is due is received once a step, by all ranks alike
        for label, numbers in self._outbox.take(everything=everything):
            if isinstance(label, list):
                for step, loss in zip(label, numbers, strict=True):
                    self._judge(Reading(step, {"loss": loss}), full=False)
                continue
            step, has_rows, names, host, single_output = label
            values: dict[str, float] = dict(host)
            if has_rows:
                sums, maxima = numbers[: len(SUMS)], numbers[len(SUMS) : _ROW_WIDTH]
                values |= finish(sums, maxima, single_output=single_output)
                numbers = numbers[_ROW_WIDTH:]
            values |= dict(zip(names, numbers, strict=True))
            if values.pop(SKIPPED, 0.0) > 0:
                self._notes.skipped_step(step)
                continue
            self._judge(Reading(step, with_non_finite(values)), full=True)

    def _let_go(self) -> bool:
        """Whether a close() from inside on_alert has just come back to here."""
        return not hasattr(self, "_reader")

    def _judge(self, reading: Reading, *, full: bool) -> None:
        if self._let_go():
            return
        verdict = Verdict(self._detector.phase)
        if "detector" not in self._quiet:
            try:
                if full:
                    self._detector.context = self._read_context()
                verdict = self._detector.update(reading)
            except Exception as error:
                self._failed("detector", error)
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
                self._rows.single_output,
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

    def _read_context(self) -> Context:
        betas = self._reader.betas()
        group = self._reader.group_of(self._head.weight if self._head is not None else None)
        decoupled = group.get("decoupled_weight_decay", type(self._optimizer).__name__.startswith("AdamW"))
        return Context(
            beta1=betas[0] if betas else 0.9,
            beta2=betas[1] if betas else 0.99,
            decoupled_decay=bool(decoupled) and float(group.get("weight_decay", 0.0) or 0.0) > 0,
            no_classes=bool(self._rows.single_output),
            layer=self._head.name if self._head is not None else None,
            rank=self._rank,
        )

    # --- reports ---------------------------------------------------------------------------------

    def _failed(self, part: str, error: BaseException) -> None:
        """Report an error of the monitor's own once; that part is quiet from now on, training goes on."""
        if part in self._quiet:
            return
        self._quiet.add(part)
        # Saying so may fail as well (a console that is gone): then there is nothing left to tell it to.
        with suppress(Exception):
            self._notes.failed(part, error, self._step)

    def _absorbing_classes(self, limit: int | None = 10) -> list[list[float]]:
        return [[float(k), count] for k, count in self._rows.most_absorbed(limit)]

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
            "absorbing_classes": self._absorbing_classes(),
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


def _mean_dtype(loss: Tensor) -> torch.dtype:
    return loss.dtype if loss.dtype in (torch.float32, torch.float64) else torch.float32


def _full_precision(device: str) -> Any:
    """Autocast would turn the monitor's own dot products into half precision."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
