"""Each minibatch has rows, a mean row and a loss of its own; what differs for that reason is no sign."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest

from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.signals import SAME_ROWS, Signals
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.types import Alert, AlertKind, Reading, Thresholds

DECAYED = RunContext(beta2=0.99, decoupled_decay=True)
KICK = 800
"""First step of the kick."""


def signals_after(matches: list[float], moved: float = 0.2) -> Signals:
    """Return the signals after steps with these matches of the rows; the mean row moves at each."""
    signals = Signals()
    for step, match in enumerate(matches, 1):
        values = {"row_match": match, "feature_displacement": moved}
        signals.update(Reading(step, values), 20.0, Thresholds())
    return signals


# --- whether a step has the same rows -----------------------------------------------------------------


@pytest.mark.parametrize(("match", "other"), [(1.0, False), (0.71, False), (0.69, True), (0.0, True)])
def test_rows_are_others_where_they_match_less_than_measured_in_full_batches(
    match: float, other: bool
) -> None:
    assert signals_after([match] * 50).other_rows is other
    assert (match < SAME_ROWS) is other


@pytest.mark.parametrize(("usual", "odd"), [(1.0, 0.0), (0.1, 1.0)])
def test_one_odd_step_does_not_change_what_the_runs_steps_are(usual: float, odd: float) -> None:
    """The average over 10 steps moves by 1 − e^(−1/10) of the difference."""
    before = signals_after([usual] * 50).other_rows
    assert signals_after([usual] * 50 + [odd]).other_rows is before
    assert signals_after([usual] * 50 + [odd] * 30).other_rows is not before


def test_rows_that_were_not_compared_are_neither_the_same_nor_others() -> None:
    signals = signals_after([math.nan] * 50)
    assert signals.other_rows is False and signals.same_rows is False
    assert signals_after([1.0] * 50).same_rows is True


def test_the_mean_rows_movement_between_minibatches_is_no_swing() -> None:
    same, other = signals_after([1.0] * 50), signals_after([0.1] * 50)
    assert same.swing == pytest.approx(0.2) and same.swell == pytest.approx(1.0)
    assert math.isnan(other.swing) and math.isnan(other.swell)


@pytest.mark.parametrize("pause", [1, 2, 31])
def test_the_lowest_swing_fades_with_the_steps_however_few_of_them_are_read(pause: int) -> None:
    """Readings come in pairs; only the second has a movement, as it needs the step before.

    The lowest movement rises by a factor e in 10 τ."""
    signals, tau = Signals(), 20.0
    for pair in range(80 // pause + 2):
        step = 1 + pair * (pause + 1)
        signals.update(Reading(step, {"loss": 1.0}), tau, Thresholds())
        moved = 1e-3 if pair == 0 else 0.1
        signals.update(Reading(step + 1, {"feature_displacement": moved}), tau, Thresholds())
    lowest = 1e-3 * math.exp((step + 1 - 2) / (10 * tau))
    assert signals.swell == pytest.approx(0.1 / lowest)


# --- a kick --------------------------------------------------------------------------------------------


def kick(
    *, match: float, alignment: float, rise: float, sigma: float, peak: float = 8.0
) -> Iterator[Reading]:
    """Yield a second moment that decays, then a gradient that comes back for eight steps.

    The logarithm of the loss has the noise ``sigma``, and is higher by ``rise`` from the third step of the
    kick on.
    ``peak``: RMS_t in the kick.
    """
    rng, root = random.Random(0), 1.0
    for step in range(1, KICK + 8):
        kicked = step >= KICK
        root *= 1.0 if step < 300 else 0.995
        values = {
            "zero_sum_violation": 1e-8,
            "rms_t_max": peak if kicked else 0.05,
            "head_sqrt_exp_avg_sq_mean": root,
            "weight_norm": math.exp(-1e-4 * step),
            "feature_displacement": 0.2 if kicked else 0.003,
            "secant_curvature": 1.0,
            "gradient_alignment": alignment if kicked else 0.0,
            "row_match": match,
            "loss": 1e-3 * math.exp(rise * min(max(step - KICK + 1, 0) / 3, 1.0) + rng.gauss(0.0, sigma)),
        }
        yield Reading(step, values)


def imminent(readings: Iterator[Reading], context: RunContext = DECAYED) -> list[Alert]:
    detector = Detector(None, context)
    for reading in readings:
        detector.update(reading)
    return [alert for alert in detector.alerts if alert.kind is AlertKind.IMMINENT]


@pytest.mark.parametrize(
    ("match", "alignment", "sounds"), [(1.0, 0.0, True), (0.1, 0.0, False), (0.1, 0.6, True)]
)
def test_a_kick_between_minibatches_needs_gradients_that_agree(
    match: float, alignment: float, sounds: bool
) -> None:
    """A single hard minibatch has a gradient of its own; before slingshots those of neighbours agree."""
    found = imminent(kick(match=match, alignment=alignment, rise=2.5, sigma=0.1))
    assert bool(found) is sounds
    if found and match < SAME_ROWS:
        agrees = found[0].evidence["gradient_alignment"]
        assert agrees.crossed and agrees.threshold == Thresholds().kick_agreement


@pytest.mark.parametrize("ratio", [1.0, 3.9])
def test_a_kick_between_minibatches_needs_updates_too_long_for_their_own_rows(ratio: float) -> None:
    """After a new class has come, the updates suit its loss."""
    readings = kick(match=0.1, alignment=0.6, rise=2.5, sigma=0.1)
    suits = [
        Reading(r.step, {**r.values, "predicted_reduction": ratio * r.get("loss") if r.step >= KICK else 0.0})
        for r in readings
    ]
    assert imminent(iter(suits)) == []


@pytest.mark.parametrize(("match", "peak", "sounds"), [(1.0, 3.0, True), (0.1, 5.5, False), (0.1, 6.5, True)])
def test_a_kick_between_minibatches_needs_more_rms_t_than_their_own_differences_bring(
    match: float, peak: float, sounds: bool
) -> None:
    found = imminent(kick(match=match, alignment=0.6, rise=2.5, sigma=0.1, peak=peak))
    assert bool(found) is sounds
    if found and match < SAME_ROWS:
        assert found[0].evidence["rms_t_max"].threshold == Thresholds().rms_t_minibatch


@pytest.mark.parametrize(
    ("match", "rise", "sounds"),
    [(1.0, 0.5, True), (1.0, 0.05, False), (0.1, 0.5, False), (0.1, 2.5, True)],
)
def test_a_kick_between_minibatches_needs_a_loss_outside_its_noise(
    match: float, rise: float, sounds: bool
) -> None:
    """Of a loss with σ = .3 an average over three readings has σ = .12, and six of these are .74 nat.

    With the same rows .15 nat are enough."""
    sigma = 0.3 if match < SAME_ROWS else 0.01
    assert bool(imminent(kick(match=match, alignment=0.6, rise=rise, sigma=sigma))) is sounds


def test_the_loss_that_a_kick_between_minibatches_must_reach_is_in_the_evidence() -> None:
    (alert,) = imminent(kick(match=0.1, alignment=0.6, rise=2.5, sigma=0.3))
    loss = alert.evidence["loss"]
    assert loss.baseline is not None and loss.threshold is not None and loss.crossed
    assert math.log(loss.threshold / loss.baseline) == pytest.approx(6 * 0.41 * 0.3, rel=0.25)
    assert loss.baseline == pytest.approx(1e-3, rel=0.2)


@pytest.mark.parametrize(
    ("context", "sounds"),
    [
        (RunContext(beta2=0.99, decoupled_decay=True), True),
        (RunContext(beta2=0.99, coupled_decay=True), True),
        (RunContext(beta2=0.99), False),
    ],
    ids=["decoupled", "coupled", "none"],
)
def test_either_weight_decay_lets_a_kick_be_named(context: RunContext, sounds: bool) -> None:
    assert bool(imminent(kick(match=1.0, alignment=0.6, rise=2.5, sigma=0.01), context)) is sounds


def test_coupled_decay_keeps_the_second_moment_up_so_a_small_gradient_alone_is_no_risk() -> None:
    for context, kinds in (
        (RunContext(beta2=0.99, decoupled_decay=True), [AlertKind.AT_RISK]),
        (RunContext(beta2=0.99, coupled_decay=True), []),
    ):
        detector = Detector(None, context)
        for reading in kick(match=1.0, alignment=0.0, rise=0.0, sigma=0.01):
            if reading.step < KICK:
                detector.update(reading)
        assert [alert.kind for alert in detector.alerts] == kinds


# --- a warning at the reading at which the slingshot is named ------------------------------------------


def named_late(at_risk: bool) -> Detector:
    """Return a detector after a kick that shows in the second high loss only, at which the event is named.

    ``at_risk``: whether the gradient had vanished before, so that *at risk* fires."""
    detector = Detector(None, DECAYED)
    for reading in kick(match=1.0, alignment=0.6, rise=0.0, sigma=0.01):
        values, late = dict(reading.values), reading.step >= KICK + 1
        # The loss rises over some steps: a rise in one step would come from outside.
        ahead = max(min(reading.step - KICK, 1), -4)
        values["loss"] = max(0.11 * 4.4**ahead, values["loss"]) if ahead > -4 else values["loss"]
        values["rms_t_max"] = 4.0 if late else 0.05 if at_risk else 0.95
        values["feature_displacement"] = 0.2 if late else 0.003
        detector.update(Reading(reading.step, values))
    return detector


def test_a_warning_that_would_begin_as_the_slingshot_is_named_goes_first_if_the_run_was_at_risk() -> None:
    detector = named_late(at_risk=True)
    assert [alert.kind for alert in detector.alerts] == [
        AlertKind.AT_RISK, AlertKind.IMMINENT, AlertKind.SLINGSHOT,
    ]  # fmt: skip
    _, warning, slingshot = detector.alerts
    assert slingshot.first_step == KICK and warning.first_step == KICK + 1
    assert warning.outcome_step == KICK and warning.last_step == KICK + 1
    assert detector.record.came_true == {"kicking": 1, "coasting": 1}


def test_without_a_risk_before_the_slingshot_alone_is_told() -> None:
    assert [alert.kind for alert in named_late(at_risk=False).alerts] == [AlertKind.SLINGSHOT]


@pytest.mark.parametrize(("turn", "peak", "sounds"), [(-0.7, 3.0, True), (0.3, 3.0, False), (0.3, 8.0, True)])
def test_where_rows_are_unseen_a_kick_turns_around_or_is_as_strong_as_between_minibatches(
    turn: float, peak: float, sounds: bool
) -> None:
    """A head that never fires shows no rows.  Gradients of other rows have little in common."""

    def unseen() -> Iterator[Reading]:
        for reading in kick(match=math.nan, alignment=turn, rise=2.5, sigma=0.1, peak=peak):
            curvature = 30.0 if reading.step >= KICK else 1.0
            yield Reading(reading.step, {**reading.values, "secant_curvature": curvature})

    assert bool(imminent(unseen())) is sounds


@pytest.mark.parametrize(("sigma", "sounds"), [(0.05, True), (0.4, False)])
def test_where_rows_are_unseen_the_loss_of_a_kick_is_outside_of_its_noise(sigma: float, sounds: bool) -> None:
    """The unseen rows may be those of minibatches, whose losses differ by factors."""
    assert bool(imminent(kick(match=math.nan, alignment=0.3, rise=0.5, sigma=sigma))) is sounds


@pytest.mark.parametrize(("moved", "sounds"), [(0.003, False), (0.4, True)])
def test_a_loss_that_rises_in_one_step_by_more_than_the_update_before_moved_is_no_kick(
    moved: float, sounds: bool
) -> None:
    """Each new part of a curriculum raises the loss, and the gradient with it."""

    def next_part() -> Iterator[Reading]:
        for reading in kick(match=1.0, alignment=0.0, rise=0.0, sigma=0.05):
            values = dict(reading.values)
            if reading.step >= KICK:
                values["loss"] = 8.0 * values["loss"]
            if reading.step == KICK - 1:
                values["feature_displacement"] = moved
            yield Reading(reading.step, values)

    assert bool(imminent(next_part())) is sounds


@pytest.mark.parametrize(("floor", "sounds"), [(3e-3, True), (1e-5, False)])
def test_a_kick_of_a_loss_far_below_that_of_a_slingshot_is_none(floor: float, sounds: bool) -> None:
    """The loss must have reached a hundredth of a slingshot's; ``kick_loss``."""

    def low() -> Iterator[Reading]:
        for reading in kick(match=1.0, alignment=0.0, rise=1.0, sigma=0.05):
            loss = 1.0 if reading.step < 60 else reading.get("loss") * floor / 1e-3
            yield Reading(reading.step, {**reading.values, "loss": loss, "head_loss": 2.0})

    assert bool(imminent(low())) is sounds
