"""The public class: attaches to a training, offers what was found, detaches.

What runs in the hooks is :class:`~nfi_monitor.engine.loop.StepLoop`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor.alert_handler import handler_of
from nfi_monitor.capture import devices
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.sampling import local
from nfi_monitor.deprecation import renamed_keyword
from nfi_monitor.engine import checkpoint, detach
from nfi_monitor.engine.checks import Options, find_watched
from nfi_monitor.engine.loop import StepLoop
from nfi_monitor.engine.port import MOVED_TO_PORT, AdapterPort
from nfi_monitor.errors import MonitorError
from nfi_monitor.history import History
from nfi_monitor.measure.weight_norm import parameter_norms
from nfi_monitor.open_monitors import open_monitors as open_monitors  # its old place
from nfi_monitor.open_monitors import register
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
    """Watch a training run for slingshots. Attaches at once; detaches on ``close()`` or when ``with`` ends.

    Args:
        model: the module that is trained; it may be wrapped by DDP or torch.compile.
        optimizer: the optimizer whose ``step()`` updates the model; it may be wrapped. Of a list, the monitor
            takes the one that trains the head.
        head: the classifier head, as a module or by its qualified name. None finds it; False says that
            no module is the head, and that rows come from :meth:`tap` alone.
        run_dir: directory for ``run.json``, ``readings.jsonl``, ``alerts.jsonl`` and, where tensorboard is
            installed, event files. None writes nothing.
        console: True prints a line when an alert begins or ends; False or None prints nothing; or a
            ``Console`` to print to.
        on_alert: called with the :class:`Alert` whenever one begins, changes or ends: a function, or an
            :class:`nfi_monitor.AlertHandler`, such as :class:`nfi_monitor.remedies.Autopilot`.
        probe: a fixed batch ``(inputs, targets)`` whose margins are compared between readings. It shows
            displacement that the head alone does not show (a head fed by LayerNorm), for one extra forward
            pass per reading. ``inputs`` is a tensor, a tuple of arguments or a dict of keywords;
            ``targets`` int64, of the logits' shape without the class axis.
        thresholds: the constants of detection.
        every: "auto" reads a healthy run sparsely, and every step once something changes. An int reads the
            first optimizer step and those that it divides.
        overhead_budget: share of the training's own time that healthy steps may cost. To keep to it,
            ``every="auto"`` reads a small model less often, at least once in τ/10 steps. Where that is not
            enough, it reads a quarter of the rows and coordinates from then on. A note says so. At risk it
            reads as often as before. None: what is read depends on τ alone, never on the clock.
        snapshots: while *at risk*, keep the last four states of the run in host memory, one every 2 τ, for
            :meth:`replay`. "auto" does so on a CPU if one takes at most 16 MiB. An int is the bytes that all
            may take together, on any device; False keeps none.
        stateful: what else belongs to a state of the run: schedulers, gradient scalers, samplers, weight
            averages (with ``state_dict``/``load_state_dict``) and ``torch.Generator`` objects.
        sinks: further :class:`nfi_monitor.report.sink.Sink` objects for readings and alerts, on rank 0.
        group: the processes that train this model together, whose rows and shards make one reading. None
            finds them (DDP, FSDP, tensor parallel meshes); a ``ProcessGroup`` or a ``DeviceMesh`` names them;
            False reads and reports this process alone. Attach on each of them: they agree on phase, steps to
            read and alerts, ``on_alert`` is called on each, and the first reports. Where they are not read
            together, adapters and the Autopilot act on no alert (``port.may_act()``).

    Raises:
        HeadNotFoundError: no module, or more than one, could be the head; lists the candidates.
        AlreadyMonitoredError: another open monitor watches the same head.
        TypeError, ValueError: arguments of the wrong kind.

    Training is never changed: every hook returns None, tensors are detached before they are read, no
    random number is drawn.  Training is never stopped: a part that fails is reported once and stays quiet.
    """

    @renamed_keyword("extras", "stateful")
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
        self._loop = StepLoop(self, model, watched, found, options)
        self.port = AdapterPort(self._loop)
        """What adapters of training frameworks and remedies call."""
        register(self, self._loop.watched_module)
        detach.abandon_if_forked(self._loop)
        handler = handler_of(on_alert)
        if handler is not None:
            try:
                handler.attach(self)
            except BaseException:
                self.close()
                raise

    # --- capture ---------------------------------------------------------------------------------

    @torch.compiler.disable  # inside a compiled function one graph break; nothing in here is traced
    def observe_loss(self, loss: Tensor | float) -> None:
        """Tell the monitor the loss of this micro-batch; call it before ``optimizer.step()``.

        Never synchronises: a tensor is kept and read later, with the step's other numbers.
        """
        loop = self._loop
        if loop.closed or loop.paused:
            return
        try:
            if devices.GRAPHS and loop.recorded():
                return
            loop.losses.observed.append(local(loss.detach()) if isinstance(loss, Tensor) else float(loss))
        except Exception as error:
            loop.faults.failed("observe_loss", error)

    def observe_outputs(self, scale: float = 1.0) -> None:
        """Read the loss from what the model returns (``output.loss``, ``output[0]``): no call per step.

        Where the model gets ``num_items_in_batch``, its losses are shares of the step's loss: they are added,
        times ``scale`` (the number of processes, if that counts the items of all of them).
        """
        self._loop.observe_outputs(scale, self.observe_loss)

    @torch.compiler.disable
    def tap(self, logits: Tensor) -> Tensor:
        """Watch exactly this tensor [..., K] instead of the head's output. Returns it unchanged.

        For logits that are no module's output, or are cast, scaled or capped between head and loss. Inside a
        compiled function it costs one graph break, outside none.
        """
        loop = self._loop
        if not loop.closed and not loop.paused:
            try:
                if not (devices.GRAPHS and loop.recorded()):
                    loop.probe.tap(logits)
            except Exception as error:
                loop.faults.failed("rows", error)
        return logits

    # --- what was found --------------------------------------------------------------------------

    @property
    def history(self) -> History:
        """Everything measured so far: ``history["zero_sum_violation"]`` → (steps, values).

        Deferred losses are judged first. Assign a longer one (``History(max_rows=...)``) to thin less."""
        return self._loop.judge.history

    @history.setter
    def history(self, history: History) -> None:
        self._loop.judge.recorded = history

    @property
    def alerts(self) -> list[Alert]:
        """All alerts, oldest first; a firing one is replaced by its newer state as it develops."""
        return list(self._loop.detector.alerts)

    @property
    def phase(self) -> Phase:
        """The phase after the last reading."""
        return self._loop.detector.phase

    @property
    def phases(self) -> list[tuple[int, Phase]]:
        """(step, phase) whenever the phase changes."""
        return self._loop.judge.phases

    @property
    def notes(self) -> list[Note]:
        """What limits what the monitor can see; each is noted once."""
        return list(self._loop.notes.said.values())

    @property
    def replays(self) -> list[ReplayVerdict]:
        """The verdicts of the replays of this run's slingshots, oldest first."""
        return self._loop.replays

    @property
    def snapshots(self) -> list[Snapshot]:
        """States of the run while it was at risk, oldest first; also after ``close()``."""
        return self._loop.recent_snapshots.snapshots

    def summary(self) -> Summary:
        """Return everything so far as one object: rich prints it, ``json.dumps`` writes it."""
        return self._loop.summary()

    def explain(self, alert: Alert | str) -> Explanation:
        """Explain an alert, or the one of this id: what crossed which threshold when, and what was not seen.

        From the readings in ``history``; also after ``close()`` and in ``on_alert``. Raises ValueError,
        with the known ids, for an alert that is not this monitor's.
        """
        from nfi_monitor.report.explain.compose import explain, find_alert

        # No pending reading is judged here: on_alert may call this while one is being judged.
        loop = self._loop
        found = find_alert(loop.detector.alerts, alert)
        return explain(
            found, self.history, loop.judge.phases, loop.thresholds, loop.detector.context, self.notes
        )

    # --- the run as it is ------------------------------------------------------------------------

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
        """The optimizer that is watched, without wrappers. Raises MonitorError once closed."""
        if self._loop.closed:
            raise MonitorError("A closed monitor does not hold the optimizer.")
        return self._loop.optimizer

    @property
    def head(self) -> Head | None:
        """The classifier head that is watched; None where there is none, and once closed."""
        return None if self._loop.closed else self._loop.head

    @property
    def tau(self) -> float:
        """τ = 1/(1−β2) in optimizer steps."""
        return self._loop.detector.context.tau

    @property
    def run_dir(self) -> str | PathLike[str] | None:
        """The run directory as it was given; None where nothing is written."""
        return self._loop.run_dir

    def watches(self, model: nn.Module, optimizer: Any) -> bool:
        """Return whether steps of this optimizer, or of a model that has the watched head, are the run's."""
        loop = self._loop
        return not loop.closed and (
            loop.optimizer is optimizer or loop.watched_module in set(model.modules())
        )

    def note(self, code: str, message: str) -> None:
        """Add a note of your own to the monitor's; once for each ``code``."""
        self._loop.notes.note(code, message, self._loop.step)

    def weight_norms(self) -> dict[str, float]:
        """Return the Euclidean norm of every parameter by its name. Reads all weights: not for every step."""
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
        """Find the last slingshot's cause: repeat it from before its start under each arm, and compare.

        ``step_fn(step)`` does optimizer step number ``step`` as the run did, with the same data, and returns
        the loss.  ``arms``: default :data:`nfi_monitor.replay.ARMS`.  ``steps``: default until max(2 τ, 20)
        steps after the slingshot.  ``snapshot``: default the newest 2 τ before it, or else the oldest.
        The verdict goes to ``replays.jsonl`` and into the report.  The run is not changed and may go on.

        Raises MonitorError, saying what is needed, without a snapshot or a usable ``step_fn``.
        """
        from nfi_monitor.engine.replays import replay_slingshot

        return replay_slingshot(self._loop, step_fn, arms, steps, snapshot)

    # --- the life of a monitor -------------------------------------------------------------------

    def paused(self) -> AbstractContextManager[None]:
        """Ignore forwards, steps and losses while this is open: they are not the run's.

        For code that trains the model and restores it afterwards, such as a replay.
        """
        return self._loop.pause()

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state in plain types, for the run's checkpoint.

        It holds what the next reading is compared with, not the readings: a resumed run reads what the
        uninterrupted one would have."""
        return checkpoint.state_dict(self._loop)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off. Raises ValueError for a state of another kind."""
        checkpoint.load_state_dict(self._loop, state)

    def close(self) -> None:
        """Detach all hooks and finish the reports. A second call does nothing."""
        detach.close(self._loop)

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
