"""Test that an unusual loss makes the detector read the next steps, and never begins an alert."""

from __future__ import annotations

import json
import math
import random

import pytest

from nfi_monitor.detect.attention import Attention
from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.loss_watch import BLOCK, FALLS, LEAP, STEPS, LossWatch
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.detect.spike import MEMORY
from nfi_monitor.engine.schedule import next_read
from nfi_monitor.types import Reading, Thresholds

LIMITS = Thresholds()


def feed(losses, *, watch=None, first=1):
    """Return the steps at which the loss was unusual."""
    watch = watch or LossWatch()
    return [step for step, loss in enumerate(losses, start=first) if watch.update(step, loss, LIMITS)]


@pytest.mark.parametrize("size", [0.01, 2.0])
def test_a_rise_after_eight_falls_is_unusual_for_a_loss_of_any_size(size):
    falling = [size * (1 - 0.01 * step) for step in range(FALLS + 1)]
    assert feed([*falling, falling[-1] + 1e-9]) == [FALLS + 2]
    assert feed([*falling[:-1], falling[-2] + 1e-9]) == []


def test_a_low_loss_that_leaves_its_recent_range_is_unusual():
    level = [0.02, 0.021] * BLOCK
    assert feed([*level, 0.021 * LEAP + 1e-6]) == [2 * BLOCK + 1]
    assert feed([*level, 0.021 * LEAP - 1e-6]) == []
    high = [100.0 * loss for loss in level]
    assert feed([*high, 2.1 * LEAP + 1e-6]) == []


def test_a_loss_is_not_compared_with_losses_more_than_two_blocks_ago():
    level = [0.09, *[0.02, 0.021] * (3 * BLOCK // 2)]
    assert feed([*level, 0.04]) == [len(level) + 1]
    assert feed([0.02, 0.021] * (BLOCK // 4) + [0.09] + [0.02, 0.021] * (BLOCK // 4) + [0.04]) == []


def test_differences_between_nearly_zero_losses_are_not_unusual():
    """1e-9 and 9e-6 count as the same loss: both are far below where a slingshot starts."""
    assert feed([0.0, 1e-9] * BLOCK + [1e-6, 9e-6, 1.4e-5]) == []
    assert feed([0.0, 1e-9] * BLOCK + [1.6e-5]) == [2 * BLOCK + 1]


def test_fewer_than_five_in_a_thousand_noisy_minibatch_losses_are_unusual():
    generator = random.Random(0)
    losses = [math.exp(generator.gauss(-3.0, 0.1)) for _ in range(20_000)]
    assert len(feed(losses)) < 0.005 * len(losses)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("level", [1e-6, 1e-4, 1e-2])
def test_a_noisy_low_loss_is_unusual_at_most_three_times_in_a_hundred(level, sigma):
    """Each time, the loss must leave its range farther. So a run that fits minibatches is read rarely."""
    generator = random.Random(0)
    losses = [level * math.exp(generator.gauss(0, sigma)) for _ in range(20_000)]
    assert len(feed(losses)) < 0.03 * len(losses)


def test_a_loss_in_another_unit_is_unusual_at_the_same_steps():
    generator = random.Random(0)
    losses = [math.exp(generator.gauss(-6.0, 1.0)) for _ in range(3000)]
    watches = LossWatch(), LossWatch()
    seen = [watches[0].update(step, loss, LIMITS) for step, loss in enumerate(losses, 1)]
    told = [watches[1].update(step, 1e3 * loss, LIMITS, unit=1e3) for step, loss in enumerate(losses, 1)]
    assert seen[2 * MEMORY :] == told[2 * MEMORY :] and any(seen[2 * MEMORY :])


def test_every_step_is_read_while_a_slingshot_may_be_starting():
    detector = Detector(context=RunContext(beta2=0.999))
    for step in range(1, 300):
        detector.update(Reading(step, {"loss": 1e-3}))
    assert detector.attention is Attention.RARELY
    detector.update(Reading(300, {"loss": 0.5}))
    assert detector.spike.streak == 1 and detector.attention is Attention.ALWAYS


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_are_skipped(bad):
    falling = [0.02 - 1e-4 * step for step in range(FALLS + 1)]
    assert feed([*falling[:4], bad, *falling[4:], 0.03]) == [FALLS + 3]


def test_a_step_counts_once_and_a_counter_that_is_set_back_starts_again():
    watch = LossWatch()
    falling = [0.02 - 1e-4 * step for step in range(FALLS + 1)]
    feed(falling, watch=watch, first=1000)
    assert not watch.update(1000, 1.0, LIMITS)  # seen already
    assert watch.update(1000 + FALLS + 1, 0.03, LIMITS)
    assert watch.until == 1000 + FALLS + 1 + STEPS
    watch.update(3, 0.03, LIMITS)
    assert watch.until == 0


def test_after_an_unusual_loss_a_few_steps_are_read_and_no_alert_begins():
    detector = Detector(context=RunContext(beta2=0.999))
    losses = [0.02 - 1e-4 * step for step in range(FALLS + 60)]
    losses[FALLS + 1] = losses[FALLS] * 1.01
    attention = []
    for step, loss in enumerate(losses, start=1):
        assert not detector.update(Reading(step, {"loss": loss})).changes
        attention.append(detector.attention)
    unusual = FALLS + 2
    assert attention[: unusual - 1] == [Attention.RARELY] * (unusual - 1)
    assert attention[unusual - 1 : unusual - 1 + STEPS] == [Attention.ALWAYS] * STEPS
    assert set(attention[unusual - 1 + STEPS :]) == {Attention.RARELY}


def test_attention_falls_again_when_no_more_losses_come():
    detector = Detector(context=RunContext(beta2=0.999))
    for step, loss in enumerate([0.02 - 1e-4 * step for step in range(FALLS + 1)] + [0.03], start=1):
        detector.update(Reading(step, {"loss": loss}))
    assert detector.attention is Attention.ALWAYS
    for step in range(FALLS + 3, FALLS + 3 + STEPS):
        detector.update(Reading(step, {"weight_norm": 1.0}))
    assert detector.attention is Attention.RARELY


def test_the_state_survives_a_checkpoint():
    detector, again = Detector(), Detector()
    for step in range(1, FALLS + 2):
        detector.update(Reading(step, {"loss": 0.02 - 1e-4 * step}))
    again.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    for each in (detector, again):
        each.update(Reading(FALLS + 2, {"loss": 0.03}))
    assert again.attention is detector.attention is Attention.ALWAYS
    assert again.loss_watch.state_dict() == detector.loss_watch.state_dict()
    assert next_read(FALLS + 2, "auto", again.attention, 1000.0) == FALLS + 3
