"""A regression at the edge of stability: its outputs are no logits, so no swing in nats can be measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest

from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.rules import RULES
from nfi_monitor.detect.rules.oscillation import Surging
from nfi_monitor.detect.signals import Signals
from nfi_monitor.detect.situation import RunContext, Situation
from nfi_monitor.detect.smoothing import Hysteresis
from nfi_monitor.detect.spike import SpikeDetector
from nfi_monitor.types import Alert, AlertKind, Mechanism, Reading, Thresholds

REGRESSION = RunContext(beta2=0.999, no_classes=True)
FIRST, LAST, GROWTH, UNIT = 601, 625, 1.35, 0.04
"""First and last step of the oscillation, growth of its gradient in a step, loss at which the run began."""


def regression(
    *,
    match: float = 1.0,
    opposed: float = -1.0,
    curvature: float = 39.5,
    hidden: bool = False,
    rms_t: float = 0.01,
) -> Iterator[Reading]:
    """Yield a loss that falls to 4e-7, and then an oscillation whose gradient grows by GROWTH at each step.

    The loss has a constant part, and one that grows as the square of the gradient.  ``hidden``: the first
    part alone.  ``rms_t``: RMS_t when the oscillation begins.
    """
    for step in range(1, LAST + 1):
        amplitude = GROWTH ** (step - FIRST) if step >= FIRST else 0.0
        floor = UNIT * math.exp(-step / 60) if step < 600 else 4e-7
        values = {
            "loss": floor + (0.0 if hidden else 1e-7 * amplitude**2),
            "gradient_norm": 1e-5 * max(amplitude, 0.5),
            "gradient_alignment": opposed if step >= FIRST else 0.5,
            "secant_curvature": curvature if step >= FIRST else 0.1,
            "rms_t_max": rms_t * max(amplitude, 0.5),
            "feature_displacement": 1e-6 * max(amplitude, 0.5),
            "row_match": match,
        }
        yield Reading(step, values)


def imminent(readings: Iterator[Reading]) -> list[tuple[int, Alert]]:
    """Return (step, alert as it was then) of each *imminent* alert at its beginning."""
    detector = Detector(None, REGRESSION)
    found = []
    for reading in readings:
        known = len(detector.alerts)
        detector.update(reading)
        new = [alert for alert in detector.alerts[known:] if alert.kind is AlertKind.IMMINENT]
        found += [(reading.step, copy.deepcopy(alert)) for alert in new]
    return found


def test_a_growing_oscillation_of_a_regression_is_imminent_steps_before_the_loss_is_high() -> None:
    losses = {reading.step: reading.get("loss") for reading in regression()}
    high = next(step for step in range(FIRST, LAST + 1) if losses[step] > 1e-2 * UNIT)
    ((step, alert),) = imminent(regression())
    assert FIRST < step <= high - 4
    assert alert.mechanism is Mechanism.EDGE_OF_STABILITY
    crossed = {name for name, item in alert.evidence.items() if item.crossed}
    assert {"secant_curvature", "gradient_alignment", "loss"} <= crossed


@pytest.mark.parametrize(
    "changed",
    [
        {"match": 0.1},
        {"opposed": -0.8},
        {"curvature": 30.0},
        {"curvature": 35.0},
        {"hidden": True},
        {"match": math.nan},
    ],
    ids=["other rows", "many directions", "stable", "limits itself", "loss stays", "rows unseen"],
)
def test_it_needs_the_same_rows_one_direction_too_much_curvature_and_a_rising_loss(
    changed: dict[str, float],
) -> None:
    assert imminent(regression(**changed)) == []  # type: ignore[arg-type]


def test_beside_the_limit_it_is_imminent_only_where_the_next_step_is_that_of_a_slingshot() -> None:
    """There most oscillations limit themselves (Damian et al. 2023)."""
    losses = {reading.step: reading.get("loss") for reading in regression()}
    high = next(step for step in range(FIRST, LAST + 1) if losses[step] > 1e-2 * UNIT)
    ((beyond, _),) = imminent(regression())
    ((beside, _),) = imminent(regression(curvature=38.2))
    assert beyond < high - 1 <= beside


def test_its_steps_left_are_those_in_which_the_loss_gets_to_the_level_of_a_slingshot() -> None:
    ((step, alert),) = imminent(regression())
    assert alert.steps_to_spike is not None
    losses = {reading.step: reading.get("loss") for reading in regression()}
    left = next(at for at in range(step, LAST + 1) if losses[at] > 1e-2 * UNIT) - step
    low, _, high = alert.steps_to_spike
    assert low <= left <= high


@pytest.mark.parametrize(("passed", "later"), [(1e-5, True), (1.0, False)])
def test_after_an_alarm_that_passed_the_loss_must_be_higher_than_it_was_then(
    passed: float, later: bool
) -> None:
    """A run that lives at the edge of stability oscillates again and again, by about the same amount."""
    first = imminent(regression())[0][0]
    detector = Detector(None, REGRESSION)
    update = detector.record.update
    update(AlertKind.IMMINENT, ["diverging"], 1, REGRESSION.tau, loss=passed, burst=False)
    update(AlertKind.IMMINENT, [], 2, REGRESSION.tau, loss=0.0, burst=False)
    losses = {}
    for reading in regression():
        detector.update(reading)
        losses[reading.step] = reading.get("loss")
    found = [alert.first_step for alert in detector.alerts if alert.kind is AlertKind.IMMINENT]
    assert bool(found) is later
    assert all(first <= step and losses[step] > passed for step in found)


def damped(peak: float) -> Iterator[Reading]:
    """Yield an oscillation that lowers the curvature as its square, until it ends at the loss ``peak``.

    d ln x = 3 e and d e = −b x², where e is the curvature over the limit − 1 (Damian et al. 2023).  So
    x² + 3 e²/b stays as it is.
    """
    beyond, square = 0.12, 1e-7
    falls = 3.0 * beyond**2 / peak
    for reading in regression():
        if reading.step >= FIRST:
            square *= math.exp(6.0 * beyond)
            beyond -= falls * square
            changed = {"loss": 4e-7 + square, "gradient_norm": square**0.5}
            reading = Reading(
                reading.step, {**reading.values, **changed, "secant_curvature": 38.0 * (1.0 + beyond)}
            )
        yield reading


@pytest.mark.parametrize(("peak", "alarms"), [(1e-4, 0), (1e-3, 0), (1e-2, 1), (1.0, 1)])
def test_an_oscillation_that_is_about_to_end_far_below_a_slingshot_is_not_imminent(
    peak: float, alarms: int
) -> None:
    """The loss of a slingshot is 4e-3 here."""
    assert max(reading.get("loss") for reading in damped(1e-3) if reading.step > 600) < 1.1e-3
    assert len(imminent(damped(peak))) == alarms


def test_the_level_is_just_above_adams_limit() -> None:
    """2(1+β1)/(1−β1) = 38 at β1 = .9 (Cohen et al. 2022)."""
    assert 1.0 < Thresholds().diverging_curvature < 1.1
    assert pytest.approx(38.0) == REGRESSION.stability_limit


SURGE: dict[str, float] = {"opposed": -0.1, "curvature": 5.0, "rms_t": 0.05}
"""Growth in many directions, at low curvature: no oscillation. RMS_t is 8 just before the slingshot."""


def test_a_surge_in_many_directions_is_imminent_before_the_slingshot() -> None:
    detector = Detector(None, REGRESSION)
    for reading in regression(**SURGE):
        detector.update(reading)
    (slingshot,) = (alert for alert in detector.alerts if alert.kind is AlertKind.SLINGSHOT)
    ((step, alert),) = imminent(regression(**SURGE))
    assert FIRST < step < slingshot.first_step
    assert (alert.rule, alert.mechanism) == ("surging", Mechanism.EDGE_OF_STABILITY)
    crossed = {name for name, item in alert.evidence.items() if item.crossed}
    assert {"rms_t_max", "loss"} <= crossed


@pytest.mark.parametrize(
    "changed",
    [{"match": 0.1}, {"match": math.nan}, {"rms_t": 0.01}, {"hidden": True}],
    ids=["other rows", "rows unseen", "ordinary gradient", "loss stays"],
)
def test_a_surge_needs_the_same_rows_a_large_gradient_and_a_rising_loss(changed: dict[str, float]) -> None:
    assert imminent(regression(**{**SURGE, **changed})) == []  # type: ignore[arg-type]


def surge(*, loss: float = 0.08, outside: bool = False, kicking: bool = False) -> Situation:
    """Return a situation in which the next step brings the loss of a slingshot: ten times the average."""
    signals, spike = Signals(), SpikeDetector()
    signals.same_rows, signals.rms_t_peak, signals.gradient_growth = True, 3.0, 0.7
    spike.baseline.restart(math.log(0.01), 0.1)
    switches = {rule.name: Hysteresis() for rule in RULES}
    switches["kicking"].on = kicking
    reading = Reading(100, {"loss": loss})
    now = Situation(Thresholds(), REGRESSION, signals, spike, switches, reading=reading)
    now.raised_from_outside = outside
    return now


def test_a_surge_is_left_to_the_batch_or_the_kick_that_explains_it_and_needs_a_risen_loss() -> None:
    assert Surging().enter(surge()) and Surging().stay(surge())
    assert not Surging().enter(surge(outside=True))
    assert not Surging().enter(surge(kicking=True)) and not Surging().stay(surge(kicking=True))
    assert surge(loss=0.04).steps_to_slingshot <= 1.0
    assert not Surging().enter(surge(loss=0.04)), "the loss is four times its average"
