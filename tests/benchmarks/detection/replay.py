"""Feed recorded readings to the detector again: another threshold is scored in seconds, without training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nfi_monitor.detect.detector import Detector
from nfi_monitor.types import Alert, AlertKind, AlertState, Change, Reading, Thresholds
from tests.benchmarks.detection.generate import TRUTH, Run


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
    decays: NDArray[np.float64]
    """``second_moment_decay`` at each optimizer step; NaN where it is not known."""


def readings(run: Run) -> Iterator[Reading]:
    """The readings of a run, in order. A quantity that was not measured at a step is absent."""
    values: dict[int, dict[str, float]] = {}
    for name, (steps, numbers) in run.columns.items():
        if name == TRUTH:
            continue  # what the labels are made of is not for the detector
        for step, number in zip(steps.tolist(), numbers.tolist(), strict=True):
            values.setdefault(step, {})[name] = number
    for step in sorted(values):
        yield Reading(step, values[step])


def replay(run: Run, thresholds: Thresholds | None = None, stream: Iterable[Reading] | None = None) -> Replay:
    """The alerts equal the live monitor's, bit for bit, where the thresholds do.

    ``stream`` is ``list(readings(run))`` for whoever replays a run more than once.
    """
    detector = Detector(thresholds)
    contexts = [*run.contexts[1:], (math.inf, run.contexts[-1][1])]
    detector.context = run.contexts[0][1]
    following = 0  # which context comes next
    changes: list[tuple[int, Change, Alert]] = []
    forecasts = np.full(run.steps + 1, math.nan)
    warned = np.zeros(run.steps + 1, dtype=bool)
    decays = np.full(run.steps + 1, math.nan)
    firing: dict[str, int] = {}  # id of an alert that looks ahead → its place in detector.alerts
    for reading in readings(run) if stream is None else stream:
        while reading.step >= contexts[following][0]:
            detector.context = contexts[following][1]
            following += 1
        verdict = detector.update(reading)
        decays[reading.step] = verdict.derived.get("second_moment_decay", math.nan)
        for change, alert in verdict.changes:
            changes.append((reading.step, change, alert))
            if change is Change.END:
                firing.pop(alert.id, None)
            elif alert.kind in _FORESIGHT and alert.id not in firing:
                firing[alert.id] = next(
                    place for place, item in enumerate(detector.alerts) if item.id == alert.id
                )
        # Imminent begins after at risk: where both give a number, the later one stands.
        for place in sorted(firing.values()) if len(firing) > 1 else firing.values():
            alert = detector.alerts[place]
            if alert.state is AlertState.FIRING:
                warned[reading.step] = True
                if alert.steps_to_spike is not None:
                    forecasts[reading.step] = alert.steps_to_spike[1]
    return Replay(detector.alerts, changes, forecasts, warned, decays)


_FORESIGHT = (AlertKind.AT_RISK, AlertKind.IMMINENT)
