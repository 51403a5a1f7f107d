"""Test *imminent* alerts without rounding, and where the head's own displacement does not grow."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.types import AlertKind, Mechanism, Reading

ADAM = RunContext(beta2=0.95)
SPIKE = 300


def imminent(readings: Iterator[Reading], context: RunContext) -> list[tuple[int, Mechanism]]:
    detector = Detector(None, context)
    for reading in readings:
        detector.update(reading)
    return [
        (alert.first_step, alert.mechanism) for alert in detector.alerts if alert.kind is AlertKind.IMMINENT
    ]


def oscillation(alignment: float, spike: int = SPIKE, before: float = 1e-4) -> Iterator[Reading]:
    """Yield features that swing 1.6 × further at each of the last 12 steps; the loss rises at the last."""
    for step in range(1, spike + 1):
        left = spike - step
        growth = 1.6 ** max(12 - left, 0)
        yield Reading(
            step,
            {
                "zero_sum_violation": 1e-8,
                "feature_displacement": 0.01 * growth,
                "relative_update": 2e-3,
                "margin_median": 12.0,
                "gradient_alignment": alignment if left <= 12 else 0.7,
                "secant_curvature": 0.3 * growth,
                "rms_t_max": 0.4,
                "loss": before if left else max(0.5, 4 * before),
            },
        )


def test_opposing_gradients_and_growing_swings_are_imminent_before_the_loss_rises() -> None:
    ((step, mechanism),) = imminent(oscillation(-0.9), ADAM)
    assert SPIKE - 6 <= step < SPIKE and mechanism is Mechanism.EDGE_OF_STABILITY


def test_growing_swings_without_opposing_gradients_are_not_imminent() -> None:
    assert imminent(oscillation(0.0), ADAM) == []


def test_an_oscillation_ends_when_gradients_agree_again_though_features_still_move() -> None:
    def readings() -> Iterator[Reading]:
        for reading in oscillation(-0.9):
            if reading.step < SPIKE - 2:
                yield reading
        for step in range(SPIKE - 2, SPIKE + 200):
            yield Reading(step, {**reading.values, "gradient_alignment": 0.5, "loss": 1e-4})

    detector = Detector(None, ADAM)
    for reading in readings():
        detector.update(reading)
    (alert,) = [alert for alert in detector.alerts if alert.kind is AlertKind.IMMINENT]
    assert alert.last_step <= SPIKE + 5


def test_an_oscillation_while_the_loss_first_falls_is_not_imminent() -> None:
    """In their first 3 τ networks may oscillate far above a slingshot's level. Their loss goes on falling."""
    early = round(2.9 * ADAM.tau)
    assert imminent(oscillation(-0.9, early, before=0.5), ADAM) == []
    assert len(imminent(oscillation(-0.9, early, before=0.05), ADAM)) == 1, "a low loss counts earlier"
    assert len(imminent(oscillation(-0.9, SPIKE, before=3.0), ADAM)) == 1, (
        "a language model's loss stays high"
    )


def behind_a_layer_norm(relative_update: float) -> Iterator[Reading]:
    """Yield rows that absorb and growing means; the head hardly moves, the features move more and more."""
    for step in range(1, SPIKE + 1):
        late = max(step - 150, 0)
        yield Reading(
            step,
            {
                "zero_sum_violation": 0.5 if late else 1e-6,
                "zero_sum_violation_weight": 0.5 if late else 1e-6,
                "feature_mean_norm": math.exp(0.005 * late),
                "logit_displacement": 0.01,
                "logit_displacement_rms": 0.003,
                "feature_displacement": 0.003 * math.exp(0.03 * late),
                "relative_update": relative_update,
                "margin_median": 18.0,
                "rms_t_max": 0.9,
                "loss": 1e-7,
            },
        )


def test_behind_a_layer_norm_a_growing_feature_displacement_is_imminent() -> None:
    ((step, mechanism),) = imminent(behind_a_layer_norm(1e-3), ADAM)
    assert 200 < step < SPIKE and mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION


def test_features_that_move_more_than_the_update_can_cause_are_not_imminent() -> None:
    assert imminent(behind_a_layer_norm(1e-6), ADAM) == []


def long_memory(rising: bool) -> Iterator[Reading]:
    """Yield an absorbing and inflating run at β2 = .999; the δ of a single update is too small to matter."""
    for step in range(1, 4001):
        late = max(step - 1000, 0)
        delta = 2e-4 * math.exp(0.0015 * late) if rising else 4e-3
        yield Reading(
            step,
            {
                "zero_sum_violation": 0.5 if late else 1e-6,
                "feature_mean_norm": math.exp(1e-4 * late),
                "logit_displacement": delta,
                "logit_displacement_rms": delta / 3,
                "rms_t_max": 0.1,
                "loss": 1e-7,
            },
        )


def test_with_a_long_tau_updates_add_up_over_a_twentieth_of_tau() -> None:
    ((step, _),) = imminent(long_memory(rising=True), RunContext(beta2=0.999))
    assert 2500 < step < 4000, "δ reaches .15 nat over 50 steps, not in one"


def test_a_run_that_goes_on_learning_with_a_steady_displacement_is_not_imminent() -> None:
    assert imminent(long_memory(rising=False), RunContext(beta2=0.999)) == []


@pytest.mark.parametrize(("rising", "sounds"), [(True, True), (False, False)])
def test_half_the_displacement_is_imminent_only_if_it_has_doubled(rising: bool, sounds: bool) -> None:
    """Soft-capped logits move by a tenth of a nat between minibatches for ever."""

    def readings() -> Iterator[Reading]:
        for step in range(1, 601):
            delta = min(1e-3 * math.exp(0.01 * step), 0.1) if rising else 0.1 * 1.3 ** math.sin(step)
            yield Reading(
                step,
                {
                    "zero_sum_violation": 0.5,
                    "feature_mean_norm": math.exp(2e-3 * step),
                    "logit_displacement": delta,
                    "rms_t_max": 0.1,
                    "loss": 1e-6,
                },
            )

    found = imminent(readings(), ADAM)
    if sounds:
        ((step, mechanism),) = found
        assert 430 < step < 445, "where δ, averaged over 5 steps, is half of .15"
        assert mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION
    else:
        assert found == []


def quiet_for_ever(steps: int) -> Iterator[Reading]:
    """Yield a gradient that is 100 times as large at first, and then only noise; weight decay is on."""
    for step in range(1, steps + 1):
        root = 1.0 if step < 100 else 0.01 * 1.2 ** math.sin(step / 300)
        yield Reading(
            step,
            {
                "rms_t_max": 0.35 if step % 400 < 200 else 1.1,
                "head_sqrt_exp_avg_sq_mean": root,
                "weight_norm": math.exp(-1e-5 * step),
                "loss": 1.1,
            },
        )


def test_an_old_large_gradient_does_not_count_as_forgotten_for_ever() -> None:
    detector = Detector(None, RunContext(beta2=0.95, decoupled_decay=True))
    for reading in quiet_for_ever(40_000):
        detector.update(reading)
    begins = [alert.first_step for alert in detector.alerts if alert.kind is AlertKind.AT_RISK]
    assert begins and max(begins) < 100 + 4.7 * 100 * 20, "100 τ for each factor e"


@pytest.mark.parametrize(("moved", "sounds"), [(0.2, True), (0.01, False)])
@pytest.mark.parametrize("decayed", [True, False])
def test_a_kick_needs_weight_decay_a_decayed_second_moment_and_moving_features(
    moved: float, sounds: bool, decayed: bool
) -> None:
    def readings() -> Iterator[Reading]:
        root = 1.0
        for step in range(1, 801):
            kicked = step >= 797
            root *= 1.0 if step < 300 else 0.995
            yield Reading(
                step,
                {
                    "rms_t_max": 3.0 if kicked else 0.05,
                    "head_sqrt_exp_avg_sq_mean": root,
                    "weight_norm": math.exp(-1e-4 * step),
                    "feature_displacement": moved if kicked else 0.003,
                    "secant_curvature": 5.0,
                    "loss": 1e-5,
                },
            )

    found = imminent(readings(), RunContext(beta2=0.99, decoupled_decay=decayed, no_classes=True))
    if sounds and decayed:
        assert found == [(797, Mechanism.SECOND_MOMENT)]
    else:
        assert found == []


@pytest.mark.parametrize(("turn", "sounds"), [(-0.9, True), (0.0, False)])
def test_under_strong_weight_decay_a_kick_is_a_gradient_that_turns_at_high_curvature(
    turn: float, sounds: bool
) -> None:
    """The gradient comes back before the second moment has decayed."""

    def readings() -> Iterator[Reading]:
        for step in range(1, 501):
            kicked = step >= 497
            yield Reading(
                step,
                {
                    "rms_t_max": 3.0 if kicked else 0.2,
                    "head_sqrt_exp_avg_sq_mean": 1.0,
                    "feature_displacement": 0.2 if kicked else 0.003,
                    "secant_curvature": 30.0 if kicked else 2.0,
                    "gradient_alignment": turn if kicked else 0.0,
                    "loss": 1e-5,
                },
            )

    found = imminent(readings(), RunContext(beta2=0.999, decoupled_decay=True, no_classes=True))
    assert [step for step, _ in found] == ([497] if sounds else [])
