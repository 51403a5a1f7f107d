"""Fault injection by name: every function that runs inside a training is made to raise, one at a time.

Training's result must be that of the run without a monitor, and the fault is said once.  What is left out is
what nothing can stand in front of: the functions that torch or the user calls directly.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from nfi_monitor import Monitor
from tests.runs import batch, differences, mlp, snapshot
from tests.safety.faults import broken, called_in
from tests.safety.table import Shown

STEPS, SPIKE = 70, 60
CALLED_FROM_OUTSIDE = {
    "capture/head:HeadProbe.__call__": "torch calls it, and all it does is in its own try block",
    "capture/head:HeadProbe._watch.<locals>.on_gradient": "the same",
    "capture/optimizer:StepHooks.__init__.<locals>.pre": "the same",
    "capture/optimizer:StepHooks.__init__.<locals>.post": "the same",
    "monitor:Monitor.observe_loss": "the user calls it, and all it does is in its own try block",
    "monitor:Monitor.close": "the user calls it",
    "monitor:Monitor.guarded": "it is the try block",
}
SILENT = {
    "monitor:Monitor._failed",
    "notes:NoteTaker.failed",
    "notes:NoteTaker.note",
    "monitor:Monitor.notes",
}
"""What says so is itself broken: nothing is said."""


def training(run_dir: Path | None) -> tuple[Any, Any, Monitor | None, Callable[[], None]]:
    """A run that absorbs at once, is at risk, imminent, and spikes: every part of the monitor has work."""
    model = mlp()
    with torch.no_grad():
        model[-1].weight.mul_(40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    inputs, targets = batch()
    monitor = None
    if run_dir is not None:
        monitor = Monitor(
            model,
            optimizer,
            run_dir=run_dir,
            console=Console(file=io.StringIO()),
            on_alert=lambda alert: None,
            probe=(inputs[:4], targets[:4]),
        )

    def loop() -> None:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets if step != SPIKE else (targets + 1) % 7)
            if monitor is not None:
                monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()

    return model, optimizer, monitor, loop


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Those that run between attaching and the end of ``close()``."""
    _, _, monitor, loop = training(tmp_path_factory.mktemp("traced"))
    assert monitor is not None

    def work() -> None:
        loop()
        monitor.close()

    found = called_in(work)
    assert {str(alert.kind) for alert in monitor.alerts} >= {"at_risk", "imminent"}
    return found


@pytest.fixture(scope="module")
def bare() -> dict[str, Any]:
    model, optimizer, _, loop = training(None)
    loop()
    return snapshot(model, optimizer)


def check(functions: dict[str, Any], bare: dict[str, Any], tmp_path: Path, every: int) -> int:
    """Break one function in ``every``; returns how many were broken and raised."""
    harmed, unsaid, count = [], [], 0
    for name, code in list(functions.items())[::every]:
        if name in CALLED_FROM_OUTSIDE:
            continue
        model, optimizer, monitor, loop = training(tmp_path / str(count))
        assert monitor is not None
        with broken(code) as raised, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                loop()
                monitor.close()
            except Exception as error:
                harmed.append(f"{name}: {error!r}")
                continue
        if not raised:
            continue
        count += 1
        harmed += [f"{name}: {path}" for path in differences(bare, snapshot(model, optimizer))[:1]]
        # What fails while the other ranks are looked for is said as that: this one goes on alone.
        codes = [note.code for note in monitor.notes]
        failures = [code for code in codes if code.startswith("failed_") or code == "ranks_apart"]
        if len(failures) > 1 or (not failures and name not in SILENT):
            unsaid.append(f"{name}: {failures}")
    assert not harmed, harmed
    assert not unsaid, unsaid
    return count


def test_a_fault_in_one_function_of_twelve_changes_no_training_and_is_said(
    functions: dict[str, Any], bare: dict[str, Any], tmp_path: Path
) -> None:
    assert check(functions, bare, tmp_path, every=12) >= 20


@pytest.mark.parametrize(
    ("broken_one", "quantity"),
    [
        ("measure/rows:row_statistics", "weight_norm"),  # what the optimizer did is still read
        ("measure/step:step_statistics", "zero_sum_violation"),  # the rows are
        ("report/jsonl:RunDirectory.reading", "zero_sum_violation"),
        ("detect/advice:advice_for", "zero_sum_violation"),
    ],
)
def test_what_does_not_need_the_broken_part_goes_on(
    functions: dict[str, Any], tmp_path: Path, broken_one: str, quantity: str
) -> None:
    _, _, monitor, loop = training(tmp_path / "run")
    assert monitor is not None
    with broken(functions[broken_one]) as raised, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop()
    assert raised
    steps = monitor.history[quantity][0]
    assert len(steps) >= 10 and steps[-1] > STEPS - 10
    assert len(monitor.history["loss"][0]) == STEPS
    monitor.close()


@pytest.mark.slow
def test_a_fault_in_any_function_changes_no_training_and_is_said(
    functions: dict[str, Any], bare: dict[str, Any], tmp_path: Path, shown: Shown
) -> None:
    count = check(functions, bare, tmp_path, every=1)
    assert count >= 180
    shown("faults", count, "functions made to raise")
