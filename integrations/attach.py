"""Attach a monitor to a training framework; each adapter only translates the framework's events.

A framework's callback lives longer than its runs.  It is made before the model is wrapped, started again
after an out-of-memory error, and resumed in another process.  An :class:`Attachment` keeps the user's options
all the time, and one open :class:`Monitor` while a run trains.

A skeleton of an adapter (``lightning.py`` is a good example)::

    class Callback:
        def __init__(self, **options):               # wrong options raise an error here
            self._attachment = Attachment(**options)

        def on_fit_start(self, trainer):             # not guarded: the user must see if no head is found
            monitor = self._attachment.open(trainer.model, trainer.optimizer, directory=..., state=...)
            monitor.observe_outputs()                # if the model returns its loss; if not:

        def before_backward(self, trainer, loss):    # before optimizer.step(): later is the next step's loss
            with self._attachment.guarded():
                self.monitor.observe_loss(loss)

        def after_optimizer_step(self, trainer):     # act() applies the remedies
            with self._attachment.guarded():
                due = self._attachment.act()         # the framework handles due.stop and due.save

        def on_checkpoint(self):
            return self._attachment.state()          # plain types; pass them later as open(state=...)

        def on_fit_end(self, trainer):               # also if the fit raises an error
            with self._attachment.guarded("close"):
                self._attachment.close()

:meth:`Attachment.open` closes a monitor that an earlier, interrupted run of the same model left open.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nfi_monitor.alert_handler import handler_of
from nfi_monitor.caller import called_as
from nfi_monitor.deprecation import renamed_keyword
from nfi_monitor.monitor import Monitor
from nfi_monitor.registry import open_monitors
from nfi_monitor.report.sink import Sink
from nfi_monitor.types import Alert, AlertKind, AlertState

_ATTACHED: weakref.WeakSet[Monitor] = weakref.WeakSet()
Kinds = AlertKind | str | Iterable[AlertKind | str] | None


@dataclass(frozen=True)
class TrainerContext:
    """The objects of the training framework that a remedy may change."""

    monitor: Monitor
    model: nn.Module
    optimizer: Optimizer
    """The watched optimizer, without the framework's wrapper."""
    schedulers: tuple[Any, ...]
    native: Mapping[str, Any]
    """The framework's own objects: args, state, control (transformers); trainer, pl_module (Lightning)."""


Remedy = Callable[[Alert, TrainerContext], object]


@dataclass(frozen=True)
class Due:
    """The actions for the framework, because of alerts since the last ``Attachment.act()``."""

    save: bool
    stop: bool


class Attachment:
    """Open the monitors of a callback, one at a time, and act on their alerts.

    Args:
        save_on, stop_on: kinds of alert ("imminent", ``AlertKind.SLINGSHOT``, or several). After the
        optimizer
            step at which such an alert begins, the framework saves a checkpoint, or stops.
        remedy: called as ``remedy(alert, context)`` after the step at which an alert of any kind begins.
            Nothing else here changes the training. If several processes are not read together
            (``monitor.port.may_act()``), it is not called, and nothing is saved or stopped.
        call: how the user passes an option to the adapter, for messages: ``NFICallback({})``.
        on_alert, run_dir and options: as for :class:`Monitor`; ``run_dir="auto"`` is the adapter's choice.

    Raises:
        TypeError, ValueError: for an unknown option, an unknown kind or a remedy that cannot be called; at
            once, not when the training begins.
    """

    @renamed_keyword("extras", "stateful")
    def __init__(
        self,
        *,
        save_on: Kinds = None,
        stop_on: Kinds = None,
        remedy: Remedy | None = None,
        on_alert: Callable[[Alert], None] | None = None,
        run_dir: str | os.PathLike[str] | None = "auto",
        call: str = "NFICallback({})",
        **options: Any,
    ) -> None:
        inspect.signature(Monitor).bind(None, None, **options)
        if remedy is not None and not callable(remedy):
            raise TypeError(
                f"remedy must be callable as remedy(alert, context), got {type(remedy).__name__}."
            )
        self._save_on, self._stop_on = _kinds("save_on", save_on), _kinds("stop_on", stop_on)
        self._remedy, self._on_alert, self._handler = remedy, on_alert, handler_of(on_alert)
        self._run_dir = run_dir
        self._call = call
        self._options = options
        self._seen: set[str] = set()
        self._begun: list[Alert] = []
        self._context: TrainerContext | None = None  # while a run trains
        self.monitor: Monitor | None = None
        """The monitor of this run, or of the last one; None before the first."""

    def open(
        self,
        model: Any,
        optimizer: Any,
        *,
        directory: str | os.PathLike[str],
        schedulers: Sequence[Any] = (),
        scaler: Any = None,
        sinks: Sequence[Sink] = (),
        state: Mapping[str, Any] | None = None,
        native: Mapping[str, Any] | None = None,
    ) -> Monitor:
        """Attach to a run that is about to train. ``state`` (of :meth:`state`) continues an earlier run.

        ``model``: a module, or an object that trains one (``SetFitModel``).  ``directory``: the run directory
        for "auto". ``native``: for the remedy's context.  First closes a
        monitor that an interrupted run has left open on the same model.  Raises as :class:`Monitor`.
        """
        self.close()
        model = _module_of(model)
        for left in open_monitors(model, optimizer):
            if left in _ATTACHED:
                left.close()
        state = state or {}
        run_dir = self._run_dir
        if run_dir == "auto":
            earlier = state.get("run_dir")
            known = isinstance(earlier, str) and Path(earlier).is_dir()
            run_dir = earlier if known else free_directory(directory)
        options = dict(self._options)
        found = [one for one in (*schedulers, scaler) if one is not None]
        options["stateful"] = [*options.get("stateful", ()), *found]
        options["sinks"] = [*options.get("sinks", ()), *sinks]
        with called_as(self._call):
            monitor = Monitor(model, optimizer, run_dir=run_dir, on_alert=self._note_alert, **options)
        if self._handler is not None:
            try:
                self._handler.attach(monitor)
            except TypeError as error:  # not for this optimizer
                monitor.note("no_autopilot", f"{type(self._handler).__name__} is off: {error}")
        self.monitor = monitor
        self._context = TrainerContext(monitor, model, monitor.optimizer, tuple(schedulers), native or {})
        monitor.port.at_close(self._release)
        _ATTACHED.add(monitor)
        if state.get("monitor"):
            with monitor.port.guarded("resume"):
                self.resume(state)
        self._seen = {alert.id for alert in monitor.alerts}
        self._begun.clear()
        return monitor

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue in the open monitor from a :meth:`state`. Raises for a state of another kind."""
        if self.monitor is not None:
            self.monitor.load_state_dict(state["monitor"])
        if self._handler is not None and state.get("on_alert"):
            self._handler.load_state_dict(state["on_alert"])

    def guarded(self, part: str = "adapter") -> AbstractContextManager[None]:
        """Run a block that must not stop the training: an error in it is reported once."""
        return nullcontext() if self.monitor is None else self.monitor.port.guarded(part)

    def state(self) -> dict[str, Any]:
        """Return the state with which :meth:`open` continues this run, in types that JSON can hold."""
        monitor = self.monitor
        if monitor is None or monitor.closed:
            return {}
        state = {
            "monitor": monitor.state_dict(),
            "run_dir": None if monitor.run_dir is None else os.fspath(monitor.run_dir),
        }
        if self._handler is not None:
            state["on_alert"] = self._handler.state_dict()
        return state

    def act(self) -> Due:
        """Apply the remedies; return the actions for the framework. Call it after each optimizer step."""
        context, begun = self._context, self._begun
        if context is None:
            return Due(False, False)
        asked = self._handler is not None and self._handler.should_stop
        if not begun:
            return Due(False, asked)
        self._begun = []
        if self._remedy is not None:
            with context.monitor.port.guarded("remedy"):
                for alert in begun:
                    self._remedy(alert, context)
        kinds = {alert.kind for alert in begun}
        return Due(bool(kinds & self._save_on), asked or bool(kinds & self._stop_on))

    def close(self) -> None:
        """Detach. The monitor is kept for its history; the run's model and optimizer are released."""
        if self.monitor is not None:
            self.monitor.close()

    def _release(self) -> None:
        """Release the run's objects when the monitor closes, which keeps this object by ``on_alert``."""
        self._context = None

    def _note_alert(self, alert: Alert) -> None:
        if alert.state is AlertState.FIRING and alert.id not in self._seen:
            self._seen.add(alert.id)
            # Check may_act() now: all ranks act on an alert that began while they were read together.
            context, wanted = self._context, alert.kind in self._save_on | self._stop_on
            if (
                context is not None
                and (self._remedy is not None or wanted)
                and context.monitor.port.may_act()
            ):
                self._begun.append(alert)
        if self._on_alert is not None:
            self._on_alert(alert)


def watch_backward(
    accelerator: Any, monitor: Monitor, *, shares: bool = False, several_models: bool = False
) -> None:
    """Let the monitor see each loss given to ``accelerator.backward``, until the monitor closes.

    Args:
        shares: the losses of a step's micro-batches are added; else their mean is taken.
        several_models: the accelerator may train other models, too: take only losses of the watched one.
    """

    def backward(here: Monitor, original: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
        block: AbstractContextManager[None] = nullcontext()
        with here.port.guarded("loss"):
            if not several_models or here.port.trained_by(loss):
                block = here.port.backward_of(loss, shares=shares)
        with block:
            return original(loss, *args, **kwargs)

    _wrap(accelerator, "backward", backward, monitor)


def watch_training_step(trainer: Any, monitor: Monitor) -> None:
    """Let the monitor see the loss that ``trainer.training_step`` returns, until the monitor closes.

    A training step of the user's own may call ``loss.backward()`` itself, on another loss than the model's.
    """

    def training_step(here: Monitor, original: Any, *args: Any, **kwargs: Any) -> Any:
        with here.port.micro_batch(shares=True) as returned:
            loss = original(*args, **kwargs)
            returned.append(loss)
        return loss

    _wrap(trainer, "training_step", training_step, monitor)


def _wrap(owner: Any, name: str, around: Callable[..., Any], monitor: Monitor) -> None:
    """Replace a method of one object by ``around(monitor, method, ...)`` until the monitor closes."""
    original, replaced = getattr(owner, name), vars(owner).get(name)
    watching = weakref.ref(monitor)  # a monitor that is never closed must not live as long as the owner

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        here = watching()
        if here is None or here.closed:
            return original(*args, **kwargs)
        return around(here, original, *args, **kwargs)

    def restore() -> None:
        if vars(owner).get(name) is not wrapped:  # somebody has wrapped it again
            return
        if replaced is None:
            delattr(owner, name)
        else:
            setattr(owner, name, replaced)

    setattr(owner, name, wrapped)
    monitor.port.at_close(restore)


def caller_of(callback: object) -> Any:
    """Return the HuggingFace Trainer that is calling ``callback``, from the call stack, or None.

    A Trainer gives its callbacks everything but itself.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if callback in getattr(getattr(candidate, "callback_handler", None), "callbacks", ()):
            return candidate
        frame = frame.f_back
    return None


def _module_of(model: Any) -> Any:
    """Return the module that a framework's own model class trains; anything else as it is."""
    inner = () if isinstance(model, nn.Module) else ("model_body", "module", "model")
    found = (getattr(model, name, None) for name in inner)
    return next((one for one in found if isinstance(one, nn.Module)), model)


def free_directory(wanted: str | os.PathLike[str]) -> Path:
    """Return ``wanted``, or ``wanted-2``, ``wanted-3`` … if that holds an earlier run."""
    path, number = Path(wanted), 2
    while path.exists():
        path = Path(f"{os.fspath(wanted)}-{number}")
        number += 1
    return path


def _kinds(option: str, kinds: Kinds) -> frozenset[AlertKind]:
    given = () if kinds is None else (kinds,) if isinstance(kinds, str) else tuple(kinds)
    try:
        return frozenset(AlertKind(kind) for kind in given)
    except ValueError as unknown:
        raise ValueError(
            f"{option}={kinds!r}: use any of {', '.join(repr(kind.value) for kind in AlertKind)}."
        ) from unknown
