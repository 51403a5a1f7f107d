"""Which arm's silence names which mechanism."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from nfi_monitor.replay.verdict import Outcome, ReplayVerdict, judge, margin
from nfi_monitor.types import Mechanism

SPIKE = 150


def outcomes(*silent: str, idle: tuple[str, ...] = (), baseline: int | None = SPIKE) -> dict[str, Outcome]:
    arms = (
        "nudged",
        "float64_loss",
        "zero_sum",
        "lr_held",
        "other_data",
        "second_moment_held",
        "smaller_lr",
        "larger_eps",
    )
    found = {"as_it_was": Outcome("as_it_was", baseline, 1.0, (1.0,), 50, rate_jump=10.0)}
    for arm in arms:
        found[arm] = Outcome(arm, None if arm in silent else SPIKE, 1.0, (1.0,), 90, arm not in idle)
    return found


@pytest.mark.parametrize(
    ("silent", "mechanism"),
    [
        (("float64_loss",), Mechanism.NUMERICAL_FEATURE_INFLATION),
        (("zero_sum", "smaller_lr"), Mechanism.NUMERICAL_FEATURE_INFLATION),
        (("float64_loss", "lr_held", "second_moment_held"), Mechanism.NUMERICAL_FEATURE_INFLATION),
        (("lr_held", "second_moment_held", "smaller_lr"), Mechanism.EXTERNAL),
        (("other_data", "smaller_lr"), Mechanism.EXTERNAL),
        (("second_moment_held", "smaller_lr", "larger_eps"), Mechanism.SECOND_MOMENT),
        (("smaller_lr",), Mechanism.EDGE_OF_STABILITY),
        (("larger_eps",), Mechanism.UNKNOWN),
        (("nudged", "float64_loss", "smaller_lr"), Mechanism.UNKNOWN),
        ((), Mechanism.UNKNOWN),
    ],
)
def test_the_most_specific_arm_that_averts_names_the_mechanism(
    silent: tuple[str, ...], mechanism: Mechanism
) -> None:
    assert judge(outcomes(*silent), 100, tau=20.0)[0] is mechanism


def test_an_arm_that_changed_nothing_averts_nothing() -> None:
    mechanism, reasons = judge(outcomes("float64_loss", "smaller_lr", idle=("float64_loss",)), 100, tau=20.0)
    assert mechanism is Mechanism.EDGE_OF_STABILITY
    assert not any("float64" in reason for reason in reasons)


def test_without_a_slingshot_as_it_was_nothing_is_concluded() -> None:
    found = {"as_it_was": Outcome("as_it_was", None, 0.1, (0.1,), 50)}
    assert judge(found, 100, tau=20.0) == (
        Mechanism.UNKNOWN,
        ["the slingshot did not happen again: the unchanged run has none in the 50 steps after step 100"],
    )


def test_the_reasons_say_what_was_asked_in_the_order_it_was() -> None:
    assert judge(outcomes("second_moment_held"), 100, tau=20.0)[1] == [
        "unchanged, the run has the slingshot at step 150",
        "float64 loss and zero sum do not avert it",
        "lr held does not avert it",
        "other data does not avert it",
        "second moment held averts it: a second moment that has decayed is the cause",
    ]


def test_a_snapshot_too_late_for_float64_is_no_proof_against_rounding() -> None:
    assert "0.5 τ before" in judge(outcomes(), 140, tau=20.0)[1][-2]
    assert not any("too late" in reason for reason in judge(outcomes(), 100, tau=20.0)[1])


def test_the_margin_is_two_tau_and_at_least_twenty_steps() -> None:
    assert [margin(tau) for tau in (1.0, 10.0, 20.0, 1000.0)] == [20, 20, 40, 2000]


def test_a_verdict_survives_json_with_losses_that_are_not_finite() -> None:
    outcome = Outcome("as_it_was", 7, 3.0, (1.0, 3.0, math.inf, math.nan), 4, applied=False)
    verdict = ReplayVerdict(5, {"as_it_was": outcome}, Mechanism.EXTERNAL, ("why",), None, "slingshot-1")
    back = ReplayVerdict.from_json(json.loads(json.dumps(verdict.to_json(), allow_nan=False)))
    assert back.to_json() == verdict.to_json()
    assert back.mechanism is Mechanism.EXTERNAL and back.slingshot == "slingshot-1" and back.spiked_at == 7
    assert back.outcomes["as_it_was"].losses[:2] == (1.0, 3.0)
    assert math.isnan(back.outcomes["as_it_was"].losses[2]) and not back.outcomes["as_it_was"].applied


def test_a_rate_that_only_rose_is_a_smaller_rate_and_no_kick() -> None:
    found = outcomes("lr_held", "smaller_lr")
    found["as_it_was"] = Outcome("as_it_was", SPIKE, 1.0, (1.0,), 50, rate_jump=1.9)
    mechanism, reasons = judge(found, 100, 20.0)
    assert mechanism is Mechanism.EDGE_OF_STABILITY
    assert any("the rate only rose" in reason for reason in reasons)


def test_what_an_arm_has_to_say_stands_beside_what_it_averted() -> None:
    found = outcomes("second_moment_held")
    found["second_moment_held"] = replace(found["second_moment_held"], note="given back 10 times")
    reasons = judge(found, 100, tau=20.0)[1]
    averted = next(n for n, reason in enumerate(reasons) if reason.startswith("second moment held averts"))
    assert reasons[averted + 1] == "given back 10 times"
    assert Outcome.from_json(found["second_moment_held"].to_json()).note == "given back 10 times"
