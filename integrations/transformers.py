"""Watch a training with the HuggingFace Trainer: ``Trainer(..., callbacks=[NFICallback()])``.

The callback attaches when training begins, after the model was wrapped and the optimizer made.  It detaches
when training ends.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

from nfi_monitor.extras import raise_missing
from nfi_monitor.monitor import Monitor
from nfi_monitor.report.json_values import from_strict_json, strict_json
from nfi_monitor.report.loggers import AlertLog, notifiers
from nfi_monitor.types import Alert, Change

from .attach import Attachment, caller_of, watch_backward, watch_training_step

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise_missing(
        error,
        ("transformers", "accelerate"),
        'The HuggingFace adapter needs transformers and accelerate: pip install "nfi-monitor[transformers]"',
    )


class NFICallback(TrainerCallback, ExportableState):
    """Watch a ``Trainer``'s runs for slingshots.

    Args:
        save_on: kinds of alert that save a checkpoint at once, such as "imminent".
        stop_on: kinds of alert that stop the training, such as "slingshot".
        remedy: ``remedy(alert, context)``, called after the step at which an alert begins
            (:class:`nfi_monitor.integrations.attach.TrainerContext`). It may change the training; no other
            part of this callback does.
        run_dir: default ``<output_dir>/nfi``, or ``nfi-2`` … if that holds an earlier run; a resumed run
            goes on in its own directory. None: write no files.
        options: as for :class:`nfi_monitor.Monitor` (head, console, on_alert, probe, thresholds, every …).

    Alerts also go to ``trainer.state.log_history`` (key ``nfi_alert``) and, where ``report_to`` names them,
    to wandb and trackio. ``callback.monitor`` is the monitor. Checkpoints hold its state, and a resumed run
    goes on with its alerts.

    Raises TypeError or ValueError for wrong options when made, and as ``Monitor`` when training begins.
    """

    _made: ClassVar[weakref.WeakValueDictionary[int, NFICallback]] = weakref.WeakValueDictionary()

    def __new__(cls, *, restored: bool = False, **options: Any) -> NFICallback:
        # With restore_callback_states_from_checkpoint=True the Trainer replaces callbacks by new ones, made
        # from JSON.  A remedy, an on_alert or the user's reference to the monitor would be lost.  So the
        # existing callback is returned instead (of several, the newest one that is not training).
        if restored:
            idle = [made for made in cls._made.values() if not made._training()]
            if idle:
                return idle[-1]
        made: NFICallback = super().__new__(cls)
        return made

    def __init__(self, *, restored: bool = False, **options: Any) -> None:
        if restored and self in self._made.values():
            return
        self._attachment = Attachment(**options)
        self._run: weakref.ref[Any] | None = None  # the state of the training that was attached to last
        self._made[max(self._made, default=0) + 1] = self

    @property
    def monitor(self) -> Monitor | None:
        """The monitor of this run, or of the last one; None before the first."""
        return self._attachment.monitor

    def _training(self) -> bool:
        return self.monitor is not None and not self.monitor.closed

    def state(self) -> dict[str, Any]:
        """Return the state for the Trainer's checkpoint, which is read again when training begins."""
        saved: dict[str, Any] = {}
        with self._attachment.guarded("state"):
            saved = strict_json(self._attachment.state())  # programs that know no NaN read it
        return {"args": {"restored": True}, "attributes": {}, "nfi_monitor": saved}

    def _first_of(self, state: Any) -> NFICallback | None:
        """Return the callback that has attached to this training already, or None."""
        for made in self._made.values():
            if made._training() and made._run is not None and made._run() is state:
                return made
        return None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        first = self._first_of(state)
        if first is not None and first.monitor is not None:
            self._attachment.monitor = first.monitor
            first.monitor.note("second_callback", _SECOND)
            return
        self._run = weakref.ref(state)
        saved = state.stateful_callbacks.get(type(self).__name__)
        # A checkpoint from before this callback was added lacks this key, and the next save would need it.
        state.stateful_callbacks[type(self).__name__] = self.state()
        saved = saved[-1] if isinstance(saved, list) and saved else saved

        def log(alert: Alert, change: Change) -> None:
            entry = {"nfi_alert": alert.to_json(), "nfi_change": change.value, "step": state.global_step}
            last = len(state.log_history)
            if last and "train_runtime" in state.log_history[-1]:
                last -= 1  # people read the last entry for the run's totals
            state.log_history.insert(last, entry)

        monitor = self._attachment.open(
            kwargs["model"],
            kwargs["optimizer"],
            directory=f"{args.output_dir}/nfi",
            schedulers=[kwargs["lr_scheduler"]],
            scaler=getattr(kwargs["optimizer"], "scaler", None),
            sinks=[AlertLog(log), *notifiers(args.report_to)],
            state=_resumed(saved) if state.global_step else None,
            native={"args": args, "state": state, "control": control},
        )
        shared = getattr(args, "average_tokens_across_devices", False)  # SetFit's arguments have none
        monitor.observe_outputs(scale=args.world_size if shared else 1)
        monitor.port.explain_note("no_loss", _NO_LOSS)
        with monitor.port.guarded("loss"):
            trainer = caller_of(self)
            monitor.port.recompute_rows(temperature=getattr(trainer, "temperature", None) or 1.0)
            accelerator = getattr(trainer, "accelerator", None)  # SetFit's trainer has none
            if accelerator is not None:  # it divides a loss by the micro-batches, or by the step's items
                watch_backward(accelerator, monitor, shares=True)
            if hasattr(trainer, "training_step"):
                watch_training_step(trainer, monitor)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self._attachment.guarded():
            if self.monitor is not None:
                self.monitor.port.begin_step()
                if self.monitor.step == 0:
                    self.monitor.port.wrapped_by(getattr(caller_of(self), "model_wrapped", kwargs["model"]))

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self._attachment.guarded():
            if self.monitor is not None:
                self.monitor.port.end_micro_batch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self._attachment.guarded():
            due = self._attachment.act()
            control.should_save |= due.save
            control.should_training_stop |= due.stop

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self._attachment.guarded("close"):
            self._attachment.close()


def _resumed(saved: Any) -> Any:
    """Return the attachment's state in what :meth:`NFICallback.state` has saved; None without one."""
    try:
        return from_strict_json(saved.get("nfi_monitor")) if isinstance(saved, dict) else None
    except RecursionError:
        return {"monitor": {"damaged": True}}  # which is refused, with a note


_SECOND = (
    "The Trainer has more than one NFICallback. The first one watches this training. The options of the "
    "others (save_on, stop_on, remedy, on_alert, run_dir) have no effect. Pass one NFICallback with all "
    "options."
)

_NO_LOSS = (
    "No loss is observed: this Trainer gives none to accelerator.backward(). Causes are watched, but a "
    "slingshot itself cannot be seen. Where your Trainer computes the loss (training_step, or its own loop), "
    "call callback.monitor.observe_loss(loss), callback being the NFICallback, before the optimizer's step."
)
