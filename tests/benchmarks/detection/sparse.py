"""Replay a recorded run as ``every="auto"`` would have read it.

The recorded readings are fed to the detector at the steps that the cadence asks for, and the loss alone in
between.  What a reading has from the one of the step before is left out where that step was not read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nfi_monitor.detect.detector import Detector
from nfi_monitor.engine.schedule import next_read
from nfi_monitor.types import Alert, Change, Reading
from tests.benchmarks.detection.generate import Run
from tests.benchmarks.detection.replay import readings

BETWEEN_NEIGHBOURS = ("secant_curvature", "gradient_alignment", "feature_displacement")
"""Measured against the step before."""


@dataclass(frozen=True)
class Sparse:
    """What the detector said of a run that is read sparsely."""

    alerts: list[Alert]
    read: list[int]
    """Steps that were read in full."""
    changes: list[tuple[int, Change, Alert]]
    """(step, what happened, the alert as it was then)."""


def replay_sparsely(run: Run, every: int | str = "auto") -> Sparse:
    """The alerts of a live monitor with this cadence and ``overhead_budget=None``, bit for bit: of one
    process on a CPU, where every loss is known at its step."""
    detector = Detector()
    contexts = [*run.contexts[1:], (math.inf, run.contexts[-1][1])]
    following, wanted, context = 0, 1, run.contexts[0][1]
    detector.context = context
    read: list[int] = []
    changes: list[tuple[int, Change, Alert]] = []
    for reading in readings(run):
        while reading.step >= contexts[following][0]:
            context = contexts[following][1]
            following += 1
        values = reading.values
        if reading.step >= wanted:
            if not read or read[-1] != reading.step - 1:
                values = {name: value for name, value in values.items() if name not in BETWEEN_NEIGHBOURS}
            read.append(reading.step)
            detector.context = context  # a monitor looks at the optimizer when it reads
        elif "loss" in values:
            values = {"loss": values["loss"]}
        else:
            continue
        verdict = detector.update(Reading(reading.step, values))
        changes += [(reading.step, change, alert) for change, alert in verdict.changes]
        wanted = next_read(reading.step, every, detector.attention, detector.context.tau)
    return Sparse(detector.alerts, read, changes)
