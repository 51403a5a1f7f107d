"""Test *imminent* alerts without rounding, and where the head's own displacement does not grow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest

from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.types import AlertKind, Mechanism, Reading, Thresholds

ADAM = RunContext(beta2=0.95)
SPIKE = 300


def imminent(readings: Iterator[Reading], context: RunContext) -> list[tuple[int, Mechanism]]:
    detector = Detector(None, context)
    for reading in readings:
        detector.update(reading)
    return [
        (alert.first_step, alert.mechanism) for alert in detector.alerts if alert.kind is AlertKind.IMMINENT
    ]


def oscillation(
    alignment: float, spike: int = SPIKE, before: float = 1e-4, rises: float = 0.1
) -> Iterator[Reading]:
    """Yield features that swing 1.6 × further at each of the last 12 steps; the loss leaps at the last.

    The loss rises a little with each swing: by .15 nat, which ``loss_stands_out`` requires, at the fourth.
    """
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
                "loss": before * growth**rises if left else max(0.5, 4 * before),
            },
        )


def test_opposing_gradients_and_growing_swings_are_imminent_before_the_loss_leaps() -> None:
    """The swings reach .3 nat 4 steps before the leap; by then the loss has left its range."""
    ((step, mechanism),) = imminent(oscillation(-0.9), ADAM)
    assert SPIKE - 4 <= step < SPIKE and mechanism is Mechanism.EDGE_OF_STABILITY


def test_an_oscillation_under_which_the_loss_stays_where_it_is_is_not_imminent() -> None:
    """A run may live at the edge of stability for good: its gradients oppose each other, nothing follows."""
    unmoved = [reading for reading in oscillation(-0.9, rises=0.0) if reading.step < SPIKE]
    assert imminent(iter(unmoved), ADAM) == []
    moved = [reading for reading in oscillation(-0.9) if reading.step < SPIKE]
    assert len(imminent(iter(moved), ADAM)) == 1, "the loss alone makes the difference"


def test_growing_swings_without_opposing_gradients_are_not_imminent() -> None:
    assert imminent(oscillation(0.0), ADAM) == []


def overshoots(readings: Iterator[Reading]) -> list[int]:
    """Return the first step of each *at risk* alert that the rule "overshooting" describes."""
    detector = Detector(None, ADAM)
    for reading in readings:
        detector.update(reading)
    return [
        alert.first_step
        for alert in detector.alerts
        if alert.kind is AlertKind.AT_RISK and "overshoot" in alert.rule
    ]


def test_opposing_gradients_are_a_risk_once_the_swing_has_grown_tenfold_though_the_loss_stays() -> None:
    unmoved = [reading for reading in oscillation(-0.9, rises=0.0) if reading.step < SPIKE]
    (step,) = overshoots(iter(unmoved))
    # 0.01 · 1.6^n ≥ 0.1 from n = 5 on, seven steps before the leap.
    assert SPIKE - 7 <= step <= SPIKE - 6


@pytest.mark.parametrize(("swell", "alerts"), [(8.0, 0), (12.0, 1)])
def test_a_run_that_lives_at_the_edge_swings_by_the_same_amount_and_is_no_risk(
    swell: float, alerts: int
) -> None:
    def readings() -> Iterator[Reading]:
        for reading in oscillation(-0.9, rises=0.0):
            last = reading.step > SPIKE - 12
            moved = {"feature_displacement": 0.02 * (swell if last else 1.0), "loss": 1e-4}
            yield Reading(reading.step, {**reading.values, **moved, "gradient_alignment": -0.9})

    assert len(overshoots(readings())) == alerts


@pytest.mark.parametrize(("turn", "alerts"), [(-0.6, 0), (-0.8, 1)])
def test_one_sharp_turn_is_a_risk_where_the_swing_is_twice_as_large(turn: float, alerts: int) -> None:
    def readings() -> Iterator[Reading]:
        for reading in oscillation(0.7, rises=0.0):
            last = reading.step == SPIKE - 1
            moved = {"feature_displacement": 0.21 if last else 0.01, "loss": 1e-4}
            turned = {"gradient_alignment": turn if last else 0.7}
            if reading.step < SPIKE:
                yield Reading(reading.step, {**reading.values, **moved, **turned})

    assert len(overshoots(readings())) == alerts


@pytest.mark.parametrize("match", [0.1, 1.0])
def test_minibatches_whose_gradients_oppose_each_other_are_no_risk(match: float) -> None:
    unmoved = [reading for reading in oscillation(-0.9, rises=0.0) if reading.step < SPIKE]
    matched = (Reading(reading.step, {**reading.values, "row_match": match}) for reading in unmoved)
    assert len(overshoots(matched)) == (match == 1.0)


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


SMOOTHED = 1.0 / (math.exp(1.0 / 5.0) - 1.0)
"""Steps by which the average over ln δ lags behind a line, at a time constant of 5 steps (a quarter of τ)."""


def rising(lowest: float, rate: float, until: float) -> Iterator[Reading]:
    """Yield an absorbing run whose δ rises as lowest · exp(rate · step) up to ``until``, and stays there."""
    for step in range(601):
        yield absorbing(step, min(lowest * math.exp(rate * step), until))


def absorbing(step: int, delta: float) -> Reading:
    """Return a reading of an absorbing run at this δ, with a feature mean that grows by 4% per τ."""
    values = {
        "zero_sum_violation": 0.5,
        "feature_mean_norm": math.exp(2e-3 * step),
        "logit_displacement": delta,
        "rms_t_max": 0.1,
        "loss": 1e-6,
    }
    return Reading(step, values)


def test_after_a_large_rise_the_lowest_displacement_is_imminent() -> None:
    """δ has risen tenfold above its recent minimum, so that a sixth of the usual displacement is enough."""
    ((step, mechanism),) = imminent(rising(1e-3, 0.01, until=0.2), ADAM)
    expected = math.log(Thresholds().imminent_lowest / 1e-3) / 0.01 + SMOOTHED
    assert step == math.ceil(expected)
    assert mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION


def test_the_displacement_that_is_imminent_falls_with_the_square_of_its_rise() -> None:
    """The recent minimum of δ rises by 1/10 per τ, so that the rise is that of δ less that of the minimum."""
    rate, lowest = 0.015, 0.04
    ((step, _),) = imminent(rising(lowest, rate, until=10.0), ADAM)
    # ln δ + 2 ln rise = ln imminent_product, with ln δ = ln lowest + rate · (step − lag)
    product = math.log(Thresholds().imminent_product / lowest) + 3 * rate * SMOOTHED
    assert step == math.ceil(product / (3 * rate - 2 / (10 * ADAM.tau)))
    assert 0.1 < lowest * math.exp(rate * (step - SMOOTHED)) < 0.6, "between the two displacements"


@pytest.mark.parametrize(("growth", "sounds"), [(2e-3, True), (-2e-3, True), (5e-4, False), (-5e-4, False)])
def test_a_mean_that_grows_or_shrinks_by_two_percent_per_tau_is_imminent_without_a_rise(
    growth: float, sounds: bool
) -> None:
    """With tied embeddings the feature mean shrinks before a slingshot; 5e-4 a step are 1% per τ."""
    detector = Detector(None, ADAM)
    for step in range(1, 601):
        steady = absorbing(step, 0.8)
        detector.update(Reading(step, {**steady.values, "feature_mean_norm": math.exp(growth * step)}))
    found = [alert for alert in detector.alerts if alert.kind is AlertKind.IMMINENT]
    assert bool(found) is sounds
    if sounds:
        shown = found[0].evidence["feature_mean_growth"]
        assert shown.below is (growth < 0) and shown.crossed
        assert shown.threshold == pytest.approx(
            math.copysign(Thresholds().imminent_growth, growth) / ADAM.tau
        )


@pytest.mark.parametrize("halves", [20, 100, math.inf])
def test_while_the_loss_falls_updates_that_move_the_logits_are_no_sign(halves: float) -> None:
    """In half precision, rounding absorbs confident rows while a run still learns from the others.

    The running average of log loss lags behind by about 50 readings, loss_recent by 3.  So a loss that
    halves within 80 readings is .4 nat below its average.
    """
    detector = Detector(None, replace(ADAM, loss_bits=16))
    for step in range(1, 301):
        learning = absorbing(step, 0.8 if step > 60 else 0.01)
        loss = max(2.0 * 0.5 ** (step / halves), 1e-6)
        detector.update(Reading(step, {**learning.values, "loss": loss}))
    found = [alert for alert in detector.alerts if alert.kind is AlertKind.IMMINENT]
    assert bool(found) is (halves > 80)


def test_a_displacement_that_has_not_risen_is_imminent_at_its_full_level_only() -> None:
    """Soft-capped logits move by a tenth of a nat between minibatches for ever."""
    for delta, sounds in ((0.2, False), (0.5, False), (0.8, True)):
        readings = (absorbing(step, delta * 1.3 ** math.sin(step)) for step in range(601))
        assert bool(imminent(readings, ADAM)) is sounds, delta


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
    for reading in quiet_for_ever(20_000):
        detector.update(reading)
    begins = [alert.first_step for alert in detector.alerts if alert.kind is AlertKind.AT_RISK]
    assert begins and max(begins) < 100 + 4.7 * 100 * 20, "100 τ for each factor e"


@pytest.mark.parametrize(
    ("moved", "rise", "sounds"), [(0.2, 1.3, True), (0.01, 1.3, False), (0.2, 1.1, False)]
)
@pytest.mark.parametrize("decayed", [True, False])
def test_a_kick_needs_weight_decay_a_decayed_second_moment_moving_features_and_a_loss_that_stands_out(
    moved: float, rise: float, sounds: bool, decayed: bool
) -> None:
    """A ratio of 1.1 is .1 nat above the loss before; ``loss_stands_out`` is .15 nat."""

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
                    "row_match": 1.0,
                    "loss": 2e-3 * (rise if kicked else 1.0),
                },
            )

    found = imminent(readings(), RunContext(beta2=0.99, decoupled_decay=decayed, no_classes=True))
    if sounds and decayed:
        assert found == [(797, Mechanism.SECOND_MOMENT)]
    else:
        assert found == []


@pytest.mark.parametrize(
    ("turn", "loss", "sounds"), [(-0.9, 1.3e-5, True), (0.0, 1.3e-5, False), (-0.9, 1.1e-5, False)]
)
def test_under_strong_weight_decay_a_kick_is_a_gradient_that_turns_at_high_curvature(
    turn: float, loss: float, sounds: bool
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
                    "row_match": 1.0,
                    "loss": loss if kicked else 1e-5,
                },
            )

    found = imminent(readings(), RunContext(beta2=0.999, decoupled_decay=True, no_classes=True))
    assert [step for step, _ in found] == ([497] if sounds else [])
