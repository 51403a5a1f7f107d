"""The loss, which comes at every step, says when to look closely; it is never an alarm."""

from __future__ import annotations

import json
import math
import random

import pytest

from nfi_monitor.detect.detector import Attention, Detector
from nfi_monitor.detect.loss_watch import BLOCK, FALLS, LEAP, STEPS, LossWatch
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.engine.schedule import next_read
from nfi_monitor.types import Reading, Thresholds

LIMITS = Thresholds()


def feed(losses, *, watch=None, first=1):
    """The steps at which it stirred."""
    watch = watch or LossWatch()
    return [step for step, loss in enumerate(losses, start=first) if watch.update(step, loss, LIMITS)]


@pytest.mark.parametrize("size", [0.01, 2.0])
def test_a_loss_that_fell_steadily_and_rises_stirs_whatever_its_size(size):
    falling = [size * (1 - 0.01 * step) for step in range(FALLS + 1)]
    assert feed([*falling, falling[-1] + 1e-9]) == [FALLS + 2]
    assert feed([*falling[:-1], falling[-2] + 1e-9]) == []


def test_a_low_loss_that_leaves_what_it_was_of_late_stirs():
    level = [0.02, 0.021] * BLOCK
    assert feed([*level, 0.021 * LEAP + 1e-6]) == [2 * BLOCK + 1]
    assert feed([*level, 0.021 * LEAP - 1e-6]) == []
    high = [100.0 * loss for loss in level]
    assert feed([*high, 2.1 * LEAP + 1e-6]) == []


def test_what_a_loss_was_two_blocks_ago_is_forgotten():
    level = [0.09, *[0.02, 0.021] * (3 * BLOCK // 2)]
    assert feed([*level, 0.04]) == [len(level) + 1]
    assert feed([0.02, 0.021] * (BLOCK // 4) + [0.09] + [0.02, 0.021] * (BLOCK // 4) + [0.04]) == []


def test_a_loss_of_next_to_nothing_makes_no_leap_of_the_next():
    """1e-9 and 1e-5 are the same loss: both far below where a slingshot starts."""
    assert feed([0.0, 1e-9] * BLOCK + [1e-5, 9e-5, 1.4e-4]) == []
    assert feed([0.0, 1e-9] * BLOCK + [1.6e-4]) == [2 * BLOCK + 1]


def test_noise_of_minibatches_stirs_seldom():
    generator = random.Random(0)
    losses = [math.exp(generator.gauss(-3.0, 0.1)) for _ in range(20_000)]
    assert len(feed(losses)) < 0.005 * len(losses)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_passed_over(bad):
    falling = [0.02 - 1e-4 * step for step in range(FALLS + 1)]
    assert feed([*falling[:4], bad, *falling[4:], 0.03]) == [FALLS + 3]


def test_a_step_is_looked_at_once_and_a_counter_that_is_set_back_starts_anew():
    watch = LossWatch()
    falling = [0.02 - 1e-4 * step for step in range(FALLS + 1)]
    feed(falling, watch=watch, first=1000)
    assert not watch.update(1000, 1.0, LIMITS)  # seen already
    assert watch.update(1000 + FALLS + 1, 0.03, LIMITS)
    assert watch.until == 1000 + FALLS + 1 + STEPS
    watch.update(3, 0.03, LIMITS)
    assert watch.until == 0


def test_attention_is_close_for_a_few_steps_and_no_alarm_is_raised():
    detector = Detector(context=RunContext(beta2=0.999))
    losses = [0.02 - 1e-4 * step for step in range(FALLS + 60)]
    losses[FALLS + 1] = losses[FALLS] * 1.01
    attention = []
    for step, loss in enumerate(losses, start=1):
        assert not detector.update(Reading(step, {"loss": loss})).changes
        attention.append(detector.attention)
    stirred = FALLS + 2
    assert attention[: stirred - 1] == [Attention.RARELY] * (stirred - 1)
    assert attention[stirred - 1 : stirred - 1 + STEPS] == [Attention.ALWAYS] * STEPS
    assert set(attention[stirred - 1 + STEPS :]) == {Attention.RARELY}


def test_a_loss_that_is_told_no_more_does_not_keep_attention_close():
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
