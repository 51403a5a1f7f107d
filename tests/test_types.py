from __future__ import annotations

import pytest

from nfi_monitor.types import Severity, Thresholds


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "much"])
def test_a_threshold_that_makes_no_sense_is_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"Thresholds\.absorbing_enter must be a positive finite number"):
        Thresholds(absorbing_enter=value)  # type: ignore[arg-type]


def test_thresholds_without_hysteresis_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"absorbing_exit \(0\.2\) must be below .*hysteresis"):
        Thresholds(absorbing_exit=0.2)


def test_severities_compare_by_rank() -> None:
    assert Severity.INFO.rank < Severity.WARNING.rank < Severity.CRITICAL.rank
