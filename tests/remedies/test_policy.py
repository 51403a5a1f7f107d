"""When the Autopilot may do what: the decision alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nfi_monitor.remedies.policy import FEWEST, Policy, Rung
from nfi_monitor.types import Alert, AlertKind, AlertState, Mechanism, Phase, Severity

NUMERIC, SECOND_MOMENT = Mechanism.NUMERICAL_FEATURE_INFLATION, Mechanism.SECOND_MOMENT
EDGE, EXTERNAL, UNKNOWN = Mechanism.EDGE_OF_STABILITY, Mechanism.EXTERNAL, Mechanism.UNKNOWN


def alert(kind: AlertKind, mechanism: Mechanism = NUMERIC, severity: Severity = Severity.WARNING) -> Alert:
    return Alert(
        f"{kind}-1", kind, severity, AlertState.FIRING, Phase.INFLATING, 100, 100, mechanism, 0.9
    )  # fmt: skip


AT_RISK, IMMINENT = alert(AlertKind.AT_RISK), alert(AlertKind.IMMINENT)
SLINGSHOT, NON_FINITE = alert(AlertKind.SLINGSHOT), alert(AlertKind.NON_FINITE, UNKNOWN)


@pytest.mark.parametrize(("given", "advised"), [
    (replace(AT_RISK, severity=Severity.INFO), ()),
    (AT_RISK, (Rung.LOSS,)),
    (IMMINENT, (Rung.LOSS, Rung.COOL)),
    (SLINGSHOT, (Rung.LOSS,)),
    (alert(AlertKind.AT_RISK, SECOND_MOMENT), ()),
    (alert(AlertKind.IMMINENT, SECOND_MOMENT), (Rung.COOL,)),
    (alert(AlertKind.IMMINENT, EDGE), (Rung.COOL,)),
    (alert(AlertKind.IMMINENT, UNKNOWN), (Rung.COOL,)),
    (alert(AlertKind.IMMINENT, EXTERNAL), ()),
    (alert(AlertKind.SLINGSHOT, EDGE), ()),
    (NON_FINITE, ()),  # in the loss alone
    (replace(NON_FINITE, severity=Severity.CRITICAL), (Rung.STOP,)),
    (replace(IMMINENT, state=AlertState.RESOLVED), ()),
])  # fmt: skip
def test_each_alert_gets_what_its_mechanism_needs_and_no_more(
    given: Alert, advised: tuple[Rung, ...]
) -> None:
    assert Policy().advised(given) == advised


@pytest.mark.parametrize(("loss_at", "first"), [
    ("at_risk", "info"), ("warning", "warning"), ("imminent", "imminent"), ("slingshot", "slingshot"),
    ("never", None),
])  # fmt: skip
def test_the_loss_is_exchanged_at_the_alert_that_the_policy_names_and_at_later_ones(
    loss_at: str, first: str | None
) -> None:
    alerts = {
        "info": replace(AT_RISK, severity=Severity.INFO),
        "warning": AT_RISK,
        "imminent": IMMINENT,
        "slingshot": SLINGSHOT,
    }
    policy = Policy(loss_at=loss_at)
    due = [name for name, given in alerts.items() if Rung.LOSS in policy.advised(given)]
    assert due == ([] if first is None else list(alerts)[list(alerts).index(first) :])


def test_a_policy_without_cooling_or_an_end_never_asks_for_them() -> None:
    policy = Policy(cool=False, stop="never")
    for kind in AlertKind:
        given = alert(kind)
        assert {Rung.COOL, Rung.STOP}.isdisjoint(policy.advised(given))
        for last in (None, *Rung):
            assert policy.next_rung(given, last, Phase.INFLATING) is None


@pytest.mark.parametrize(("given", "last", "phase", "following"), [
    (AT_RISK, Rung.LOSS, Phase.INFLATING, Rung.COOL),  # the feature mean still grows
    (AT_RISK, Rung.LOSS, Phase.ABSORBING, None),  # rows absorb, and nothing grows: that can last
    (AT_RISK, Rung.COOL, Phase.INFLATING, None),  # no reason to end a run
    (IMMINENT, Rung.COOL, Phase.IMMINENT, Rung.STOP),
    (IMMINENT, Rung.STOP, Phase.IMMINENT, None),
    (SLINGSHOT, Rung.LOSS, Phase.SLINGSHOT, Rung.STOP),  # the loss does not come back
    (SLINGSHOT, Rung.LOSS, Phase.RECOVERING, None),  # it is back
    (replace(IMMINENT, state=AlertState.RESOLVED), Rung.COOL, Phase.HEALTHY, None),
])  # fmt: skip
def test_what_outlasts_the_patience_gets_the_next_rung(
    given: Alert, last: Rung, phase: Phase, following: Rung | None
) -> None:
    assert Policy().next_rung(given, last, phase) is following


def test_times_are_in_tau_with_a_floor_and_a_repeated_cool_down_is_held_twice_as_long() -> None:
    policy = Policy(hold=2.0, patience=5.0)
    assert policy.patience_in_steps(20.0) == FEWEST and policy.patience_in_steps(1000.0) == 5000
    assert [policy.hold_in_steps(20.0, repeated) for repeated in (0, 1, 2, 3, 9)] == [40, 80, 160, 320, 320]
    assert policy.hold_in_steps(1.0, 0) == 10


@pytest.mark.parametrize(("options", "message"), [
    ({"loss_at": "always"}, "loss_at='always': use one of 'at_risk', 'warning'"),
    ({"stop": True}, "stop=True: use one of 'never', 'flag', 'raise'"),
    ({"factor": 1.0}, "factor must be between 0 and 1, got 1.0"),
    ({"hold": -1.0}, "hold must be a positive finite number, got -1.0"),
    ({"patience": float("inf")}, "patience must be a positive finite number, got inf"),
])  # fmt: skip
def test_a_policy_that_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**options)
