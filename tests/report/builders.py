"""Alerts, readings and runs for the tests of the reports."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from nfi_monitor.history import History
from nfi_monitor.types import (
    Alert,
    AlertKind,
    AlertState,
    Evidence,
    Mechanism,
    Phase,
    Reading,
    Severity,
    Thresholds,
)  # fmt: skip

INFO: dict[str, Any] = {
    "model": "Sequential",
    "parameters": 41_879,
    "head": "head (Linear 128→23)",
    "dtype": "float32",
    "optimizer": {"name": "Adam", "lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "amsgrad": False},
    "tau": 20.0,
    "every": "auto",
    "interval": 5,
    "thresholds": Thresholds().to_json(),
    "steps": 1000,
    "absorbing_classes": [[3.0, 812.0], [17.0, 640.0]],
    "overhead": {"seconds": 1.25, "share": 0.071, "measured_steps": 100},
}

AT_RISK = Alert(
    id="at_risk-1",
    kind=AlertKind.AT_RISK,
    severity=Severity.WARNING,
    state=AlertState.FIRING,
    phase=Phase.INFLATING,
    first_step=535,
    last_step=535,
    mechanism=Mechanism.NUMERICAL_FEATURE_INFLATION,
    confidence=0.86,
    evidence={
        "zero_sum_violation_smoothed": Evidence(0.134, 0.1, 0.03),
        "feature_mean_growth": Evidence(0.0167, 0.01),
        "absorbed_fraction": Evidence(0.63),
        "logit_displacement": Evidence(0.05, 0.3),
    },
    steps_to_spike=(180, 360, 720),
    advice=("Compute the loss in float64.", "Or raise eps."),
    layer="head",
)
IMMINENT = replace(
    AT_RISK,
    id="imminent-1",
    kind=AlertKind.IMMINENT,
    severity=Severity.CRITICAL,
    phase=Phase.IMMINENT,
    first_step=760,
    last_step=760,
    steps_to_spike=(45, 90, 180),
    evidence={"zero_sum_violation_smoothed": Evidence(0.5, 0.1), "logit_displacement": Evidence(0.41, 0.3)},
)
SLINGSHOT = replace(
    AT_RISK,
    id="slingshot-1",
    kind=AlertKind.SLINGSHOT,
    severity=Severity.CRITICAL,
    phase=Phase.SLINGSHOT,
    first_step=895,
    last_step=895,
    steps_to_spike=None,
    evidence={"zero_sum_violation_smoothed": Evidence(0.5, 0.1), "loss": Evidence(2.3, 0.1)},
)


def resolved(alert: Alert, last_step: int) -> Alert:
    return replace(alert, state=AlertState.RESOLVED, last_step=last_step, steps_to_spike=None)


def event(kind: AlertKind, first: int, last: int | None, number: int = 1) -> Alert:
    """An alert from ``first`` to ``last``; None: still firing."""
    base = replace(AT_RISK, kind=kind, id=f"{kind}-{number}", first_step=first, last_step=first)
    return base if last is None else resolved(base, last)


def readings(steps: int = 1000) -> list[tuple[Reading, Phase]]:
    """A run that absorbs, inflates, spikes and recovers; loss exactly 0 on the way."""
    run = []
    for step in range(1, steps + 1):
        part = step / steps
        phase = (
            Phase.HEALTHY if part < 0.4 else Phase.ABSORBING if part < 0.6 else Phase.INFLATING if part < 0.8
            else Phase.IMMINENT if part < 0.9 else Phase.SLINGSHOT if part < 0.92 else Phase.RECOVERING
        )  # fmt: skip
        loss = 2.0 if phase is Phase.SLINGSHOT else 0.0 if 0.6 < part < 0.7 else math.exp(-20 * part)
        values = {
            "loss": loss,
            "zero_sum_violation": max(0.0, part - 0.3),
            "feature_mean_norm": math.exp(4 * part),
            "logit_displacement": 1e-3 * math.exp(7 * part),
        }
        run.append((Reading(step, values), phase))
    return run


def recorded(run: list[tuple[Reading, Phase]]) -> tuple[History, list[tuple[int, Phase]]]:
    """What a monitor keeps of these readings: history and phase changes, beginning with (0, HEALTHY)."""
    history, phases = History(), [(0, Phase.HEALTHY)]
    for reading, phase in run:
        history.append(reading.step, reading.values)
        if phases[-1][1] is not phase:
            phases.append((reading.step, phase))
    return history, phases
