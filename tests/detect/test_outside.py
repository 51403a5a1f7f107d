"""Causes from outside: what is known at every step, and how long it explains an event."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from nfi_monitor.detect.mechanism import name_mechanism
from nfi_monitor.detect.outside import Outside, OutsideWatch
from nfi_monitor.types import Mechanism, Reading
from tests.detect.test_mechanism import QUIET

ABSORBING = replace(QUIET, violation=0.86, on=("absorbing",), update_jump=1.0)


def quiet_run(steps: int, loss: float = 1e-7, moved: float = 0.004, norm: float = 1e-6) -> OutsideWatch:
    """Return a watch after ``steps`` steps in which nothing happens."""
    watch = OutsideWatch()
    for step in range(1, steps + 1):
        watch.update_rates(step, [1e-3])
        watch.update_loss(step, loss)
        watch.update(Reading(step, {"gradient_norm": norm, "head_loss": loss}), moved, per_loss=True)
    return watch


def named(watch: OutsideWatch, start: int, tau: float = 100.0) -> Mechanism:
    """Return the mechanism of an event at ``start`` in a run that absorbs."""
    return name_mechanism(replace(ABSORBING, outside=watch.before(start, tau)))[0]


@pytest.mark.parametrize(("factor", "external"), [(300, True), (30, True), (3.5, True), (2, False)])
def test_a_jump_of_the_rate_explains_what_follows_also_where_rows_are_absorbed(
    factor: float, external: bool
) -> None:
    watch = quiet_run(50)
    for step in range(51, 70):
        watch.update_rates(step, [1e-3 * factor])
    assert (named(watch, 68) is Mechanism.EXTERNAL) is external
    assert named(watch, 51) is Mechanism.NUMERICAL_FEATURE_INFLATION, "the jump came after the event's start"
    assert named(watch, 500) is Mechanism.NUMERICAL_FEATURE_INFLATION, "long over"


def test_a_jump_of_one_group_counts_and_neither_a_warm_up_nor_a_decay_does() -> None:
    watch = OutsideWatch()
    for step in range(1, 101):
        watch.update_rates(step, [1e-3 * step / 100, 1e-3 * 0.95**step])
    assert math.isnan(watch.before(101, 100.0).rate_jump)
    watch.update_rates(101, [1e-3, 1.0])
    assert watch.before(102, 100.0).rate_jump > 100
    unknown = OutsideWatch()
    for step in range(1, 20):
        unknown.update_rates(step, [math.nan])
    assert math.isnan(unknown.before(20, 100.0).rate_jump)


def test_a_leap_far_beyond_what_the_update_moved_is_a_batch() -> None:
    watch = quiet_run(60)
    watch.update_loss(61, 44.0)
    assert watch.before(61, 100.0).unexplained_leap and watch.before(61, 100.0).read_before
    assert named(watch, 61) is Mechanism.EXTERNAL
    assert name_mechanism(replace(ABSORBING, on=("imminent",), outside=watch.before(61, 100.0)))[0] is (
        Mechanism.NUMERICAL_FEATURE_INFLATION
    ), "an event that was seen to come did not come at once"


def test_a_leap_that_the_update_can_have_made_is_none() -> None:
    """Measured in modular division: updates of 7 nats raise the loss by 7 nats in one step."""
    watch = quiet_run(60, moved=7.0)
    watch.update_loss(61, 0.3)
    assert named(watch, 61) is Mechanism.NUMERICAL_FEATURE_INFLATION


def test_a_loss_that_rises_step_by_step_makes_no_leap() -> None:
    watch = quiet_run(60)
    for step in range(61, 77):
        watch.update_loss(step, 1e-7 * 3.0 ** (step - 60))
    assert named(watch, 76) is Mechanism.NUMERICAL_FEATURE_INFLATION


def test_a_leap_between_two_readings_is_less_certain() -> None:
    watch = quiet_run(60)
    for step in range(61, 70):
        watch.update_loss(step, 1e-7)
    watch.update_loss(70, 5.0)
    seen = watch.before(70, 100.0)
    assert not seen.read_before and name_mechanism(replace(ABSORBING, outside=seen)) == (
        Mechanism.EXTERNAL,
        0.6,
    )


def test_a_gradient_that_no_loss_makes_is_corrupt_and_one_that_grows_with_the_loss_is_not() -> None:
    corrupt, natural = quiet_run(60), quiet_run(60)
    corrupt.update(Reading(61, {"gradient_norm": 1.7, "head_loss": 1e-7}), 0.004, per_loss=True)
    natural.update(Reading(61, {"gradient_norm": 1.7, "head_loss": 1.7e-1}), 0.004, per_loss=True)
    assert named(corrupt, 66) is Mechanism.EXTERNAL
    assert named(natural, 66) is Mechanism.NUMERICAL_FEATURE_INFLATION


def test_a_gradient_that_has_grown_over_several_steps_is_not_corrupt() -> None:
    """SGD at a smooth minimum: the oscillation grows from 1e-5 of its gradient at the slingshot."""
    at_once, grown = quiet_run(60), quiet_run(60)
    for step in range(61, 72):
        norm = 1e-6 * 4.0 ** (step - 60)
        grown.update(Reading(step, {"gradient_norm": norm, "head_loss": 1e-7}), 0.004, per_loss=True)
    at_once.update(Reading(71, {"gradient_norm": norm, "head_loss": 1e-7}), 0.004, per_loss=True)
    assert at_once.before(72, 20.0).corrupt_gradient
    assert not grown.before(72, 20.0).corrupt_gradient and grown.before(72, 20.0).gradient_grew


def test_a_reported_loss_that_was_rounded_to_zero_makes_no_gradient_corrupt() -> None:
    watch = OutsideWatch()
    for step in range(1, 61):
        values = {"gradient_norm": 3e-7, "loss": 0.0, "head_loss": 1.3e-8}
        watch.update(Reading(step, values), 0.3, per_loss=True)
    values = {"gradient_norm": 0.165, "loss": 4.4e-4, "head_loss": 4.4e-4}
    watch.update(Reading(61, values), 0.3, per_loss=True)
    assert not watch.before(62, 20.0).corrupt_gradient


def test_bursts_of_the_gradient_name_the_cause_only_where_nothing_else_does() -> None:
    burst = Outside(burst=4.0)
    assert name_mechanism(replace(QUIET, outside=burst))[0] is Mechanism.EXTERNAL
    assert name_mechanism(replace(QUIET, curvature=50.0, outside=burst))[0] is Mechanism.EDGE_OF_STABILITY


def test_a_watch_survives_a_checkpoint() -> None:
    watch = quiet_run(60)
    watch.update_rates(61, [0.3])
    watch.update_loss(61, 44.0)
    resumed = OutsideWatch()
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert resumed.before(62, 100.0) == watch.before(62, 100.0)
    resumed.update_loss(62, 1.0)
    watch.update_loss(62, 1.0)
    assert resumed.losses == watch.losses


def after(readings: list[tuple[int, float, float]], start: int, tau: float) -> Outside:
    """Return what came before an event at ``start``, after readings of (step, head's gradient, its v)."""
    watch = OutsideWatch()
    for step, gradient, second in readings:
        values = {"rms_t_head": gradient / math.sqrt(second), "head_sqrt_exp_avg_sq_mean": math.sqrt(second)}
        watch.remember(Reading(step, values))
    return watch.before(start, tau)


@pytest.mark.parametrize("tau", [20.0, 100.0, 1000.0])
@pytest.mark.parametrize("corrupt", [1.0, 30.0, 1000.0])
def test_the_second_moment_tells_how_much_larger_an_unread_gradient_was(tau: float, corrupt: float) -> None:
    """The gradient is 1 until step 480, ``corrupt`` times 5 at the unread step 490, and 5 in the event."""
    beta2 = 1.0 - 1.0 / tau
    second, readings = 1.0, [(480, 1.0, 1.0)]
    for step in range(481, 502):
        gradient = 5.0 * corrupt if step == 490 else 5.0 if step >= 500 else 1.0
        second = beta2 * second + (1.0 - beta2) * gradient**2
    readings.append((501, 5.0, second))
    seen = after(readings, 500, tau)
    left = beta2 ** (501 - 490)  # what v still holds of it
    if corrupt > 1.0:
        assert seen.remembered == pytest.approx(math.sqrt(left / 3.0) * corrupt, rel=0.05)
    else:
        assert seen.remembered <= 1.0, "the event's own gradients explain it"
    assert seen.outgrown == (corrupt >= 30.0)


def test_a_loss_that_rises_by_itself_explains_its_second_moment() -> None:
    """Gradients grow tenfold in each unread step of the event; the last one, 1000, is read."""
    tau, second = 1000.0, 1.0
    for gradient in (10.0, 100.0, 1000.0):
        second = second * (1.0 - 1.0 / tau) + gradient**2 / tau
    seen = after([(480, 1.0, 1.0), (502, 1000.0, second)], 500, tau)
    assert seen.remembered < 1.0 and not seen.outgrown


def test_a_second_moment_that_did_not_grow_remembers_nothing_new() -> None:
    """A vanished gradient leaves a small RMS_t; so does a rare one."""
    seen = after([(480, 0.01, 1.0), (501, 0.01, 0.9)], 500, 1000.0)
    assert seen.remembered == 0.0


@pytest.mark.parametrize("steps", [(499,), (501,)])
def test_without_a_reading_before_and_one_in_the_event_nothing_is_remembered(steps: tuple[int, ...]) -> None:
    assert math.isnan(after([(step, 0.01, 1.0) for step in steps], 500, 1000.0).remembered)


def test_what_an_earlier_version_saved_of_an_event_is_read() -> None:
    assert Outside.from_state({"rate_jump": 5.0, "rms_t": 0.1}) == Outside(rate_jump=5.0)


def test_a_bad_batch_right_after_a_somewhat_harder_one_is_seen() -> None:
    """In a run that fits its data, the losses of minibatches differ by factors from step to step."""
    watch = quiet_run(60, loss=1e-3)
    for step, loss in enumerate([6e-3, 1e-3, 1e-3, 18.0], start=61):
        watch.update_loss(step, loss)
        watch.update(Reading(step, {"gradient_norm": 1e-6, "head_loss": loss}), 0.004, per_loss=True)
    seen = watch.before(64, 100.0)
    assert seen.unexplained_leap and seen.leap == pytest.approx(math.log(18.0 / 1e-3))


@pytest.mark.parametrize(("burst", "rms_t", "named"), [
    (156.0, 5.8, Mechanism.EDGE_OF_STABILITY),  # an oscillation that built up between two readings
    (156.0, 0.02, Mechanism.EXTERNAL),  # the second moment holds a larger gradient already
    (4.0, 5.8, Mechanism.EXTERNAL),  # minibatches differ by factors
    (12_000.0, 5.8, Mechanism.EXTERNAL),  # no data of the run made this gradient
    (156.0, math.nan, Mechanism.EDGE_OF_STABILITY),  # of an optimizer without a second moment
    (4.0, math.nan, Mechanism.EXTERNAL),
])  # fmt: skip
def test_a_gradient_that_grew_before_the_loss_leapt_is_no_bad_batch(
    burst: float, rms_t: float, named: Mechanism
) -> None:
    outside = Outside(leap=4.8, rise=1.6, moved=0.03, read_before=True, burst=burst)
    assert outside.unexplained_leap
    causes = replace(QUIET, update_jump=1.4, rms_t=rms_t, outside=outside)
    assert name_mechanism(causes)[0] is named


@pytest.mark.parametrize(("approach", "leap", "on", "named"), [
    (1.6, 8.7, ("absorbing",), Mechanism.EXTERNAL),  # a corrupt gradient between two readings
    (0.1, 8.7, ("absorbing",), Mechanism.NUMERICAL_FEATURE_INFLATION),
    (1.6, 8.7, ("absorbing", "imminent"), Mechanism.NUMERICAL_FEATURE_INFLATION),
    (1.6, math.nan, ("absorbing",), Mechanism.NUMERICAL_FEATURE_INFLATION),  # a state, and no event
    (math.nan, 8.7, ("absorbing",), Mechanism.NUMERICAL_FEATURE_INFLATION),
])  # fmt: skip
def test_no_numeric_slingshot_comes_at_once_while_updates_hardly_move_the_logits(
    approach: float, leap: float, on: tuple[str, ...], named: Mechanism
) -> None:
    outside = Outside(leap=leap, rise=0.01, moved=0.12)
    causes = replace(ABSORBING, on=on, approach=approach, outside=outside)
    assert name_mechanism(causes)[0] is named


@pytest.mark.parametrize(("per_nat", "rise", "expected"), [
    (True, 10.8, True), (True, 4.0, False),
    (False, 10.8, False),  # the loss of a regression may rise by any number
])  # fmt: skip
def test_a_cross_entropy_rises_by_no_more_than_the_logits_move(
    per_nat: bool, rise: float, expected: bool
) -> None:
    """From a loss of .05 nat, a bad batch cannot leap far in its logarithm."""
    assert Outside(leap=5.2, rise=rise, moved=1.14, per_nat=per_nat).unexplained_leap is expected


def test_what_a_bad_batch_leaves_behind_is_no_leap_of_its_own() -> None:
    watch = quiet_run(60, loss=1e-3)
    for step, loss in enumerate([18.0, 1e-3, 1e-3, 0.5], start=61):
        watch.update_loss(step, loss)
    assert watch.before(64, 100.0).leap == pytest.approx(math.log(18.0 / 1e-3))


@pytest.mark.parametrize(("moved", "external"), [(0.004, True), (2.0, False)])
def test_an_update_that_has_grown_excuses_no_more_than_it_can_have_moved(
    moved: float, external: bool
) -> None:
    watch = quiet_run(60, loss=1e-3, moved=moved)
    watch.update_loss(61, 44.0)
    grown = replace(ABSORBING, update_jump=3.0, outside=watch.before(61, 100.0))
    assert watch.before(61, 100.0).unexplained_leap
    assert (name_mechanism(grown)[0] is Mechanism.EXTERNAL) is external


@pytest.mark.parametrize(("bits", "external"), [(16, False), (32, True), (0, True)])
def test_a_loss_within_the_rounding_of_half_precision_shows_no_corrupt_gradient(
    bits: int, external: bool
) -> None:
    """A bfloat16 loss is 0 for hundreds of steps while its gradient comes back."""
    watch = quiet_run(60, loss=1e-5)
    reading = Reading(61, {"gradient_norm": 0.04, "loss": 1e-4, "head_loss": 1e-4})
    watch.update(reading, 0.004, per_loss=True, loss_bits=bits)
    assert watch.before(62, 100.0).corrupt_gradient is external
