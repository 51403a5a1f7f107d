"""A schedule of the learning rate scales every update, and raises no alarm by that."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.signals import Signals
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.types import AlertKind, Reading, Thresholds

Rate = Callable[[float], float]
HIGHEST = 1e-3
SCHEDULES: dict[str, Rate] = {
    "constant": lambda t: HIGHEST,
    "cosine warm restarts, 10 τ": lambda t: HIGHEST * (1e-3 + 0.5 * (1 + math.cos(math.pi * (t / 10 % 1)))),
    "cosine warm restarts, 2 τ": lambda t: HIGHEST * (1e-3 + 0.5 * (1 + math.cos(math.pi * (t / 2 % 1)))),
    "a tenth from 20 τ on": lambda t: HIGHEST * (1.0 if t < 20 else 0.1),
    "a tenth every 10 τ": lambda t: HIGHEST * 0.1 ** min(t // 10, 3),
    "warm-up and linear decay": lambda t: HIGHEST * max(min(t / 2, (30 - t) / 28), 1e-3),
}
"""Time in τ → learning rate."""
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def reading(step: int, rate: float, per_rate: float) -> Reading:
    """Return a reading of an absorbing run, whose δ is ``per_rate`` nats at the highest learning rate."""
    values = {
        "zero_sum_violation": 0.5,
        "feature_mean_norm": 30.0,
        "logit_displacement": per_rate * rate / HIGHEST,
        "learning_rate": rate,
        "rms_t_max": 0.5,
        "loss": 1e-6,
    }
    return Reading(step, values)


@every_schedule
@pytest.mark.parametrize("tau", [20, 200])
def test_the_rise_of_the_displacement_is_free_of_the_schedule(schedule: Rate, tau: int) -> None:
    """Where δ is proportional to the rate, its rise above its recent minimum is 1 at every step.

    Earlier, the average of δ was divided by the rate, and lagged behind it."""
    signals, lowest = Signals(), 0.02 / HIGHEST
    for step in range(1, 30 * tau):
        signals.update(reading(step, schedule(step / tau), 0.02), tau, Thresholds())
        assert signals.displacement_rise == pytest.approx(1.0)
        assert signals.displacement_per_rate == pytest.approx(lowest)


@every_schedule
@pytest.mark.parametrize(("tau", "moves"), [(20, 0.4), (200, 0.04)])
def test_an_absorbing_run_whose_displacement_follows_the_schedule_is_not_imminent(
    schedule: Rate, tau: int, moves: float
) -> None:
    detector = Detector(None, RunContext(beta2=1 - 1 / tau))
    for step in range(1, 30 * tau):
        detector.update(reading(step, schedule(step / tau), moves))
    assert [alert.kind for alert in detector.alerts] == [AlertKind.AT_RISK]


@every_schedule
def test_a_displacement_that_rises_against_its_schedule_is_imminent(schedule: Rate) -> None:
    """From 15 to 20 τ δ over the rate rises a hundredfold."""
    detector = Detector(None, RunContext(beta2=0.95))
    for step in range(1, 500):
        risen = 100.0 ** min(max(step / 20 - 15, 0.0) / 5, 1.0)
        detector.update(reading(step, schedule(step / 20), 0.02 * risen))
    imminent = [alert for alert in detector.alerts if alert.kind is AlertKind.IMMINENT]
    assert imminent and imminent[0].first_step > 15 * 20


def test_a_schedule_that_raises_the_rate_raises_the_level_by_as_much_and_for_about_tau() -> None:
    """``rate_rise`` is the rate over its average with time constant τ, at least 1."""
    signals, average, tau = Signals(), math.log(1e-4), 20
    for step in range(1, 300):
        rate = 1e-4 if step < 200 else 1e-3
        average += (1 - math.exp(-1 / tau)) * (math.log(rate) - average)
        signals.update(reading(step, rate, 0.02), tau, Thresholds())
        assert signals.rate_rise == pytest.approx(max(rate / math.exp(average), 1.0))
