"""Test what a slingshot is, on artificial losses: each test is a claim about a kind of loss."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence

import pytest

from nfi_monitor.detect.loss_baseline import highest_usual
from nfi_monitor.detect.spike import FALLEN, LONGEST, QUIET, RISEN, SpikeDetector
from nfi_monitor.types import Thresholds

LIMITS = Thresholds()
SEEDS = range(5)
Event = tuple[int, int, int]
"""Step at which it starts, at which it is named, and at which it is over."""


def states(losses: Sequence[float], tau: float = 20.0) -> list[str]:
    detector = SpikeDetector()
    return [detector.update(step, loss, tau, LIMITS) for step, loss in enumerate(losses)]


def events(losses: Sequence[float], tau: float = 1000.0, nats: bool | None = True) -> list[Event]:
    detector = SpikeDetector()
    detector.baseline.nats, detector.baseline.of_head = nats, nats is True
    found: list[Event] = []
    inside = False
    for step, loss in enumerate(losses):
        risen = detector.update(step, loss, tau, LIMITS) != QUIET
        if risen and not inside:
            found.append((detector.start, step, step))
        elif risen:
            found[-1] = (*found[-1][:2], step)
        inside = risen
    return found


def normal(level: float, sigma: float, count: int, rng: random.Random) -> list[float]:
    """Losses with additive noise, as of a language model."""
    return [level + rng.gauss(0, sigma) for _ in range(count)]


def lognormal(level: float, sigma: float, count: int, rng: random.Random) -> list[float]:
    """Losses with multiplicative noise, as of minibatches of a run that fits its data."""
    return [level * math.exp(rng.gauss(0, sigma)) for _ in range(count)]


LOW = [1e-3] * 60

# --- leaps and Wu's levels -------------------------------------------------------------------------


def test_wus_rule_starts_above_one_tenth_after_having_been_below_one_hundredth() -> None:
    seen = states([1.0, 0.05, 0.2, *LOW, 0.009, 0.05, 0.11, 0.15, 0.05, 0.009])
    assert seen == [QUIET] * 66 + [RISEN, RISEN, FALLEN]


@pytest.mark.parametrize("peak", [5e-3, 5e-2, 0.5])
@pytest.mark.parametrize("below", [1e-9, 1e-7, 4e-7])
def test_three_decades_from_a_tiny_loss_are_a_slingshot(below: float, peak: float) -> None:
    losses = [*[below] * 200, peak, 0.7 * peak, 0.5 * peak, *[below] * 100]
    assert [event[:2] for event in events(losses, tau=20.0)] == [(200, 201)]


def test_one_loss_of_a_full_batch_is_no_slingshot() -> None:
    assert events([*[1e-7] * 200, 0.3, *[1e-7] * 100]) == []


def test_an_oscillation_that_is_high_at_every_second_step_is_a_slingshot() -> None:
    chatter = [3e-2, 0.2, 3e-3, 0.1, 1e-2, 4e-2, 3e-2, 5e-3, 7e-2, 6e-3, 1e-2]
    assert len(events([*[3e-4] * 200, *chatter, *[3e-4] * 200], tau=20.0)) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_slingshot_of_a_noisy_low_loss_is_found(seed: int) -> None:
    rng = random.Random(seed)
    quiet = lognormal(1e-4, 1.0, 300, rng)
    found = events([*quiet, 2.0, 1.5, 1.8, 0.9, 0.6, 0.4, 0.2, 0.2, *quiet], tau=20)
    assert [start for start, _, _ in found] == [300]
    assert found[0][1] <= 305


def test_a_rise_in_small_steps_does_not_raise_its_own_baseline() -> None:
    chatter = [0.001, 0.005, 0.012, 0.027, 0.006, 0.025, 0.018, 0.03, 0.026, 0.013, 0.05, 0.09, 0.11]
    assert states([*[0.0] * 300, *chatter], tau=1000)[-1] == RISEN


def test_a_rise_between_very_low_losses_is_a_burst_and_no_slingshot() -> None:
    """From 1e-8 to 1e-4 the loss rises by four decades, but nobody would call that a slingshot."""
    detector = SpikeDetector()
    losses = [1e-8] * 100 + [1e-4] * 20 + [1e-8] * 20
    assert {detector.update(step, loss, 20.0, LIMITS) for step, loss in enumerate(losses)} == {QUIET}
    assert detector.burst_start == 100 and detector.burst_peak == 1e-4


# --- losses of nats --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before, after, sigma",
    [
        (2.05, 3.75, 0.1),
        (3.2, 5.0, 0.1),
        (10.0, 11.5, 0.1),
        (0.5, 3.0, 0.1),
        (6.0, 9.0, 0.3),
        (3.0, 8.0, 0.06),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_language_model_that_collapses_and_stays_has_one_slingshot(
    before: float, after: float, sigma: float, seed: int
) -> None:
    rng = random.Random(seed)
    found = events([*normal(before, sigma, 1000, rng), *normal(after, sigma, 1000, rng)])
    assert len(found) == 1
    start, named, over = found[0]
    assert start == 1000 and named <= 1006 and over <= 1200


@pytest.mark.parametrize("loss", [20.0, 1e3])
def test_one_bad_minibatch_is_no_slingshot(loss: float) -> None:
    rng = random.Random(0)
    assert events([*normal(3.0, 0.06, 200, rng), loss, *normal(3.0, 0.06, 200, rng)]) == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.3])
def test_drift_curriculum_and_epochs_of_a_language_model_are_none(sigma: float, seed: int) -> None:
    rng = random.Random(seed)
    drift = [2.0 + 1.5 * math.sin(step / 700) ** 2 + rng.gauss(0, sigma) for step in range(4000)]
    harder = [2.0 + 0.7 * (step // 1000 % 2) + rng.gauss(0, sigma) for step in range(4000)]
    epochs = [
        3.0 - 0.4 * (step // 800) + 0.2 * (step % 800) / 800 + rng.gauss(0, sigma) for step in range(4000)
    ]
    restarts = [2.0 + 0.4 * math.exp(-(step % 500) / 60) + rng.gauss(0, sigma) for step in range(4000)]
    assert [events(losses) for losses in (drift, harder, epochs, restarts)] == [[]] * 4


# --- ordinary losses -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("level", [1e-6, 1e-4, 0.012, 0.1, 3.0])
def test_minibatch_noise_is_no_slingshot(level: float, sigma: float, seed: int) -> None:
    assert events(lognormal(level, sigma, 2000, random.Random(seed))) == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("level", [1e-6, 1e-4, 1e-2])
def test_heavy_tails_are_no_slingshot(level: float, seed: int) -> None:
    """Student's t of three degrees of freedom in log loss."""
    rng = random.Random(seed)
    t = [rng.gauss(0, 0.7) / math.sqrt(rng.gammavariate(1.5, 2 / 3)) for _ in range(3000)]
    assert events([level * math.exp(max(-15.0, min(15.0, x))) for x in t]) == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [0.001, 0.003, 0.01])
@pytest.mark.parametrize("level", [1e-6, 1e-4])
def test_hard_minibatches_of_a_run_that_fits_its_data_are_none(level: float, share: float, seed: int) -> None:
    rng = random.Random(seed)
    losses = [rng.random() if rng.random() < share else x for x in lognormal(level, 1.0, 3000, rng)]
    assert events(losses) == []


def test_one_low_reading_does_not_make_a_run_low() -> None:
    assert events([*[0.03] * 100, 0.009, *[0.03] * 100, 0.11, 0.11, *[0.03] * 100]) == []


def test_a_loss_that_was_never_low_has_no_slingshot_by_wus_rule() -> None:
    assert events([0.5, 0.05, 0.5, 0.05, 0.5] * 50) == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("at", [60, 100, 130, 160])
def test_a_blip_on_the_way_down_is_none(at: int, seed: int) -> None:
    """The loss falls by a decade in 60 steps, and comes back for a few steps to where it was 50 steps ago."""
    rng = random.Random(seed)
    losses = [
        2.3 * math.exp(-step / 26) * math.exp(rng.gauss(0, 0.1)) * (7.0 if at <= step < at + 6 else 1.0)
        for step in range(400)
    ]
    assert events(losses, tau=20.0) == []


def wandering(seed: int) -> list[float]:
    """Log loss of a discriminator: it wanders around with a memory of 50 steps, and has no floor."""
    rng, log_loss, losses = random.Random(seed), 0.0, []
    for _ in range(5000):
        log_loss += -log_loss / 50 + rng.gauss(0, 0.1)
        losses.append(0.5 * math.exp(log_loss + rng.gauss(0, 0.1)))
    return losses


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nats", [True, False, None])
def test_a_loss_without_a_floor_has_no_slingshot(nats: bool | None, seed: int) -> None:
    assert events(wandering(seed), nats=nats) == []


@pytest.mark.parametrize(("factor", "found"), [(2.5, 0), (3.5, 1)])
def test_while_the_loss_first_falls_three_times_the_first_losses_are_a_divergence(
    factor: float, found: int
) -> None:
    """The loss falls from 2.3 and has reached .05 after 70 steps; a blip on the way down stays below."""
    falls = [2.3 * math.exp(-step / 18) for step in range(70)]
    assert falls[-1] > LIMITS.spike_low
    assert len(events([*falls, *[factor * 2.3] * 20])) == found


@pytest.mark.parametrize("seed", SEEDS)
def test_a_discriminator_that_wins_early_and_is_caught_up_with_has_none(seed: int) -> None:
    rng = random.Random(seed)
    way = [*[1.4 * 0.93**step for step in range(46)], *[min(0.05 * 1.2**step, 1.2) for step in range(400)]]
    assert events([loss * math.exp(rng.gauss(0, 0.1)) for loss in way], nats=False) == []


# --- units -----------------------------------------------------------------------------------------


def regression(seed: int) -> list[float]:
    """A squared error that falls to its floor, and has three slingshots there, one of which stays."""
    rng = random.Random(seed)
    losses = [(1.3 * math.exp(-step / 80) + 1e-5) * math.exp(rng.gauss(0, 0.2)) for step in range(3000)]
    for start, height in ((1200, 0.3), (1800, 0.02), (2600, 2.0)):
        for step in range(start, start + 12):
            losses[step] = height * 0.7 ** (step - start) + 1e-5
    return losses[:2600] + [2.0 * math.exp(rng.gauss(0, 0.2)) for _ in range(400)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e3, 1e9])
@pytest.mark.parametrize("nats", [False, None])
def test_the_same_run_in_another_unit_has_the_same_events(nats: bool | None, unit: float, seed: int) -> None:
    losses = regression(seed)
    reference = events(losses, nats=False)
    assert [start for start, _, _ in reference] == [1200, 1800, 2600]
    told = events([unit * loss for loss in losses], nats=nats)
    assert [event[0] for event in told] == [event[0] for event in reference]
    if nats is False:
        assert told == reference


def test_a_loss_of_nats_keeps_its_unit_whatever_it_begins_with() -> None:
    """A run that is resumed begins with a low loss. A large language model begins with 11 nats."""
    for first in (1e-6, 0.5, 11.0):
        detector = SpikeDetector()
        for step in range(60):
            detector.update(step, first, 20.0, LIMITS)
        assert detector.baseline.unit == 1.0


# --- events ----------------------------------------------------------------------------------------


def test_a_loss_that_stays_at_another_level_becomes_the_new_normal() -> None:
    seen = states([*LOW, *[0.5] * 300, 50.0, 60.0, 70.0], tau=20)
    assert seen[61] == RISEN and seen[200] == QUIET and seen[-1] == RISEN


@pytest.mark.parametrize("tau", [20.0, 1000.0])
def test_a_second_event_right_after_the_first_one_stayed_is_named(tau: float) -> None:
    found = events([*[1e-6] * 200, *[0.05] * 150, *[3.0] * 300], tau=tau)
    assert [start for start, _, _ in found] == [200, 350]


def test_the_level_at_which_the_loss_stayed_is_kept_until_the_next_event() -> None:
    detector, kept = SpikeDetector(), []
    for step, loss in enumerate([*LOW, 2.3, 2.3, *LOW, *[2.3] * 700, 40.0, 40.0]):
        detector.update(step, loss, 20.0, LIMITS)
        kept.append(detector.stayed)
    assert math.isnan(kept[120]), "the first came back"
    assert kept[-3] == 2.3 and detector.state == RISEN and math.isnan(kept[-1])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "losses", [lambda r: 0.5, lambda r: r.random(), lambda r: 0.3 if r.random() < 0.2 else 1e-5]
)
def test_no_event_lasts_for_thousands_of_steps(losses: Callable[[random.Random], float], seed: int) -> None:
    rng = random.Random(seed)
    after = [0.5, 0.5, 0.5, *[losses(rng) for _ in range(5000)]]
    found = events([*[1e-5] * 200, *after])
    assert found[0][:2] == (200, 201)
    assert all(over - start <= LONGEST + 1 for start, _, over in found)


def test_aftershocks_within_the_recovery_belong_to_the_same_event() -> None:
    """Recovery takes 2 τ = 40 steps: a rise after 30 steps is the same slingshot, after 60 a new one."""
    one = states([*LOW, 0.5, 0.5, 1e-3, *[1e-3] * 30, 0.5, *[1e-3] * 35])
    assert set(one[61:]) == {RISEN, FALLEN}
    two = states([*LOW, 0.5, 0.5, 1e-3, *[1e-3] * 70, 0.5, 0.5, 0.5, 1e-3])
    assert two[61] == RISEN and two[120] == QUIET and two[-2] == RISEN


def test_an_aftershock_below_the_spike_level_prolongs_the_recovery_without_a_new_rise() -> None:
    seen = states([*LOW, 0.5, 0.5, 1e-3, 0.05, 1e-3])
    assert seen[61:] == [RISEN, FALLEN, FALLEN, FALLEN]


def test_a_loss_on_its_way_back_from_a_slingshot_is_no_new_one() -> None:
    """It is still three decades above the average from before."""
    decay = [0.8 * 0.97**step for step in range(600)]
    assert len(events([*[1e-7] * 300, *decay], tau=20.0)) == 1


# --- losses that are none --------------------------------------------------------------------------


def test_losses_below_zero_are_not_judged() -> None:
    assert set(states([-1.0, -0.5, 0.3, -1.2] * 20)) == {QUIET}


def test_a_loss_slightly_below_zero_counts_as_zero() -> None:
    """kl_div of a distilled student that fits is such a loss. It must not end the detection for good."""
    seen = states([*LOW, -1e-9, *LOW, 2.3, 2.3, -1e-7, 2.3, *[-1e-6] * 45])
    assert set(seen[:122]) == {QUIET} and seen[122:125] == [RISEN, FALLEN, RISEN] and seen[-1] == QUIET


def test_a_loss_that_falls_below_zero_ends_the_event() -> None:
    seen = states([*LOW, 2.3, 2.3, 2.3, -0.5, 2.3, *LOW, 2.3])
    assert seen[61:63] == [RISEN, RISEN] and set(seen[63:]) == {QUIET}


def test_nan_is_not_judged() -> None:
    assert states([*LOW, math.nan, 0.5, math.inf, 0.5])[60:] == [QUIET, QUIET, QUIET, RISEN]


# --- deferral and resume ---------------------------------------------------------------------------


@pytest.mark.parametrize("nats", [True, False])
@pytest.mark.parametrize("losses", [regression(0), wandering(0), [1000 * x for x in regression(1)]])
def test_a_loss_below_usual_below_never_begins_anything(losses: list[float], nats: bool) -> None:
    """Thirty losses below the first limit, which each of them may lower, leave the detector quiet."""
    detector = SpikeDetector()
    detector.baseline.nats = nats
    ahead, limit = 30, -math.inf
    for step, loss in enumerate(losses):
        if step % ahead == 0:
            limit = detector.usual_below(LIMITS, ahead)
        before = detector.state, detector.streak
        state = detector.update(step, loss, 20.0, LIMITS)
        if 0 <= loss < limit:
            assert before == (state, detector.streak) == (QUIET, 0)
            limit = (
                min(limit, highest_usual(loss, LIMITS, detector.baseline.unit))
                if math.isfinite(limit)
                else limit
            )
        else:
            limit = -math.inf


def test_a_checkpoint_continues_as_if_nothing_had_happened() -> None:
    losses = regression(0)
    whole = SpikeDetector()
    parts = SpikeDetector()
    for step, loss in enumerate(losses):
        if step % 7 == 0:
            state = json.loads(json.dumps(parts.state_dict()))
            parts = SpikeDetector()
            parts.load_state_dict(state)
        assert whole.update(step, loss, 20.0, LIMITS) == parts.update(step, loss, 20.0, LIMITS)
    assert whole.state_dict() == parts.state_dict() or repr(whole.state_dict()) == repr(parts.state_dict())


def test_a_state_of_an_earlier_version_loads() -> None:
    old = {
        "state": QUIET, "average": math.log(1e-3), "noise": 0.0, "last": math.log(1e-3), "readings": 300,
        "streak": 0, "start": 0, "level": math.nan, "height": math.nan, "floor": math.nan, "peak": 0.0,
        "fallen_at": 0, "stayed": math.nan, "negative": False,
    }  # fmt: skip
    detector = SpikeDetector()
    detector.load_state_dict(json.loads(json.dumps(old)))
    seen = [
        detector.update(step, loss, 20.0, LIMITS) for step, loss in enumerate([1e-5, 1e-5, 0.5, 0.5, 0.5])
    ]
    assert seen == [QUIET, QUIET, QUIET, RISEN, RISEN]


# --- the same rows ---------------------------------------------------------------------------------


def jumping_hinge(rng: random.Random) -> list[float]:
    """A hinge loss that has been fitted: 0, up to 1e-3, and sometimes .03; then .2 at steps 901 and 903."""
    fitted = [0.5 * 0.97**step for step in range(300)]
    jumps = [10.0 ** rng.uniform(-6, -3) if rng.random() < 0.4 else 0.0 for _ in range(600)]
    jumps[50::60] = [0.03] * len(jumps[50::60])
    return [*fitted, *jumps, 0.2, 0.0, 0.2, *[0.0] * 300]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("same", [True, False])
def test_two_losses_beyond_all_recent_ones_are_a_slingshot_only_if_no_minibatch_can_be_hard(
    same: bool, seed: int
) -> None:
    spike, begun = SpikeDetector(), []
    spike.baseline.nats, spike.baseline.of_head = None, False
    for step, loss in enumerate(jumping_hinge(random.Random(seed)), 1):
        before = spike.state
        if spike.update(step, loss, 50.0, LIMITS, same_rows=same) == "risen" and before == "quiet":
            begun.append(step)
    assert begun == ([903] if same else [])


def test_the_unit_is_the_median_of_the_first_twenty_losses() -> None:
    spike = SpikeDetector()
    spike.baseline.nats = False
    losses = [random.Random(0).uniform(0.1, 0.9) for _ in range(20)]
    for step, loss in enumerate([*losses, *[1e-3] * 100], 1):
        spike.update(step, loss, 50.0, LIMITS)
    assert spike.baseline.unit == sorted(losses)[10]


def test_an_earlier_versions_state_has_no_highest_loss_so_its_first_losses_are_no_rise() -> None:
    spike = SpikeDetector()
    for step in range(1, 200):
        spike.update(step, 1e-4, 50.0, LIMITS, same_rows=True)
    state = spike.state_dict()
    del state["highest"], state["same_rows"]
    resumed = SpikeDetector()
    resumed.load_state_dict(state)
    for step in range(200, 260):
        assert resumed.update(step, 3e-4, 50.0, LIMITS, same_rows=True) == "quiet"
