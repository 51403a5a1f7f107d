from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nfi_monitor.detect.causes import Causes
from nfi_monitor.detect.mechanism import name_mechanism
from nfi_monitor.detect.signals import Signals
from nfi_monitor.detect.situation import RunContext, Situation
from nfi_monitor.detect.spike import SpikeDetector
from nfi_monitor.types import Mechanism, Thresholds

QUIET = Causes(
    step=1,
    violation=1e-8,
    no_classes=False,
    on=(),
    gone=False,
    decay=0.0,
    curvature=1.0,
    stability_limit=38.0,
    learning_rate_jump=1.0,
    update_jump=2.0,
    rms_t=1.0,
)


def name(**signals: object) -> Mechanism:
    return name_mechanism(replace(QUIET, **signals))[0]


def test_a_broken_zero_sum_names_numerical_feature_inflation_whatever_the_other_signals_are() -> None:
    assert name(violation=0.3, on=("coasting", "kicking"), decay=-2.0, curvature=90.0) is (
        Mechanism.NUMERICAL_FEATURE_INFLATION
    )


def test_coasting_with_a_decayed_second_moment_names_the_second_moment() -> None:
    assert name(on=("coasting",), decay=-0.5) is Mechanism.SECOND_MOMENT


def test_a_curvature_above_the_stability_limit_names_the_edge_of_stability() -> None:
    assert name(curvature=50.0, on=("kicking",)) is Mechanism.EDGE_OF_STABILITY


def test_opposing_gradients_name_the_edge_of_stability_below_the_stability_limit_too() -> None:
    assert name(on=("swinging",), curvature=5.0) is Mechanism.EDGE_OF_STABILITY


@pytest.mark.parametrize("rules", [("kicking",), ("swinging",), ("kicking", "swinging")])
def test_a_kick_or_a_swing_names_the_second_moment_only_after_a_vanished_gradient(
    rules: tuple[str, ...],
) -> None:
    """In the last steps both look alike: a kick makes the weights swing, and a swing raises RMS_t."""
    assert name(on=rules, decay=-1.0, gone=True) is Mechanism.SECOND_MOMENT
    assert name(on=("coasting", *rules), decay=-1.0) is Mechanism.EDGE_OF_STABILITY
    no_decay = "the second moment has not decayed"
    assert name(on=rules, decay=-0.1, gone=True) is Mechanism.EDGE_OF_STABILITY, no_decay


def test_a_jump_of_the_learning_rate_names_an_external_cause_whatever_follows() -> None:
    assert name(learning_rate_jump=10.0, curvature=90.0, on=("swinging",)) is Mechanism.EXTERNAL
    assert name(learning_rate_jump=2.0, curvature=90.0) is Mechanism.EDGE_OF_STABILITY


def test_a_rise_of_the_loss_after_an_ordinary_update_names_an_external_cause() -> None:
    assert name(update_jump=1.1) is Mechanism.EXTERNAL
    assert name(update_jump=1.1, rms_t=3.0) is Mechanism.UNKNOWN
    assert name(update_jump=math.nan) is Mechanism.UNKNOWN, "an update that was not measured proves nothing"


def test_without_evidence_the_mechanism_is_unknown() -> None:
    assert name_mechanism(QUIET) == (Mechanism.UNKNOWN, 0.0)
    assert name(violation=math.nan) is Mechanism.UNKNOWN


def test_an_unmeasured_zero_sum_makes_other_mechanisms_less_certain() -> None:
    seen = name_mechanism(replace(QUIET, on=("coasting",), decay=-1.0))[1]
    unseen = name_mechanism(replace(QUIET, on=("coasting",), decay=-1.0, violation=math.nan))[1]
    one_output = name_mechanism(
        replace(QUIET, on=("coasting",), decay=-1.0, violation=math.nan, no_classes=True)
    )[1]
    assert unseen < seen == one_output


def test_confidence_grows_with_the_violation() -> None:
    confidences = [name_mechanism(replace(QUIET, violation=v))[1] for v in (0.05, 0.1, 0.2, 0.9)]
    assert confidences == sorted(confidences) and confidences[0] == 0.6 and confidences[-1] == 0.95


def test_causes_saved_by_version_0_1_are_read() -> None:
    state = {**QUIET.state_dict(), "kicked": True, "coasting": False, "swinging": True}
    del state["on"], state["gone"], state["step"]
    read = Causes.from_state(state)
    assert set(read.on) == {"kicking", "swinging"} and (read.gone, read.step) == (False, 0)


def test_causes_survive_a_checkpoint() -> None:
    causes = replace(QUIET, on=("coasting",), decay=-0.4)
    assert Causes.from_state(causes.state_dict()) == causes


@pytest.mark.parametrize(
    ("step", "gone_at", "decay", "expected"),
    [
        (1000, 930, -0.5, True),
        (1000, 910, -0.5, False),  # 4.5 τ ago
        (1000, -math.inf, -1.6, True),  # only a vanished gradient lets sqrt(v̂) fall so far
        (1000, -math.inf, -1.4, False),
        (30, 20, -1.6, False),  # the second moment has not learned anything to forget
    ],
)
def test_a_gradient_has_vanished_for_four_tau_or_if_the_second_moment_has_fallen_far(
    step: int, gone_at: float, decay: float, expected: bool
) -> None:
    signals = Signals()
    signals.last_step, signals.gone_at, signals.decay_lowest = step, gone_at, decay
    now = Situation(Thresholds(), RunContext(beta2=0.95), signals, SpikeDetector(), {})
    assert now.gradient_vanished is expected


def test_a_slingshot_ends_what_the_gradient_did_before() -> None:
    signals = Signals()
    signals.gone_at = 100
    signals.restart()
    assert signals.gone_at == -math.inf
