"""One run under the monitor that a user has, ``Monitor(model, optimizer)``, and every alert that it gives."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from nfi_monitor import Alert, AlertKind, Monitor, Severity
from nfi_monitor.detect.spike import SpikeDetector
from nfi_monitor.replay.snapshots import Snapshot
from nfi_monitor.types import AlertState, Mechanism, Thresholds
from tests.benchmarks.detection.experiments.trials import NoMonitor
from tests.benchmarks.detection.families import Family

STRIDE = 0.5, 10.0
"""A snapshot is kept every so many τ, or steps if that is more, for replays that begin before a slingshot."""


@dataclass
class Heard:
    """What happened in a run, and what the monitor said of it while it went on."""

    tau: float
    losses: list[float] = field(default_factory=list)
    """Of each optimizer step, from step 1."""
    told: list[tuple[int, Alert]] = field(default_factory=list)
    """(optimizer step in which it was said, the alert as it was then)."""
    alerts: list[Alert] = field(default_factory=list)
    """Each in its last state."""
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    """Optimizer step → the state after it."""
    read: int = 0
    """Steps that were read in full."""

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def recorded(self) -> dict[int, float]:
        return dict(enumerate(self.losses, 1))


class _Ears(NoMonitor):
    """Stands where the training expects a monitor: hands everything on to it, and keeps the step's loss."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__()
        self._monitor = monitor

    def observe_loss(self, loss: Tensor) -> None:
        super().observe_loss(loss)
        self._monitor.observe_loss(loss)

    def tap(self, logits: Tensor) -> Tensor:
        return self._monitor.tap(logits)


def is_alarm(alert: Alert) -> bool:
    """Whether an alert, as it is told, looks ahead and asks for an action.

    *Imminent* does, and *at risk*; but rows that absorb may do so for good, so where rounding is named *at
    risk* has to be a *warning*.
    """
    if alert.state is not AlertState.FIRING:
        return False
    if alert.kind is AlertKind.AT_RISK and alert.mechanism is not Mechanism.NUMERICAL_FEATURE_INFLATION:
        return True
    ahead = alert.kind in (AlertKind.AT_RISK, AlertKind.IMMINENT)
    return ahead and alert.severity.rank >= Severity.WARNING.rank


def hear(
    family: Family,
    seed: int,
    *,
    every: int | str = "auto",
    regularly: bool = True,
    also: Collection[int] = (),
) -> Heard:
    """Train under a monitor with defaults.

    Snapshots are taken where an alarm is heard, ``regularly`` between, and ``also`` after these steps.
    """
    training = family.build(seed, family.arm)
    heard = Heard(1.0 / (1.0 - training.optimizer.param_groups[0]["betas"][1]))
    alarmed: set[tuple[str, str]] = set()  # (id, mechanism)
    stride = round(max(STRIDE[0] * heard.tau, STRIDE[1]))
    extras = () if training.scheduler is None else (training.scheduler,)
    detector, limits = SpikeDetector(), Thresholds()

    def hear_one(alert: Alert) -> None:
        heard.told.append((monitor.step, alert))

    with Monitor(
        training.model, training.optimizer, console=False, on_alert=hear_one, every=every, **training.watch
    ) as monitor:
        ears = _Ears(monitor)
        for number in range(1, family.steps + 1):
            already = len(heard.told)
            training.step(number, cast(Monitor, ears))
            heard.losses.append(loss := ears.loss())
            detector.update(number, loss, heard.tau, limits)
            new = {(a.id, str(a.mechanism)) for _, a in heard.told[already:] if is_alarm(a)} - alarmed
            alarmed |= new
            if new or number in also or (regularly and number % stride == 0):
                heard.snapshots[number] = Snapshot.take(
                    number, training.model, training.optimizer, extras, spike=detector.state_dict()
                )
    heard.alerts = monitor.alerts
    heard.read = monitor.summary()["overhead"]["measured_steps"]
    _add_decays(heard, monitor)
    return heard


def _add_decays(heard: Heard, monitor: Monitor) -> None:
    """Afterwards: asking the history for it during the run would judge losses earlier than a user's run."""
    if "second_moment_decay" not in monitor.history:
        return
    read_at, decays = monitor.history["second_moment_decay"]
    for step, snapshot in heard.snapshots.items():
        known = decays[np.asarray(read_at) <= step]
        if len(known) and math.isfinite(decay := float(known[-1])):
            heard.snapshots[step] = replace(snapshot, second_moment_decay=decay)


def one_thread() -> None:
    torch.set_num_threads(1)  # at this size a second thread costs more than it brings
