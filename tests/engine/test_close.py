"""A monitor that closes while an alert fires says so, everywhere."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from nfi_monitor import Alert, AlertState, Change, Monitor, Outcome, SinkBase
from nfi_monitor.report.run_directory.reader import read_run

STEPS = 6


class Kept(SinkBase):
    def __init__(self) -> None:
        self.alerts: list[tuple[Alert, Change]] = []

    def alert(self, alert: Alert, change: Change) -> None:
        self.alerts.append((alert, change))


@pytest.fixture
def closed(tmp_path: Path) -> tuple[Monitor, Kept, str, Path]:
    """Train with a loss that is NaN from step 4 on, which fires an alert, and close."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    kept, out = Kept(), io.StringIO()
    console = Console(file=out, width=200)
    monitor = Monitor(model, optimizer, run_dir=tmp_path / "run", console=console, every=1, sinks=[kept])
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        logits = model(torch.randn(5, 4))
        loss = nn.functional.cross_entropy(logits, torch.randint(3, (5,)))
        monitor.observe_loss(loss if step < 4 else loss * float("nan"))
        loss.backward()
        optimizer.step()
    monitor.close()
    return monitor, kept, out.getvalue(), tmp_path / "run"


def test_an_alert_that_fires_at_the_end_is_not_resolved(closed: tuple[Monitor, Kept, str, Path]) -> None:
    monitor, kept, printed, run = closed
    said = f"still firing: NaN or Inf since step 4 when the run ended at step {STEPS}"
    assert f"step {STEPS}  {said}" in printed and "resolved" not in printed
    alert, change = kept.alerts[-1]
    assert change is Change.UPDATE
    for found in (alert, monitor.alerts[-1], read_run(run).alerts[-1]):
        assert found.state is AlertState.FIRING and found.outcome is Outcome.OPEN
        assert found.outcome_step == STEPS
    lines = (run / "alerts.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["alert"]["outcome"] == "open"


def test_the_report_says_that_it_was_still_firing(closed: tuple[Monitor, Kept, str, Path]) -> None:
    monitor = closed[0]
    summary = monitor.summary()
    assert summary["events"][-1]["ended"] == f"still firing when the run ended at step {STEPS}"
    assert "still firing" in str(summary)
    assert str(monitor.explain("non_finite-1")).count(f"when the run ended at step {STEPS}") == 1
