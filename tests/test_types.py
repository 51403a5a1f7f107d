from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nfi_monitor.types import (
    Alert,
    AlertKind,
    AlertState,
    Mechanism,
    Outcome,
    Phase,
    Severity,
    Thresholds,
)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "much"])
def test_a_threshold_that_makes_no_sense_is_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"Thresholds\.absorbing_enter must be a positive finite number"):
        Thresholds(absorbing_enter=value)  # type: ignore[arg-type]


def test_thresholds_without_hysteresis_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"absorbing_exit \(0\.2\) must be below .*hysteresis"):
        Thresholds(absorbing_exit=0.2)


def test_severities_compare_by_rank() -> None:
    assert Severity.INFO.rank < Severity.WARNING.rank < Severity.CRITICAL.rank


ALERT = Alert(
    "imminent-1", AlertKind.IMMINENT, Severity.CRITICAL, AlertState.RESOLVED, Phase.SLINGSHOT, 10, 90,
    Mechanism.UNKNOWN, 0.5,
)  # fmt: skip


@pytest.mark.parametrize("outcome, step", [(None, None), (Outcome.SLINGSHOT, 88), (Outcome.PASSED, None)])
def test_the_outcome_of_a_warning_survives_json(outcome: Outcome | None, step: int | None) -> None:
    alert = replace(ALERT, outcome=outcome, outcome_step=step)
    assert Alert.from_json(json.loads(json.dumps(alert.to_json()))) == alert


def test_an_alert_of_an_earlier_version_has_no_outcome() -> None:
    record = ALERT.to_json()
    del record["outcome"], record["outcome_step"]
    assert Alert.from_json(record) == ALERT


@pytest.mark.parametrize(
    "levels",
    [{"spike_floor": 1e-2}, {"spike_leap_loss": 0.2}, {"spike_low": 0.2}, {"spike_burst": 4.0}],
)
def test_levels_of_a_slingshot_that_are_out_of_order_are_refused(levels: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be below"):
        Thresholds(**levels)
