"""How many of the next steps are read: few of a healthy run, every step before *imminent*."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from nfi_monitor.detect.attention import Attention
from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.types import AlertKind, Mechanism, Reading
from tests.detect.series import numeric_slingshot, oscillation
from tests.detect.test_detector import only
from tests.detect.test_movement import BEGINS, TAU, absorbing

NUMERIC = RunContext(beta2=0.95)


@pytest.mark.parametrize(
    ("series", "quiet_until"),
    [(lambda: numeric_slingshot(100, 400), 100), (oscillation, 388)],
    ids=["numeric", "oscillation"],
)
def test_every_step_is_read_before_imminent_begins_and_few_while_the_run_is_healthy(
    series: Any, quiet_until: int
) -> None:
    """Rows that absorb may do so for good, so *at risk* alone begins at the usual readings."""
    detector, attention = Detector(None, NUMERIC), {}
    for reading in series():
        detector.update(reading)
        attention[reading.step] = detector.attention
    imminent = only(detector, AlertKind.IMMINENT)
    assert {attention[step] for step in range(1, quiet_until)} == {Attention.RARELY}
    assert {attention[step] for step in (imminent.first_step - 2, imminent.first_step - 1)} == {
        Attention.ALWAYS
    }


def test_attention_rises_as_the_updates_grow() -> None:
    """Absorption begins some 17 τ before the slingshot: the steps after its first alert need not be read."""
    detector = Detector(None, NUMERIC)
    attention: list[Attention] = []
    for reading in numeric_slingshot(100, 400):
        detector.update(reading)
        attention.append(detector.attention)
        if detector.attention is Attention.ALWAYS:
            break
    assert attention[50] is Attention.RARELY, "the healthy steps"
    order = [Attention.SELDOM, Attention.SOMETIMES, Attention.SOON, Attention.ALWAYS]
    first = next(alert for alert in detector.alerts if alert.kind is AlertKind.AT_RISK).first_step
    last = {item: max(n for n, found in enumerate(attention) if found is item) for item in order}
    assert first < last[Attention.SELDOM] < last[Attention.SOON] < last[Attention.ALWAYS]


def test_noise_in_rms_t_raises_attention_only_under_weight_decay() -> None:
    """Plain Adam on minibatches: an RMS_t around 1.3 after the second moment has halved is ordinary there."""
    for decay, expected in ((False, Attention.RARELY), (True, Attention.ALWAYS)):
        detector = Detector(None, RunContext(beta2=0.999, decoupled_decay=decay))
        for step in range(1, 600):
            root = 1.0 if step < 300 else 0.4
            rms_t = 1.3 if step % 20 == 19 else 0.9
            detector.update(
                Reading(step, {"rms_t_max": rms_t, "head_sqrt_exp_avg_sq_mean": root, "weight_norm": 1.0})
            )
        assert detector.attention is expected


# --- a state in which nothing moves --------------------------------------------------------------------


def attention(delta: Callable[[int], float], steps: int) -> list[Attention]:
    """Return the attention after each step."""
    detector, found = Detector(None, NUMERIC), []
    for reading in absorbing(delta, steps):
        detector.update(reading)
        found.append(detector.attention)
    return found


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        (0.01, Attention.SELDOM),
        (0.18, Attention.SOMETIMES),  # *imminent* begins at 0.6 nat: 1.2 nats of growth are left
        (0.35, Attention.SOON),  # 0.54
        (0.5, Attention.ALWAYS),  # 0.18
    ],
)
def test_a_run_that_absorbs_is_read_the_more_rarely_the_further_it_is_from_imminent(
    delta: float, expected: Attention
) -> None:
    found = attention(lambda step: delta, 1000)
    assert set(found[: BEGINS - 1]) == {Attention.RARELY}, "the healthy steps"
    assert set(found[BEGINS + 2 * TAU :]) == {expected}


@pytest.mark.parametrize(
    ("match", "growth", "hidden"), [(0.1, 5e-3, True), (1.0, 5e-3, False), (0.1, 0, False)]
)
def test_where_the_mean_grows_between_minibatches_the_layers_below_may_move_unseen(
    match: float, growth: float, hidden: bool
) -> None:
    """Their movement is not known there: the run is read every few steps, and a leap may be theirs."""
    detector = Detector(None, NUMERIC)
    for step in range(1, 301):
        values = {
            "zero_sum_violation": 0.5,
            "unexplained_violation_fraction": 0.0,
            "feature_mean_norm": math.exp(growth * step),
            "feature_displacement": 0.01,
            "logit_displacement": 0.01,
            "row_match": match,
            "rms_t_max": 0.2,
            "loss": 1e-7,
        }
        detector.update(Reading(step, values))
    assert detector.attention is (Attention.SOON if hidden else Attention.SELDOM)
    for step in (301, 302, 303):
        detector.update(Reading(step, {**values, "loss": 0.015, "rms_t_max": 4.0}))
    (slingshot,) = (alert for alert in detector.alerts if alert.kind is AlertKind.SLINGSHOT)
    assert (slingshot.mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION) is hidden


def test_a_run_that_moves_again_is_read_more_often_again() -> None:
    moves = BEGINS + 20 * TAU
    found = attention(lambda step: 0.01 if step < moves else 0.08, 1000)
    assert found[moves - 1] is Attention.SELDOM
    assert not any(item.is_calm for item in found[moves + 10 : moves + 5 * TAU])


def test_the_step_after_a_loss_that_is_nan_is_read_also_where_nothing_moves() -> None:
    """The next reading shows whether the weights are finite."""
    detector = Detector(None, NUMERIC)
    for reading in absorbing(lambda step: 0.01, 1000):
        detector.update(reading)
    assert detector.attention is Attention.SELDOM
    detector.update(Reading(1001, {"loss": math.nan}))
    assert detector.attention not in (Attention.SELDOM, Attention.RARELY)
