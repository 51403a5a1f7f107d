"""Watch a training with Accelerate: ``with watch(accelerator, model, optimizer) as monitor: ...``."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

from nfi_monitor.extras import raise_missing
from nfi_monitor.monitor import Monitor
from nfi_monitor.report.loggers import ScalarLog, notifiers

from .attach import Attachment, watch_backward

try:
    from accelerate import Accelerator
except ImportError as error:
    raise_missing(
        error,
        ("accelerate",),
        'The Accelerate adapter needs accelerate: pip install "nfi-monitor[accelerate]"',
    )

STATE = "nfi_monitor.json"
"""The monitor's file in a directory of ``accelerator.save_state``."""


def watch(accelerator: Accelerator, model: Any, optimizer: Any, **options: Any) -> Monitor:
    """Watch a prepared model and optimizer. Close the monitor after the loop, or use ``with``.

    The loss is the one given to ``accelerator.backward``. In a loop with ``loss.backward()`` it is the loss
    that the model returns, if it is the one that trains; else call ``monitor.observe_loss(loss)``. Scalars go
    to the accelerator's trackers, alerts to those that notify people (wandb, trackio).
    ``accelerator.save_state`` saves the monitor, too, and ``load_state`` goes on with its alerts. A
    checkpoint without them is no error.

    Args:
        options: as for :class:`nfi_monitor.Monitor`. ``run_dir`` is ``nfi`` in the accelerator's project
            directory, or ``nfi-2`` … where that holds an earlier run; without a project directory, or with
            None, nothing is written.

    Raises as ``Monitor``.
    """

    def log(values: dict[str, float], step: int) -> None:
        for tracker in accelerator.trackers:  # looked up late: init_trackers may come after this
            # wandb drops what comes with a smaller step than the last: ours would fight with the loop's own.
            tracker.log({**values, "nfi/step": step}, step=None if tracker.name == "wandb" else step)

    if accelerator.project_dir is None:
        options.setdefault("run_dir", None)
    names = [getattr(kind, "value", getattr(kind, "name", "")) for kind in accelerator.log_with]
    attachment = Attachment(call="watch(accelerator, model, optimizer, {})", **options)
    monitor = attachment.open(
        model,
        optimizer,
        directory=Path(accelerator.project_dir or "") / "nfi",
        scaler=getattr(optimizer, "scaler", None),
        sinks=[ScalarLog(log), *notifiers(names)],
    )
    monitor.observe_outputs()
    monitor.port.recompute_rows()
    watch_backward(accelerator, monitor, several_models=True)

    # Weak: after an out-of-memory error the loop does not reach close(), and the accelerator lives on.
    attached = weakref.ref(attachment)

    # Not register_for_checkpointing: load_state then refuses a checkpoint that was saved without the monitor.
    def save(models: Any, weights: Any, folder: str) -> None:
        here = attached()
        if here is not None and accelerator.is_main_process:
            with here.guarded("save_state"):
                (Path(folder) / STATE).write_text(json.dumps(here.state()), encoding="utf-8")

    def load(models: Any, folder: str) -> None:
        here = attached()
        if here is not None and (Path(folder) / STATE).is_file():
            with here.guarded("load_state"):
                here.resume(json.loads((Path(folder) / STATE).read_text(encoding="utf-8")))

    saving = accelerator.register_save_state_pre_hook(save)
    loading = accelerator.register_load_state_pre_hook(load)
    monitor.port.at_close(saving.remove, loading.remove)
    return monitor
