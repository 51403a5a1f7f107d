from __future__ import annotations

import math
import random
from collections.abc import Sequence

from nfi_monitor.detect.spike import FALLEN, QUIET, RISEN, SpikeDetector
from nfi_monitor.types import Thresholds

LIMITS = Thresholds()


def states(losses: Sequence[float], tau: float = 20.0) -> list[str]:
    detector = SpikeDetector()
    return [detector.update(step, loss, tau, LIMITS) for step, loss in enumerate(losses)]


def test_wus_rule_starts_above_one_tenth_after_having_been_below_one_hundredth() -> None:
    seen = states([1.0, 0.05, 0.2, 0.009, 0.05, 0.11, 0.05, 0.009])
    assert seen == [QUIET] * 5 + [RISEN, RISEN, FALLEN]


def test_a_loss_that_never_was_low_cannot_slingshot_by_wus_rule() -> None:
    assert set(states([0.5, 0.05, 0.5, 0.05, 0.5])) == {QUIET}


def test_aftershocks_within_the_recovery_belong_to_the_same_event() -> None:
    """Recovery is 2 τ = 40 steps: a second rise 30 steps on is the same slingshot, one 60 steps on is not."""
    one = states([1e-3, 0.5, 1e-3, *[1e-3] * 30, 0.5, *[1e-3] * 45])
    assert one.count(QUIET) == 1 + one[::-1].index(FALLEN)
    two = states([1e-3, 0.5, 1e-3, *[1e-3] * 60, 0.5, 1e-3])
    assert two[60] == QUIET and two[63] == RISEN


def test_an_aftershock_below_the_spike_level_prolongs_the_recovery_without_a_new_rise() -> None:
    seen = states([1e-3, 0.5, 1e-3, 0.05, 1e-3])
    assert seen == [QUIET, RISEN, FALLEN, FALLEN, FALLEN]


def test_a_language_models_plateau_spikes_by_its_own_past() -> None:
    rng = random.Random(0)
    plateau = [3.0 * math.exp(rng.gauss(0, 0.02)) for _ in range(400)]
    spike = [8.0, 9.0, 8.5, 7.0]
    seen = states([*plateau, *spike, *plateau[:100]], tau=20)
    assert set(seen[:400]) == {QUIET}
    assert seen[401] == RISEN
    assert seen[-1] == QUIET


def test_one_bad_minibatch_is_no_slingshot() -> None:
    rng = random.Random(0)
    plateau = [3.0 * math.exp(rng.gauss(0, 0.02)) for _ in range(200)]
    assert set(states([*plateau, 20.0, *plateau])) == {QUIET}


def test_rises_too_small_to_see_are_not_slingshots() -> None:
    """1e-8 to 1e-4 is four decades and nothing anybody would call a spike."""
    assert set(states([1e-8] * 100 + [1e-4] * 20 + [1e-8] * 20)) == {QUIET}


def test_nan_is_not_judged() -> None:
    assert states([1e-3, math.nan, math.inf, 0.5]) == [QUIET, QUIET, QUIET, RISEN]
