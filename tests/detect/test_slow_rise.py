"""Test rises of the loss that no few losses show: slow ones, ones within the noise, and collapses."""

from __future__ import annotations

import json
import math
import random

import pytest

from nfi_monitor.detect.loss_baseline import highest_usual
from nfi_monitor.detect.slow_rise import SlowRise
from nfi_monitor.detect.spike import QUIET, SpikeDetector
from nfi_monitor.types import Reading, Thresholds
from tests.detect.test_spike import Event, events, normal, wandering

LIMITS = Thresholds()
SEEDS = range(8)


def decayed(first: float, last: float, memory: float, count: int, rng: random.Random) -> list[float]:
    """A loss that falls to its floor, with multiplicative noise."""
    return [
        (last + (first - last) * math.exp(-step / memory)) * math.exp(rng.gauss(0, 0.3))
        for step in range(count)
    ]


def within(found: list[Event], at: int, late: int) -> bool:
    """Whether there is one event that begins near ``at`` and is named at most ``late`` losses later."""
    return len(found) == 1 and abs(found[0][0] - at) <= 60 and found[0][1] <= at + late


# --- slow explosions -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("steady, decade", [(600, 30), (600, 60), (600, 100), (2500, 200)])
def test_a_loss_that_explodes_slowly_is_called(steady: int, decade: int, seed: int) -> None:
    """The running averages follow such a loss, so that no loss is far above them."""
    rng = random.Random(seed)
    quiet = decayed(2.3, 5e-3, 50, steady, rng)
    rise = [5e-3 * 10 ** (step / decade) * math.exp(rng.gauss(0, 0.3)) for step in range(2 * decade)]
    found = events([*quiet, *rise])
    assert len(found) == 1
    # It is called soon after it has risen by a decade, to more than 0.1.
    assert steady < found[0][0] <= found[0][1] <= steady + 1.7 * decade + 25


@pytest.mark.parametrize("seed", SEEDS)
def test_a_language_model_that_gets_worse_by_a_nat_in_100_losses_is_called(seed: int) -> None:
    rng = random.Random(seed)
    rise = [2.0 + min(step / 100, 1.5) + rng.gauss(0, 0.1) for step in range(400)]
    assert within(events([*normal(2.0, 0.1, 1500, rng), *rise]), 1560, 120)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("height, losses", [(1.5, 1500), (2.0, 2000), (3.0, 4000)])
def test_what_a_curriculum_or_a_weight_decay_raises_slowly_is_none(
    height: float, losses: int, seed: int
) -> None:
    rng = random.Random(seed)
    ramp = [2.0 + height * min(step / losses, 1.0) + rng.gauss(0, 0.1) for step in range(losses + 500)]
    assert events([*normal(2.0, 0.1, 1500, rng), *ramp]) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_returns_of_reinforcement_learning_that_grow_are_none(seed: int) -> None:
    """The loss of a value head grows tenfold with what it predicts."""
    rng = random.Random(seed)
    losses = [
        (0.1 + 0.9 / (1 + math.exp((3000 - step) / 600))) * math.exp(rng.gauss(0, 0.4))
        for step in range(6000)
    ]
    assert events(losses, nats=False) == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("low, high, cycle", [(1.5, 2.2, 500), (0.02, 0.08, 800), (0.3, 0.9, 600)])
def test_warm_restarts_that_come_back_are_none(low: float, high: float, cycle: int, seed: int) -> None:
    rng = random.Random(seed)
    losses = decayed(2.3, low, 60, cycle, rng)
    for step in range(5 * cycle):
        after = step % cycle
        up = (1 - math.exp(-after / 15)) * math.exp(-4 * after / cycle)
        losses.append((low + (high - low) * up) * math.exp(rng.gauss(0, 0.1)))
    assert events(losses) == []


# --- within the noise ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("height, sigma", [(1.1, 0.2), (1.4, 0.2), (1.1, 0.3), (1.4, 0.3)])
def test_a_jump_of_a_noisy_language_model_that_stays_is_called(
    height: float, sigma: float, seed: int
) -> None:
    rng = random.Random(seed)
    losses = [*normal(1.7, sigma, 1000, rng), *normal(1.7 + height, sigma, 300, rng)]
    assert within(events(losses), 1000, 40)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_few_bad_minibatches_of_a_noisy_language_model_are_none(seed: int) -> None:
    rng = random.Random(seed)
    losses = normal(1.7, 0.25, 2000, rng)
    for at in range(900, 1900, 137):
        losses[at] += 20.0
        losses[at + 1] += 1.2
    assert events(losses) == []


# --- collapses -------------------------------------------------------------------------------------


def collapse(rng: random.Random, after: float = 1.0) -> list[float]:
    """Two classes: the loss falls from 0.7 to 0.4, and goes to ``after`` nats within 50 steps."""
    learned = [max(0.4 + 0.3 * math.exp(-step / 30) + rng.gauss(0, 0.1), 0.05) for step in range(500)]
    lost = [max(0.4 + (after - 0.4) * min(step / 50, 1.0) + rng.gauss(0, 0.1), 0.05) for step in range(1500)]
    return [*learned, *lost]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_collapse_of_less_than_a_nat_is_called_once(seed: int) -> None:
    assert within(events(collapse(random.Random(seed))), 530, 300)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_loss_that_loses_half_of_what_it_had_learned_is_no_collapse(seed: int) -> None:
    assert events(collapse(random.Random(seed), after=0.55)) == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nats", [False, None])
def test_a_loss_that_may_be_no_cross_entropy_cannot_collapse(nats: bool | None, seed: int) -> None:
    """Nothing says that the level at which it began is that of a model that knows nothing."""
    assert events(collapse(random.Random(seed), after=0.8), nats=nats) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_harder_part_of_the_data_that_is_learned_in_its_turn_is_none(seed: int) -> None:
    rng = random.Random(seed)
    losses = [0.4 + 0.4 * math.exp(-(step % 1000) / 60) + rng.gauss(0, 0.05) for step in range(4000)]
    assert events(losses) == []


# --- hinge -----------------------------------------------------------------------------------------


def hinge(rng: random.Random, peak: float) -> list[float]:
    """A hinge loss that is 0 for 100 steps, and then 0 or up to ``peak``."""
    falls = [max(1.0 - step / 150, 0.0) for step in range(300)]
    return falls + [peak * rng.random() if rng.random() < 0.4 else 0.0 for _ in range(2000)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nats", [False, None])
def test_a_hinge_loss_that_chatters_above_zero_has_no_slingshot(nats: bool | None, seed: int) -> None:
    assert events(hinge(random.Random(seed), 4e-3), nats=nats) == []


@pytest.mark.parametrize("nats", [False, None])
def test_a_hinge_loss_that_rises_from_zero_has_one(nats: bool | None) -> None:
    losses = [*hinge(random.Random(0), 1e-5), 0.3, 0.2, 0.3, 0.1, 0.05, *[0.0] * 50]
    assert [start for start, _, _ in events(losses, tau=20.0, nats=nats)] == [2300]


@pytest.mark.parametrize(
    "values, no_classes, broken, nats, of_head",
    [
        ({"loss": 2.3, "head_loss": 2.31}, False, False, True, True),
        ({"loss": 0.9, "head_loss": 2.3}, False, False, None, False),
        ({"loss": 2.3}, False, False, True, True),
        ({"head_loss": 2.3}, False, True, None, False),
        ({"loss": 2.3, "head_loss": 2.3}, True, False, False, False),
    ],
)
def test_the_kind_of_a_loss_is_found_in_an_early_reading(
    values: dict[str, float], no_classes: bool, broken: bool, nats: bool | None, of_head: bool
) -> None:
    """The loss 0.9 is a hinge loss of ten classes."""
    baseline = SpikeDetector().baseline
    baseline.find_kind(Reading(1, values), no_classes=no_classes, broken=broken)
    assert baseline.nats is nats and baseline.of_head is of_head


# --- wandering, deferral and resume ----------------------------------------------------------------


@pytest.mark.parametrize("memory", [20, 100, 400])
def test_a_loss_that_wanders_has_none(memory: int) -> None:
    for seed in SEEDS:
        rng, log_loss, losses = random.Random(seed), 0.0, []
        for _ in range(4000):
            log_loss += -log_loss / memory + rng.gauss(0, 0.4 * math.sqrt(2 / memory))
            losses.append(0.6 * math.exp(log_loss + rng.gauss(0, 0.1)))
        assert events(losses, nats=True) == events(losses, nats=False) == []


def exploding(rng: random.Random) -> list[float]:
    rise = [5e-3 * 10 ** (step / 60) * math.exp(rng.gauss(0, 0.3)) for step in range(200)]
    return [*decayed(2.3, 5e-3, 50, 700, rng), *rise]


@pytest.mark.parametrize(
    "losses", [exploding(random.Random(0)), collapse(random.Random(0)), wandering(3), wandering(4)]
)
def test_a_loss_below_usual_below_completes_no_rise(losses: list[float]) -> None:
    detector = SpikeDetector()
    limit, judged = -math.inf, 0
    for step, loss in enumerate(losses):
        if step % 33 == 0:
            limit = detector.usual_below(LIMITS, 33)
        before = detector.state
        state = detector.update(step, loss, 20.0, LIMITS)
        if loss < limit:
            assert before == state == QUIET
            limit = min(limit, highest_usual(loss, LIMITS)) if math.isfinite(limit) else limit
        else:
            limit, judged = -math.inf, judged + 1
    assert judged < 0.8 * len(losses)


def test_a_checkpoint_within_a_slow_rise_continues_as_if_nothing_had_happened() -> None:
    losses = exploding(random.Random(1))
    whole, parts = SpikeDetector(), SpikeDetector()
    for step, loss in enumerate(losses):
        if step % 7 == 0:
            state = json.loads(json.dumps(parts.state_dict()))
            parts = SpikeDetector()
            parts.load_state_dict(state)
        assert whole.update(step, loss, 20.0, LIMITS) == parts.update(step, loss, 20.0, LIMITS)
    assert repr(whole.state_dict()) == repr(parts.state_dict())


def test_a_state_shares_no_list_with_the_detector() -> None:
    detector, other = SpikeDetector(), SpikeDetector()
    for step in range(300):
        detector.update(step, 1.0, 20.0, LIMITS)
    state = detector.state_dict()
    kept = json.dumps(state)
    other.load_state_dict(state)
    for step in range(300, 600):
        detector.update(step, 1.0, 20.0, LIMITS)
        other.update(step, 1.0, 20.0, LIMITS)
    assert json.dumps(state) == kept


def test_a_restart_keeps_what_is_usual() -> None:
    detector = SpikeDetector()
    for step, loss in enumerate(wandering(0)):
        detector.update(step, loss, 20.0, LIMITS)
    rise = detector.slow_rise
    usual = rise.usual_of_means
    rise.restart()
    assert not (rise.means or rise.levels or rise.recent)
    assert rise.usual_of_means == pytest.approx(usual, rel=0.5) and rise.usual_of_means > 10 * 0.02
    assert SlowRise().usual_of_means == 0.0
