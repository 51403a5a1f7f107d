"""The labels of the proving ground, on made-up curves: one test for each sentence of truth.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.benchmarks.detection import truth
from tests.benchmarks.detection.truth import Levels, slingshots

TAU = 20.0
Floats = NDArray[np.float64]


def starts(loss: Floats, **how: object) -> list[int]:
    steps = list(range(1, len(loss) + 1))
    return [event.start for event in slingshots(steps, loss.tolist(), TAU, **how)]  # type: ignore[arg-type]


def noisy(level: float, steps: int, sigma: float = 0.1, seed: int = 0) -> Floats:
    """A loss around ``level`` with multiplicative noise."""
    return np.asarray(level * np.exp(sigma * np.random.default_rng(seed).standard_normal(steps)))


def spike(loss: Floats, start: int, height: float, steps: int = 10) -> Floats:
    """Set ``steps`` readings from step ``start`` (counted from 1) to ``height``."""
    changed = loss.copy()
    changed[start - 1 : start - 1 + steps] = height
    return changed


def language_model(steps: int = 1500, change: int = 1000) -> Floats:
    noise = 0.1 * np.random.default_rng(0).standard_normal(steps)
    return np.where(np.arange(steps) < change - 1, 2.05, 3.75) + noise


def test_a_fitted_run_is_judged_by_wu_s_levels() -> None:
    assert starts(spike(noisy(5e-3, 1500), 1000, 0.2)) == [1000]
    assert starts(spike(noisy(5e-3, 1500), 1000, 0.04)) == []


def test_a_leap_of_three_decades_from_a_tiny_loss_is_one() -> None:
    assert starts(spike(noisy(1e-7, 1500), 1000, 5e-2)) == [1000]
    assert starts(spike(noisy(1e-6, 1500), 1000, 2e-3)) == [1000]


def test_losses_below_the_floor_are_equal() -> None:
    assert starts(spike(noisy(1e-12, 1500), 1000, 5e-4)) == []  # from 1e-7 on it is counted
    assert starts(spike(np.zeros(1500), 1000, 2e-3)) == [1000]


def test_a_leap_to_less_than_a_thousandth_is_none() -> None:
    assert starts(spike(noisy(1e-7, 1500), 1000, 9e-4)) == []


def test_a_rise_within_the_noise_is_none() -> None:
    wild = noisy(3e-3, 3000, sigma=2.0)
    assert starts(wild) == []


def test_a_slow_rise_is_compared_with_what_was_long_before() -> None:
    rising = noisy(1e-7, 1500)
    rising[900:1000] = 1e-7 * np.exp(np.linspace(0, math.log(1e5), 100))
    rising[1000:1010] = 1e-2
    (start,) = starts(rising)
    assert 950 <= start <= 1001


@pytest.mark.parametrize(("again", "events"), [(1.0, 1), (1.5, 1), (300.0, 2)])
def test_after_a_slingshot_a_loss_that_goes_on_falling_begins_no_other_one(again: float, events: int) -> None:
    """It is far above the level before the slingshot for hundreds of steps; only a new rise counts."""
    loss = noisy(1e-7, 2500, sigma=0.01)
    tail = np.arange(700)
    loss[1000:1700] = np.maximum(5e-2 * np.exp(-tail / 20), 9e-3 * np.exp(-tail / 150))
    loss[1400:1410] *= again
    assert len(starts(loss)) == events


def test_a_language_model_that_loses_what_it_knew_has_one() -> None:
    assert starts(language_model()) == [1000]


def test_a_language_model_on_a_new_text_that_is_a_little_harder_has_none() -> None:
    harder = language_model()
    harder[999:] -= 1.4  # 2.05 → 2.35
    assert starts(harder) == []


def test_a_new_level_becomes_the_normal_one() -> None:
    loss = language_model(3000)
    loss[2499:2520] = 6.0
    assert starts(loss) == [1000, 2500]


@pytest.mark.parametrize(("usual", "height"), [(1e-4, 2.0), (2.0, 8.0), (1e-2, 1.0)])
def test_one_hard_minibatch_is_none(usual: float, height: float) -> None:
    assert starts(spike(noisy(usual, 1500), 1000, height, steps=1)) == []


def test_two_hard_minibatches_are_none_in_nats() -> None:
    assert starts(spike(noisy(2.0, 1500, 0.05), 1000, 4.0, steps=2)) == []
    assert starts(spike(noisy(2.0, 1500, 0.05), 1000, 4.0, steps=3)) == [1000]


def test_a_loss_that_is_thrown_up_and_down_is_one() -> None:
    chatter = noisy(3e-5, 1500)
    chatter[999:1011] = [0.2, 0.0, 0.16, 0.02, 0.1, 0.09, 0.002, 0.1, 0.05, 0.01, 0.1, 0.04]
    assert starts(chatter) == [1000]


def test_an_early_blip_on_the_way_down_is_none() -> None:
    loss = 2.3 * np.exp(-np.arange(1500) / 40.0) + 1e-4
    for first in (100, 130, 160):
        assert starts(spike(loss, first, 0.4, steps=8)) == []


def test_a_rise_that_goes_beyond_the_recent_past_is_one() -> None:
    loss = 2.3 * np.exp(-np.arange(1500) / 40.0) + 1e-6
    assert starts(spike(loss, 700, 0.5)) == [700]


def test_a_loss_of_two_players_has_none() -> None:
    walk = np.random.default_rng(0).standard_normal(2500).cumsum() * 0.05
    loss = np.concatenate([np.full(300, 5e-3), 1.0 + 0.3 * np.sin(walk)])
    assert starts(loss, floor=False) == []
    assert starts(loss) == [301]  # declared, not guessed


def test_a_discriminator_that_wins_early_and_is_caught_up_with_has_none() -> None:
    # As in a GAN on points of a circle: .05 at step 45, then around 1.
    noise = np.random.default_rng(1).standard_normal(2500)
    level = np.interp(np.arange(2500), [0, 30, 45, 80, 2500], [1.4, 0.2, 0.05, 0.9, 1.2])
    assert starts(level * np.exp(0.15 * noise)) == []


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_the_unit_of_a_regression_does_not_matter(unit: float) -> None:
    loss = spike(spike(noisy(1e-4, 2500), 1000, 0.3), 2000, 0.02)
    loss[:30] = 1.0
    assert starts(unit * loss, nats=False) == starts(loss, nats=False) == [1000]


def test_a_loss_below_zero_has_no_floor_to_leave() -> None:
    assert starts(spike(-3.0 - 0.1 * noisy(1.0, 1500), 1000, 5.0)) == []


def test_a_loss_that_is_no_number_is_an_event() -> None:
    assert starts(spike(noisy(1e-3, 1500), 1000, math.nan, steps=500)) == [1000]
    assert starts(spike(-noisy(1.0, 1500), 1000, math.inf, steps=2)) == [1000]


def test_an_event_ends_when_the_loss_has_been_low_for_a_while() -> None:
    loss = spike(spike(noisy(1e-5, 1500), 1000, 0.3), 1030, 0.3)  # an aftershock belongs to it
    steps = list(range(1, 1501))
    (event,) = slingshots(steps, loss.tolist(), TAU)
    assert (event.start, event.end) == (1000, 1039 + round(truth.recovery_steps(TAU)))


def test_readings_some_steps_apart_are_judged_alike() -> None:
    loss = spike(noisy(1e-4, 3000), 1500, 0.5, steps=30)
    found = slingshots(range(1, 3001, 5), loss[::5].tolist(), TAU)
    assert [event.start for event in found] == [1501]


@pytest.mark.parametrize(
    ("first", "second", "found"), [(0.05, 0.02, [1501]), (0.05, 1e-4, []), (0.02, 0.02, [])]
)
def test_a_rise_of_the_checked_loss_lasts_from_one_check_to_the_next(
    first: float, second: float, found: list[int]
) -> None:
    """A leap from 4e-5 to 0.05, which is 0.02 five steps later. From 0.02 on there is no leap."""
    checks = noisy(4e-5, 600)
    checks[300:303] = first, second, 1e-3
    events = slingshots(range(1, 3001, 5), checks.tolist(), TAU)
    assert [event.start for event in events] == found


@pytest.mark.parametrize("seed", range(8))
def test_a_language_model_whose_rise_is_within_the_noise_of_a_reading_has_one(seed: int) -> None:
    noise = 0.25 * np.random.default_rng(seed).standard_normal(1500)
    (start,) = starts(np.where(np.arange(1500) < 999, 1.7, 2.95) + noise)
    assert 995 <= start <= 1005


@pytest.mark.parametrize("seed", range(8))
def test_two_classes_that_are_no_longer_told_apart_are_a_collapse(seed: int) -> None:
    random = np.random.default_rng(seed)
    learned = np.interp(np.arange(1500), [0, 50, 800, 850, 1500], [0.7, 0.4, 0.4, 1.0, 1.0])
    assert len(starts(learned + 0.1 * random.standard_normal(1500))) == 1
    half = np.interp(np.arange(1500), [0, 50, 800, 850, 1500], [0.7, 0.4, 0.4, 0.6, 0.6])
    assert starts(half + 0.1 * random.standard_normal(1500)) == []


def test_half_a_nat_is_none() -> None:
    harder = language_model()
    harder[999:] -= 1.0  # 2.05 → 2.75
    assert starts(harder) == []


def test_a_leap_of_a_loss_that_is_no_cross_entropy_must_get_above_a_hundredth() -> None:
    loss = spike(noisy(1e-7, 1500), 1000, 5e-3)
    loss[:30] = 1.0
    assert starts(loss, nats=False) == [] and starts(loss) == [1000]
    assert starts(spike(loss, 1000, 2e-2), nats=False) == [1000]


def test_too_few_readings_have_none() -> None:
    assert starts(spike(noisy(1e-4, 100), 40, 0.5)) == [] and starts(np.empty(0)) == []


def test_near_misses_have_lower_levels() -> None:
    loss = spike(noisy(1e-5, 1500), 1000, 5e-3)
    assert starts(loss) == [] and starts(loss, levels=Levels().near()) == [1000]
