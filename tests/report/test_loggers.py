"""What reaches a framework's loggers and the services that notify people."""

from __future__ import annotations

import enum
import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from nfi_monitor.report.loggers import TITLE, AlertLog, ScalarLog, notifiers
from nfi_monitor.types import Alert, AlertKind, AlertState, Change, Mechanism, Phase, Reading, Severity

ALERT = Alert(
    "at_risk-1", AlertKind.AT_RISK, Severity.INFO, AlertState.FIRING, Phase.ABSORBING, 5, 5,
    Mechanism.NUMERICAL_FEATURE_INFLATION, 0.8, advice=("Compute the loss in float64.",),
)  # fmt: skip


def test_scalars_are_thinned_but_a_change_of_phase_is_logged_at_once() -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    sink = ScalarLog(lambda values, step: logged.append((step, values)), every=10)
    for step in range(1, 31):
        phase = Phase.HEALTHY if step < 14 else Phase.ABSORBING
        sink.reading(Reading(step, {"loss": float(step), "margin_min": math.inf}), phase)
    assert [step for step, _ in logged] == [1, 11, 14, 24]
    assert logged[2][1] == {"nfi/loss": 14.0, "nfi/margin_min": math.inf, "nfi/phase": 1.0}


def test_an_alert_is_told_when_it_begins_becomes_more_severe_and_ends() -> None:
    told: list[tuple[Change, Severity]] = []
    sink = AlertLog(lambda alert, change: told.append((change, alert.severity)))
    worse = replace(ALERT, severity=Severity.WARNING)
    for alert, change in (
        (ALERT, Change.BEGIN), (ALERT, Change.UPDATE), (worse, Change.UPDATE), (worse, Change.UPDATE),
        (ALERT, Change.UPDATE), (replace(worse, state=AlertState.RESOLVED), Change.END),
    ):  # fmt: skip
        sink.alert(alert, change)
    expected = [
        (Change.BEGIN, Severity.INFO),
        (Change.UPDATE, Severity.WARNING),
        (Change.END, Severity.WARNING),
    ]
    assert told[:2] + told[-1:] == expected and len(told) == 3


@pytest.mark.parametrize(
    ("severity", "level"), [(Severity.INFO, "INFO"), (Severity.WARNING, "WARN"), (Severity.CRITICAL, "ERROR")]
)
def test_each_severity_has_its_level_at_each_service_and_nobody_is_woken_by_an_end(
    severity: Severity, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AlertLevel(str, enum.Enum):
        """As trackio declares it."""

        INFO = "info"
        WARN = "warn"
        ERROR = "error"

    calls: list[dict[str, Any]] = []

    def record(**given: Any) -> None:
        calls.append(given)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(alert=record)))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(alert=record, AlertLevel=AlertLevel))
    sinks = notifiers(["tensorboard", "wandb", "trackio", "wandb"])
    for sink in sinks:
        sink.alert(replace(ALERT, severity=severity, id="x" * 99), Change.BEGIN)
        sink.alert(ALERT, Change.END)
    assert [call["level"] for call in calls] == [level, AlertLevel[level]]
    assert {len(call["title"]) for call in calls} == {TITLE}
    assert all("Compute the loss in float64." in call["text"] for call in calls)


def test_wandb_without_a_run_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    notifiers(["wandb"])[0].alert(ALERT, Change.BEGIN)
