"""Define the public class: it attaches to a training, gives access to the results, and detaches.

:class:`~nfi_monitor.engine.loop.StepLoop` does the work in the hooks.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor.alert_handler import handler_of
from nfi_monitor.capture import devices
from nfi_monitor.capture.foreign_optimizer import original_of
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.names import HeadLike
from nfi_monitor.capture.untraced import untraced
from nfi_monitor.deprecation import renamed_keyword
from nfi_monitor.engine import checkpoint, detach
from nfi_monitor.engine.checks import Options, find_watched
from nfi_monitor.engine.copied import CopiedLoop
from nfi_monitor.engine.loop import StepLoop
from nfi_monitor.engine.port import MOVED_TO_PORT, AdapterPort
from nfi_monitor.engine.unusable import features_text, logits_text
from nfi_monitor.errors import MonitorError
from nfi_monitor.history import History
from nfi_monitor.measure.weight_norm import parameter_norms
from nfi_monitor.registry import open_monitors as open_monitors  # its old place
from nfi_monitor.registry import register
from nfi_monitor.replay.snapshots import Snapshot
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report.sink import Sink
from nfi_monitor.types import Alert, Note, Phase, Thresholds

if TYPE_CHECKING:
    from rich.console import Console

    from nfi_monitor.replay.arm import Arm
    from nfi_monitor.report.explain.explanation import Explanation
    from nfi_monitor.report.summary import Summary


class Monitor:
    """Watch a training run for slingshots: attach at once, detach on ``close()`` or when ``with`` ends.

    Args:
        model: the module that is trained; it may be wrapped by DDP or torch.compile.
        optimizer: the optimizer whose ``step()`` updates the model; it may be wrapped, or of another
            library. Of a list, the monitor takes the one that trains the head.
        head: the classifier head: a module, a parameter that holds its matrix, the qualified name of one, or
            a list of these, of which the one with most classes is watched (to watch each, attach a monitor
            for each). None finds it. False: no module is the head, and rows come from :meth:`tap` alone.
        run_dir: directory for ``run.json``, ``readings.jsonl``, ``alerts.jsonl`` and, if tensorboard is
            installed, event files. None: write no files.
        console: True prints a line when an alert begins or ends; False or None prints nothing; or a
            ``Console`` to print to.
        on_alert: called with the :class:`Alert` whenever one begins, changes or ends: a function, or an
            :class:`nfi_monitor.AlertHandler`, such as :class:`nfi_monitor.remedies.Autopilot`.
        probe: a fixed batch ``(inputs, targets)`` whose margins are compared between readings. It shows
            displacement that the head alone does not show, as behind a LayerNorm. It costs one extra forward
            pass per reading. ``inputs`` is a tensor, a tuple of arguments or a dict of keywords.
            ``targets`` is int64, of the logits' shape without the class axis.
        thresholds: the constants of detection.
        every: "auto" reads some steps of a healthy run, and every step once something changes. An int n
            reads the first optimizer step and every n-th.
        overhead_budget: share of the training's own time that the monitor may take at healthy steps. To
            keep to it, ``every="auto"`` reads a small model less often, at least once in τ/10 steps. If that
            is not enough, it reads a quarter of the rows and coordinates from then on. A note says so. A run
            at risk is read as often as before. None: τ alone decides what is read, never the clock.
        snapshots: while *at risk*, keep the last four states of the run in host memory, one every 2 τ, for
            :meth:`replay`. "auto": on a CPU only, and if one state takes at most 16 MiB. An int: on any
            device, if all states together take at most so many bytes. False: keep none.
        stateful: other objects that belong to the state of the run: schedulers, gradient scalers, samplers,
            weight averages (with ``state_dict``/``load_state_dict``) and ``torch.Generator`` objects.
        sinks: further :class:`nfi_monitor.report.sink.Sink` objects for readings and alerts, on rank 0.
        group: the processes that train this model together; their rows and shards make one reading. None
            finds them (DDP, FSDP, tensor parallel meshes). A ``ProcessGroup`` or a ``DeviceMesh`` names them.
            False reads and reports this process alone. Attach a monitor on each process: they agree on
            phase, steps to read and alerts. ``on_alert`` is called on each; the first process reports. If
            they are not read together, adapters and the Autopilot act on no alert (``port.may_act()``).

    Raises:
        HeadNotFoundError: the model lacks the head that is named, or it can be none; the message lists
            candidates.
        AlreadyMonitoredError: another open monitor watches the same head.
        TypeError, ValueError: arguments of the wrong kind.

    The monitor never changes the training: every hook returns None, tensors are detached before they are
    read, no random number is drawn.  It never stops the training: a part of the monitor that fails is
    reported once and left out; later readings try it again.
    """

    @renamed_keyword("extras", "stateful")
    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        head: HeadLike | bool | None = None,
        run_dir: str | PathLike[str] | None = None,
        console: bool | Console | None = True,
        on_alert: Callable[[Alert], None] | None = None,
        probe: tuple[Any, Tensor] | None = None,
        thresholds: Thresholds | None = None,
        every: int | str = "auto",
        overhead_budget: float | None = 0.01,
        snapshots: int | str | bool = "auto",
        stateful: Sequence[Any] = (),
        sinks: Sequence[Sink] = (),
        group: Any = None,
    ) -> None:
        options = Options(
            head=head, run_dir=run_dir, console=console, on_alert=on_alert, probe=probe, every=every,
            thresholds=thresholds, overhead_budget=overhead_budget, snapshots=snapshots, stateful=stateful,
            sinks=sinks, group=group,
        )  # fmt: skip
        options.check(model)
        found, watched = find_watched(model, optimizer, head)
        loop = self._loop = StepLoop(self, model, watched, found, options)
        self.port = AdapterPort(loop)
        """The methods for adapters of training frameworks and for remedies."""
        try:
            register(self, loop.watched_module)
            detach.abandon_if_forked(loop)
            loop.attach(options)
            handler = handler_of(on_alert)
            if handler is not None:
                handler.attach(self)
        except BaseException:
            self.close()
            raise

    # --- capture ---------------------------------------------------------------------------------

    @untraced  # inside a compiled function one graph break
    def observe_loss(self, loss: Tensor | float) -> None:
        """Record the loss of this micro-batch. Call this before ``optimizer.step()``.

        It never synchronises: a tensor is kept and read later, with the step's other numbers.
        """
        loop = self._loop
        try:
            why = loop.loss_sources.report(loss)
            if why is not None:
                loop.notes.note("loss_unusable", why, loop.step)
        except Exception as error:
            loop.faults.failed("observe_loss", error)

    def observe_outputs(self, scale: float = 1.0) -> None:
        """Read the loss from the model's output (``output.loss``, ``output[0]``), without a call per step.

        If the model gets ``num_items_in_batch``, each loss is a share of the step's loss: the losses are
        added and multiplied by ``scale`` (the number of processes, if the items of all are counted).
        A loss at which no gradient arrives is not the run's: it is left out, and a note says so.
        """
        loop = self._loop
        if not loop.closed:
            loop.loss_sources.watch_outputs(loop.model, scale, loop.hooks.add)

    @torch.compiler.disable
    def tap(self, logits: Tensor, class_axis: int = -1) -> Tensor:
        """Watch this tensor [..., K] instead of the head's output. Returns it unchanged.

        For logits that no module returns, or that are cast, scaled or capped between head and loss. Inside a
        compiled function it costs one graph break, outside none. ``class_axis``: the axis of the classes, 1
        for the logits [N, K, H, W] of a segmentation.
        """
        loop = self._loop
        if not loop.closed and not loop.paused:
            try:
                why = logits_text(logits, class_axis)
                if why is not None:
                    loop.notes.note("tap_unusable", why, loop.step)
                elif not (devices.GRAPHS and loop.recorded()):
                    loop.probe.tap(logits, class_axis)
            except Exception as error:
                loop.faults.failed("rows", error)
        return logits

    @torch.compiler.disable
    def tap_features(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Watch the hidden states of a loss that makes no logits. Returns them unchanged.

        For a fused or chunked linear cross-entropy, which reads the head's weight: rows are recomputed from
        ``hidden`` [..., d] and ``targets`` [...] (int64, of these rows; a negative one does not count).
        Report the loss of ``F.linear_cross_entropy`` too: in chunks, it rounds absorbed rows away otherwise.
        """
        loop = self._loop
        if not loop.closed:
            try:
                why = features_text(hidden, targets)
                if why is None:
                    loop.recomputer.tap(hidden, targets)
                else:
                    loop.notes.note("features_unusable", why, loop.step)
            except Exception as error:
                loop.faults.failed("rows", error)
        return hidden

    # --- results ---------------------------------------------------------------------------------

    @property
    def history(self) -> History:
        """Everything measured so far: ``history["zero_sum_violation"]`` → (steps, values).

        Deferred losses are judged first. Assign a ``History(max_rows=...)`` with more rows to thin less."""
        return self._loop.judge.history

    @history.setter
    def history(self, history: History) -> None:
        self._loop.judge.recorded = history

    @property
    def alerts(self) -> list[Alert]:
        """All alerts, oldest first, each in its latest state."""
        return list(self._loop.detector.alerts)

    @property
    def phase(self) -> Phase:
        """The phase after the last reading."""
        return self._loop.detector.phase

    @property
    def phases(self) -> list[tuple[int, Phase]]:
        """Changes of the phase, as (step, new phase)."""
        return self._loop.judge.phases

    @property
    def notes(self) -> list[Note]:
        """Notes so far: each says once what the monitor cannot see, or what it reports besides alerts."""
        return list(self._loop.notes.by_code.values())

    @property
    def replays(self) -> list[ReplayVerdict]:
        """The verdicts of the replays of this run's slingshots, oldest first."""
        return self._loop.replays

    @property
    def snapshots(self) -> list[Snapshot]:
        """Snapshots taken while the run was at risk, oldest first; also after ``close()``."""
        return self._loop.recent_snapshots.snapshots

    def summary(self) -> Summary:
        """Return a summary of the run so far, for ``rich.print`` or ``json.dumps``."""
        return self._loop.summary()

    def explain(self, alert: Alert | str) -> Explanation:
        """Explain an alert, given or named by its id: which quantities crossed which thresholds, and when.

        Made from the readings in ``history``; works also after ``close()`` and in ``on_alert``. Raises
        ValueError, with the known ids, for an alert of another monitor.
        """
        from nfi_monitor.report.explain.compose import explain, find_alert

        # Do not judge pending readings here: on_alert may call this while a reading is judged.
        loop = self._loop
        found = find_alert(loop.detector.alerts, alert)
        return explain(
            found, self.history, loop.judge.phases, loop.thresholds, loop.detector.context, self.notes
        )

    # --- the watched run -------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps seen so far."""
        return self._loop.step

    @property
    def closed(self) -> bool:
        """Whether the monitor has detached."""
        return self._loop.closed

    @property
    def optimizer(self) -> Optimizer:
        """The watched optimizer, without wrappers. Raises MonitorError once closed."""
        if self._loop.closed:
            raise MonitorError("A closed monitor does not hold the optimizer.")
        return cast(Optimizer, original_of(self._loop.optimizer))

    @property
    def head(self) -> Head | None:
        """The watched classifier head; None if there is none, and once closed."""
        return None if self._loop.closed else self._loop.head

    @property
    def tau(self) -> float:
        """τ = 1/(1−β2) in optimizer steps."""
        return self._loop.detector.context.tau

    @property
    def run_dir(self) -> str | PathLike[str] | None:
        """The run directory, absolute and with ``~`` expanded; None if no files are written."""
        return self._loop.run_dir

    def watches(self, model: nn.Module, optimizer: Any) -> bool:
        """Return whether this is the watched optimizer, or a model with the watched head."""
        loop = self._loop
        return not loop.closed and (
            original_of(loop.optimizer) is optimizer or loop.watched_module in set(model.modules())
        )

    def note(self, code: str, message: str) -> None:
        """Add a note of your own, once for each ``code``."""
        self._loop.notes.note(code, message, self._loop.step)

    def weight_norms(self) -> dict[str, float]:
        """Return the Euclidean norm of every parameter by its name. Slow: it reads all weights."""
        if self._loop.closed:
            raise MonitorError("weight_norms() reads the model, which a closed monitor does not hold.")
        return parameter_norms(self._loop.model)

    def take_snapshot(self) -> Snapshot:
        """Return the run's state after the last step, with ``stateful``. Raises MonitorError once closed."""
        from nfi_monitor.engine.replays import take_snapshot

        return take_snapshot(self._loop)

    def replay(
        self,
        step_fn: Callable[[int], Any],
        arms: Sequence[Arm] | None = None,
        steps: int | None = None,
        snapshot: Snapshot | None = None,
    ) -> ReplayVerdict:
        """Find the cause of the last slingshot: repeat its steps under each arm, and compare.

        ``step_fn(step)`` does optimizer step number ``step`` as the run did, with the same data, and returns
        the loss.  ``arms``: default :data:`nfi_monitor.replay.ARMS`.  ``steps``: default until max(2 τ, 20)
        steps after the slingshot.  ``snapshot``: default the newest one at least 2 τ before the slingshot,
        or else the oldest.  The verdict goes to ``replays.jsonl``.  The run is restored and may go on.

        Raises MonitorError, with what is needed, if there is no snapshot or no usable ``step_fn``.
        """
        from nfi_monitor.engine.replays import replay_slingshot

        return replay_slingshot(self._loop, step_fn, arms, steps, snapshot)

    # --- pause, resume, close --------------------------------------------------------------------

    def paused(self) -> AbstractContextManager[None]:
        """Ignore forward passes, steps and losses inside a ``with`` block.

        For code that trains the model and restores it afterwards, such as a replay.
        """
        return self._loop.paused.block()

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state in plain types, for the run's checkpoint.

        The state holds the values that the next reading is compared with, but no readings. It holds the
        alerts that fire and the last 1,000. A resumed run reads the same numbers as an uninterrupted run."""
        return checkpoint.state_dict(self._loop)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off.

        Raises ValueError for a state of another kind and for a damaged one, and then changes nothing."""
        checkpoint.load_state_dict(self._loop, state)

    def close(self) -> None:
        """Detach all hooks and finish the reports. A second call does nothing."""
        detach.close(self._loop)

    def __deepcopy__(self, memo: dict[int, Any]) -> Monitor:
        """Return a closed monitor without results: a copy of the model trains in nobody's run."""
        copied = object.__new__(type(self))
        copied._loop = cast(Any, CopiedLoop())
        copied.port = AdapterPort(copied._loop)
        return copied

    def __copy__(self) -> Monitor:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Save a remark in place of the monitor, so that a model that keeps it loads anywhere."""
        return OrderedDict, ([("nfi_monitor", "a monitor is not saved with its model: attach a new one")],)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    if not TYPE_CHECKING:  # else every misspelt attribute would pass a type checker

        def __getattr__(self, name: str) -> Any:
            if name not in MOVED_TO_PORT:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            new = f"port.{MOVED_TO_PORT[name]}"
            warnings.warn(f"monitor.{name} is now monitor.{new}.", DeprecationWarning, stacklevel=2)
            return getattr(self.port, MOVED_TO_PORT[name])
