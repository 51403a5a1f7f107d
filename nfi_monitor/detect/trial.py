"""Try a detector whose state was just restored, before the run relies on it."""

from __future__ import annotations

from typing import Any

from nfi_monitor.detect.spike import FALLEN, QUIET, RISEN
from nfi_monitor.quantities import QUANTITIES
from nfi_monitor.types import Reading

_LOSSES = (0.5, 0.25, 5.0, 50.0, 0.5)
"""An ordinary loss, a smaller one, and a rise that may become a slingshot."""


def try_out(detector: Any) -> None:
    """Let a :class:`~nfi_monitor.detect.detector.Detector` judge a few made-up readings, and use it up.

    Numbers of the right types may still be impossible together: lists of different lengths, or an average
    whose exponential is too large.  Raises whatever the detector raises, and ValueError for an unknown state.
    """
    spike, limits = detector.spike, detector.limits
    if spike.state not in (QUIET, RISEN, FALLEN):
        raise ValueError(f"spike.state: {spike.state!r} is none of {QUIET!r}, {RISEN!r}, {FALLEN!r}")
    for ahead, loss in enumerate(_LOSSES, start=1):
        step = max(detector.signals.last_step, detector.loss_watch.step, 0) + 1
        _ask(detector)
        detector.is_unusual(step, loss)
        detector.update_rates(step, [1e-3])
        detector.absorb_ordinary_loss(step, loss)
        values = {"loss": loss}
        if ahead != 2:  # between full readings only the loss is known
            values |= {name: _ordinary(*quantity.within) for name, quantity in QUANTITIES.items()}
            values |= {"loss": loss, "row_match": 1.0}
        judgement = detector.update(Reading(step, values))
        for _, error in judgement.failed:
            raise error
        spike.usual_below(limits, 1)
    _ask(detector)


def _ask(detector: Any) -> None:
    """Ask what the engine asks between two steps."""
    _ = detector.attention, detector.only_loss_unusual, detector.at_risk
    detector.spike.usual_below(detector.limits)


def _ordinary(low: float, high: float) -> float:
    """Return a number within the range of a quantity, not at its ends."""
    return min(max(0.25, low), high)
