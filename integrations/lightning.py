"""Watch a training with Lightning: ``Trainer(callbacks=[NFICallback()])``.

The callback attaches when training begins, after a checkpoint is loaded and after the sanity check.  It
detaches when training ends, also by an exception.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nfi_monitor.extras import raise_missing
from nfi_monitor.monitor import Monitor
from nfi_monitor.report.loggers import AlertLog, ScalarLog, notifiers
from nfi_monitor.types import Alert, Change

from .attach import Attachment

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise_missing(
        error, ("lightning",), 'The Lightning adapter needs lightning: pip install "nfi-monitor[lightning]"'
    )


class NFICallback(Callback):
    """Watch a ``Trainer``'s fits for slingshots.

    Args:
        options: ``save_on``, ``stop_on`` and ``remedy`` of
            :class:`nfi_monitor.integrations.attach.Attachment`, and those of :class:`nfi_monitor.Monitor`
            (head, console, on_alert, probe, thresholds, every …). ``run_dir`` is ``nfi`` in the trainer's log
            directory, or ``nfi-2`` … where that holds an earlier run; a resumed fit goes on in its own. None
            writes nothing.

    Of several optimizers the one that trains the head is watched. Scalars go to the trainer's loggers every
    ``log_every_n_steps`` and when the phase changes, alerts to those that take text or notify people.
    ``callback.monitor`` is the monitor. Checkpoints hold its state: a resumed fit goes on with its alerts.

    Raises TypeError or ValueError for wrong options when made, and as ``Monitor`` when training begins.
    """

    def __init__(self, **options: Any) -> None:
        self._attachment = Attachment(**options)
        self._resumed: dict[str, Any] = {}

    @property
    def monitor(self) -> Monitor | None:
        """The monitor of this fit, or of the last one; None before the first."""
        return self._attachment.monitor

    def state_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = {}
        with self._attachment.guarded("state"):
            saved = self._attachment.state()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def log(values: dict[str, float], step: int) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(values, step)

        def log_alert(alert: Alert, change: Change) -> None:
            from nfi_monitor.report.tensorboard.texts import alert_markdown

            for logger in trainer.loggers:
                experiment = getattr(logger, "experiment", None)  # a user's own logger may have none
                if experiment is not None and hasattr(experiment, "add_text"):
                    text = alert_markdown(alert)
                    experiment.add_text(f"nfi/alerts/{alert.id}", text, alert.last_step)

        names = [type(logger).__name__.removesuffix("Logger").lower() for logger in trainer.loggers]
        monitor = self._attachment.open(
            pl_module,
            trainer.optimizers,
            directory=_folder(trainer) / "nfi",
            schedulers=[config.scheduler for config in trainer.lr_scheduler_configs],
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            sinks=[ScalarLog(log, trainer.log_every_n_steps), AlertLog(log_alert), *notifiers(names)],
            state=self._resumed,
            native={"trainer": trainer, "pl_module": pl_module},
        )
        monitor.port.wrapped_by(trainer.model)  # the strategy's: DDP around pl_module
        monitor.port.recompute_rows()
        self._resumed = {}

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        with self._attachment.guarded():
            several = len(trainer.optimizers) > 1  # this loss may train another model than the watched one
            if self.monitor is not None and (not several or self.monitor.port.trained_by(loss)):
                # Lightning has divided it by the number of micro-batches.
                self.monitor.observe_loss(loss.detach() * trainer.accumulate_grad_batches)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        save_to: Path | None = None
        with self._attachment.guarded():
            due = self._attachment.act()
            if due.stop:
                trainer.should_stop = True
            if due.save:
                checkpoints = trainer.checkpoint_callback
                folder = getattr(checkpoints, "dirpath", None) or _folder(trainer) / "checkpoints"
                save_to = Path(folder) / f"nfi-step={trainer.global_step}.ckpt"
        if save_to is not None:  # an error in here is the trainer's: do not hide it
            trainer.save_checkpoint(save_to)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        with self._attachment.guarded("close"):
            self._attachment.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        with self._attachment.guarded("close"):
            self._attachment.close()


def _folder(trainer: Any) -> Path:
    # Read it on all ranks, because log_dir broadcasts. It is None with a logger that keeps no files.
    return Path(trainer.log_dir or trainer.default_root_dir)
