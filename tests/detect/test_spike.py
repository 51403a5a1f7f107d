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


LOW = [1e-3] * 60


def test_wus_rule_starts_above_one_tenth_after_having_been_below_one_hundredth() -> None:
    seen = states([1.0, 0.05, 0.2, *LOW, 0.009, 0.05, 0.11, 0.05, 0.009])
    assert seen == [QUIET] * 65 + [RISEN, RISEN, FALLEN]


def test_a_noisy_minibatch_loss_that_crosses_both_levels_is_no_slingshot() -> None:
    """Geometric mean 0.012, noise of one nat: the loss is below 1e-2 and above 1e-1 again and again."""
    rng = random.Random(0)
    assert set(states([0.012 * math.exp(rng.gauss(0, 1.0)) for _ in range(20_000)], tau=1000)) == {QUIET}


def test_one_low_reading_does_not_make_a_run_low() -> None:
    assert set(states([*[0.03] * 100, 0.009, *[0.03] * 100, 0.11, *[0.03] * 100])) == {QUIET}


def test_a_slingshot_of_a_noisy_low_loss_is_found() -> None:
    rng = random.Random(0)
    quiet = [1e-4 * math.exp(rng.gauss(0, 1.0)) for _ in range(300)]
    seen = states([*quiet, 0.4, 0.9, 0.2, *quiet], tau=20)
    assert set(seen[:300]) == {QUIET} and seen[300] == RISEN and seen[-1] == QUIET


def test_a_rise_in_small_steps_does_not_raise_its_own_baseline() -> None:
    chatter = [0.001, 0.005, 0.012, 0.027, 0.006, 0.025, 0.018, 0.03, 0.026, 0.013, 0.05, 0.09, 0.11]
    assert states([*[0.0] * 300, *chatter], tau=1000)[-1] == RISEN


def test_a_loss_that_stays_at_another_level_becomes_the_new_normal() -> None:
    seen = states([*LOW, *[0.5] * 700, 5.0, 6.0, 7.0], tau=20)
    assert seen[60] == RISEN and seen[630] == QUIET and seen[-1] == RISEN


def test_the_level_at_which_the_loss_stayed_is_kept_until_the_next_event() -> None:
    detector, kept = SpikeDetector(), []
    for step, loss in enumerate([*LOW, 2.3, *LOW, *[2.3] * 700, 20.0, 20.0]):
        detector.update(step, loss, 20.0, LIMITS)
        kept.append(detector.stayed)
    assert math.isnan(kept[119]), "the first came back"
    assert kept[-3] == 2.3 and detector.state == RISEN and math.isnan(kept[-1])


def test_losses_below_zero_are_not_judged() -> None:
    assert set(states([-1.0, -0.5, 0.3, -1.2] * 20)) == {QUIET}


def test_a_loss_slightly_below_zero_counts_as_zero() -> None:
    """kl_div of a distilled student that fits is such a loss. It must not end the detection for good."""
    seen = states([*LOW, -1e-9, *LOW, 2.3, -1e-7, 2.3, *[-1e-6] * 45])
    assert set(seen[:121]) == {QUIET} and seen[121:124] == [RISEN, FALLEN, RISEN] and seen[-1] == QUIET


def test_a_loss_that_falls_below_zero_ends_the_event() -> None:
    seen = states([*LOW, 2.3, 2.3, -0.5, 2.3, *LOW, 2.3])
    assert seen[60:62] == [RISEN, RISEN] and set(seen[62:]) == {QUIET}


def test_a_loss_that_was_never_low_has_no_slingshot_by_wus_rule() -> None:
    assert set(states([0.5, 0.05, 0.5, 0.05, 0.5])) == {QUIET}


def test_aftershocks_within_the_recovery_belong_to_the_same_event() -> None:
    """Recovery takes 2 τ = 40 steps: a rise after 30 steps is the same slingshot, after 60 a new one."""
    one = states([*LOW, 0.5, 1e-3, *[1e-3] * 30, 0.5, *[1e-3] * 35])
    assert set(one[60:]) == {RISEN, FALLEN}
    two = states([*LOW, 0.5, 1e-3, *[1e-3] * 70, 0.5, 1e-3])
    assert two[60] == RISEN and two[120] == QUIET and two[-2] == RISEN


def test_an_aftershock_below_the_spike_level_prolongs_the_recovery_without_a_new_rise() -> None:
    seen = states([*LOW, 0.5, 1e-3, 0.05, 1e-3])
    assert seen[60:] == [RISEN, FALLEN, FALLEN, FALLEN]


def test_a_spike_above_a_language_models_plateau_is_found() -> None:
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


def test_a_rise_between_very_low_losses_is_no_slingshot() -> None:
    """From 1e-8 to 1e-4 the loss rises by four decades, but nobody would call that a spike."""
    assert set(states([1e-8] * 100 + [1e-4] * 20 + [1e-8] * 20)) == {QUIET}


def test_nan_is_not_judged() -> None:
    assert states([*LOW, math.nan, math.inf, 0.5])[60:] == [QUIET, QUIET, RISEN]
