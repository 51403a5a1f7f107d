"""Feed recorded readings to the detector again: another threshold is scored in seconds, without training."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nfi_monitor.detect.detector import Detector
from nfi_monitor.types import Alert, AlertKind, AlertState, Change, Reading, Thresholds
from tests.benchmarks.detection.generate import Run


@dataclass(frozen=True)
class Replay:
    """What the detector said over a run."""

    alerts: list[Alert]
    """The last state of each, as ``monitor.alerts`` has them."""
    changes: list[tuple[int, Change, Alert]]
    """(step, what happened, the alert as it was then)."""
    forecasts: NDArray[np.float64]
    """Median steps left as said at each optimizer step (index 0 unused); NaN where no number was given."""
    warned: NDArray[np.bool_]
    """Whether *imminent* or *at risk* was firing at each optimizer step."""


def readings(run: Run) -> Iterator[Reading]:
    """The readings of a run, in order. A quantity that was not measured at a step is absent."""
    values: dict[int, dict[str, float]] = {}
    for name, (steps, numbers) in run.columns.items():
        for step, number in zip(steps.tolist(), numbers.tolist(), strict=True):
            values.setdefault(step, {})[name] = number
    for step in sorted(values):
        yield Reading(step, values[step])


def replay(run: Run, thresholds: Thresholds | None = None) -> Replay:
    """The alerts equal the live monitor's, bit for bit, where the thresholds do."""
    detector = Detector(thresholds)
    starts = [step for step, _ in run.contexts]
    changes: list[tuple[int, Change, Alert]] = []
    forecasts = np.full(run.steps + 1, math.nan)
    warned = np.zeros(run.steps + 1, dtype=bool)
    for reading in readings(run):
        detector.context = run.contexts[max(bisect_right(starts, reading.step) - 1, 0)][1]
        verdict = detector.update(reading)
        changes += [(reading.step, change, alert) for change, alert in verdict.changes]
        for alert in detector.alerts[-4:]:  # no more kinds than that can fire at once
            if alert.state is not AlertState.FIRING or alert.kind not in _FORESIGHT:
                continue
            warned[reading.step] = True
            if alert.steps_to_spike is not None:
                # Imminent begins after at risk: where both give a number, the later one stands.
                forecasts[reading.step] = alert.steps_to_spike[1]
    return Replay(detector.alerts, changes, forecasts, warned)


_FORESIGHT = (AlertKind.AT_RISK, AlertKind.IMMINENT)
