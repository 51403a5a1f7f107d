"""Three published packages that watch a training for loss spikes, through their own classes, where installed.

    pip install trainscope==1.8.1 trainpulse==0.4.0
    pip install --no-deps arc-training==5.2.0.post1

Each is fed what its README feeds it, step by step and in order, with its own default settings:

* trainscope: ``TrainScope.step(loss)`` hands a finite loss to the detector that ``TrainScopeConfig`` names
  (change points by default) and calls every score a spike, also of a falling loss.  The detector is made by
  the package's own factory from its own configuration and fed the same way; what ``TrainScope`` does besides
  is to write files.  A second row keeps the scores above zero alone, and a third is its z score.
* trainpulse: ``Monitor.log("loss", …)`` and ``Monitor.log("grad_norm", …)``; an alarm is an alert that it
  returns: of its loss-spike detector alone, or any of them.  Its isolation forest needs the whole run at once
  and cannot warn; it is left out.
* arc-training: its drift detector gets the loss and the gradient's norm; an alarm is a report that is not
  "none", and in a second row a critical one.

They are imported when asked for and not before: nothing here needs them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.peers import Readings

PINNED = {"trainscope": "1.8.1", "trainpulse": "0.4.0", "arc-training": "5.2.0.post1"}
"""Package → the version whose classes the code below was written for."""
_MODULES = {"arc-training": "arc.signals.trend"}
"""Package → the module to import, where its name is another."""
Sounded = Mapping[str, NDArray[np.int64]]
"""Name of a rule → the optimizer steps at which it sounds, in order."""


@cache
def installed() -> dict[str, str]:
    """Package → its version, of those that can be imported."""
    return {name: version for name, (version, _) in _found().items() if version is not None}


def missing() -> dict[str, str]:
    """Package → why it is not in the table."""
    return {name: reason for name, (version, reason) in _found().items() if version is None}


@cache
def _found() -> dict[str, tuple[str | None, str]]:
    found: dict[str, tuple[str | None, str]] = {}
    for name in PINNED:
        try:
            version = metadata.version(name)
            importlib.import_module(_MODULES.get(name, name))
        except metadata.PackageNotFoundError:
            found[name] = None, "not installed"
        except Exception as error:  # whatever a foreign package raises: the table goes on without it
            found[name] = None, f"installed, but cannot be imported ({type(error).__name__}: {error})"
        else:
            found[name] = version, ""
    return found


def sounded(readings: Readings) -> Sounded:
    """All rules of all packages that are installed, on one run."""
    rules: dict[str, NDArray[np.int64]] = {}
    for name in installed():
        rules |= _ADAPTERS[name](readings)
    return rules


def trainscope(readings: Readings) -> Sounded:
    config = importlib.import_module("trainscope.core.config").TrainScopeConfig
    make = importlib.import_module("trainscope.core.detectors").make_detector
    steps, loss = readings("loss")
    default = _scores(make(config()), loss.tolist())
    z_score = _scores(make(config(detector="z_score")), loss.tolist())
    return {
        "trainscope, change point": steps[np.isfinite(default)],
        "trainscope, change point up": steps[default > 0],
        "trainscope, z score up": steps[z_score > 0],
    }


def _scores(detector: Any, loss: list[float]) -> NDArray[np.float64]:
    """Score at each reading, NaN where there is no spike; as in ``TrainScope.step``."""
    given = [detector.update(value) if math.isfinite(value) else None for value in loss]
    # Of a constant baseline its z score is ±inf: a spike like any other.
    return np.array([math.nan if item is None else max(min(item, 1e300), -1e300) for item in given])


def trainpulse(readings: Readings) -> Sounded:
    monitor = importlib.import_module("trainpulse").Monitor()
    norms = dict(zip(*(column.tolist() for column in readings("gradient_norm")), strict=True))
    spikes: list[int] = []
    anything: list[int] = []
    for step, loss in zip(*(column.tolist() for column in readings("loss")), strict=True):
        alerts = monitor.log("loss", step, loss)
        if step in norms:
            alerts = alerts + monitor.log("grad_norm", step, norms[step])
        if alerts:
            anything.append(step)
        if any(alert.detector == "loss_spike" for alert in alerts):
            spikes.append(step)
    return {
        "trainpulse, loss spike": np.array(spikes, dtype=np.int64),
        "trainpulse, any alert": np.array(anything, dtype=np.int64),
    }


def arc_training(readings: Readings) -> Sounded:
    module = importlib.import_module(_MODULES["arc-training"])
    detector = module.TrendDetector()
    norms = dict(zip(*(column.tolist() for column in readings("gradient_norm")), strict=True))
    drifting: list[int] = []
    critical: list[int] = []
    for step, loss in zip(*(column.tolist() for column in readings("loss")), strict=True):
        severity = detector.update(loss=loss, grad_norm=norms.get(step)).severity
        if severity is not module.DriftSeverity.NONE:
            drifting.append(step)
        if severity is module.DriftSeverity.CRITICAL:
            critical.append(step)
    return {
        "arc-training, drift": np.array(drifting, dtype=np.int64),
        "arc-training, critical drift": np.array(critical, dtype=np.int64),
    }


_ADAPTERS: dict[str, Callable[[Readings], Sounded]] = {
    "trainscope": trainscope,
    "trainpulse": trainpulse,
    "arc-training": arc_training,
}
