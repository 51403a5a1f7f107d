"""Runs that are interrupted, or changed on the way: checkpoints, schedules, parameter groups, the clock."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor.monitor import Monitor
from nfi_monitor.report.run_directory.reader import read_run
from nfi_monitor.types import Alert, AlertKind
from tests.runs import batch, differences, mlp, snapshot
from tests.spiking import CUTS, Recorded, scene

FROM_TWO_STEPS = ("secant_curvature", "feature_displacement", "gradient_alignment")
"""Evidence that compares two consecutive readings: the first one after a resume has no predecessor."""


def comparable(alert: Alert) -> Alert:
    evidence = {name: item for name, item in alert.evidence.items() if name not in FROM_TWO_STEPS}
    return replace(alert, evidence=evidence)


@pytest.mark.parametrize("cut", [pytest.param(CUTS[0], marks=pytest.mark.slow), *CUTS[1:]])
def test_a_resumed_run_gives_the_weights_alerts_and_phases_of_the_uninterrupted_one(
    spiking_run: Recorded, cut: str
) -> None:
    model, optimizer, step = scene().division()
    for parameter in model.parameters():
        parameter.data.fill_(1.0)  # everything must come from the checkpoint
    monitor = Monitor(model, optimizer, console=False)
    states = torch.load(io.BytesIO(spiking_run.checkpoints[cut]), weights_only=True)
    for part, state in zip((model, optimizer, monitor), states, strict=True):
        part.load_state_dict(state)
    for n in range(scene().cuts[cut] + 1, scene().steps + 1):
        step(monitor, n)
    monitor.close()
    assert not differences(model.state_dict(), spiking_run.model.state_dict())
    assert monitor.step == scene().steps
    expected = spiking_run.monitor
    assert [*map(repr, map(comparable, monitor.alerts))] == [*map(repr, map(comparable, expected.alerts))]
    assert monitor.phases == expected.phases
    text = str(monitor.explain("slingshot-1"))
    assert text.startswith(expected.explain("slingshot-1").title()), "an alert of before can be explained"


@pytest.mark.parametrize("every", [1, "auto"])
def test_a_run_that_goes_back_within_its_process_leaves_no_trace_of_what_it_abandoned(
    tmp_path: Path, every: int | str
) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, targets = batch()

    def go(steps: int, loss: float | None = None) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            # So large that rounding absorbs most rows.
            trained = F.cross_entropy(1e3 * model(inputs), targets)
            monitor.observe_loss(trained if loss is None else loss)
            trained.backward()
            optimizer.step()

    with Monitor(model, optimizer, console=False, run_dir=tmp_path, every=every) as monitor:
        go(20)
        states = copy.deepcopy([part.state_dict() for part in (model, optimizer, monitor)])
        go(5)
        go(1, float("nan"))
        go(4)
        assert "non_finite-1" in {alert.id for alert in monitor.alerts}
        for part, state in zip((model, optimizer, monitor), states, strict=True):
            part.load_state_dict(state)
        assert monitor.state_dict()["absorbing_classes"] == states[2]["absorbing_classes"] != []
        go(4)
        assert monitor.history["loss"][0].tolist() == list(range(1, 25))
        told = {alert.id for alert in monitor.alerts}
    record = read_run(tmp_path)
    assert record.history["loss"][0].tolist() == list(range(1, 25))
    assert {alert.id for alert in record.alerts} == told and "non_finite-1" not in told
    assert record.info["session"] == 2


# --- a quiet run that is changed on the way ---------------------------------------------------------


def quiet_run(
    change: Callable[[nn.Module, torch.optim.Optimizer, Monitor | None, int], None],
    monitored: bool = True,
    kind: type[torch.optim.Optimizer] = torch.optim.Adam,
    steps: int = 300,
    part: slice = slice(None),
) -> tuple[Monitor | None, nn.Module, torch.optim.Optimizer]:
    """Minibatches that are drawn anew, with labels that cannot be learnt without error; β2 = .95.

    ``change(model, optimizer, monitor, n)`` is called before step ``n``; ``part`` are the layers that the
    optimizer has from the beginning.
    """
    generator = torch.Generator().manual_seed(3)
    model = mlp()
    parameters = [p for layer in model[part] for p in layer.parameters()]
    optimizer = kind(parameters, lr=1e-3, betas=(0.9, 0.95))  # type: ignore[call-arg]
    monitor = Monitor(model, optimizer, console=False) if monitored else None
    teacher = torch.randn(12, 7, generator=generator)
    for n in range(1, steps + 1):
        change(model, optimizer, monitor, n)
        inputs: Tensor = torch.randn(64, 12, generator=generator)
        targets = torch.distributions.Categorical(logits=inputs @ teacher).sample()
        loss = F.cross_entropy(model(inputs), targets)
        if monitor is not None:
            monitor.observe_loss(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return monitor, model, optimizer


def unharmed(monitor: Monitor | None) -> Monitor:
    assert monitor is not None
    monitor.close()
    assert not [note for note in monitor.notes if note.code.startswith("failed")]
    assert not {alert.kind for alert in monitor.alerts} & {AlertKind.IMMINENT, AlertKind.SLINGSHOT}
    return monitor


@pytest.mark.parametrize("factor", [10.0, 0.1])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_learning_rate_changed_tenfold_on_a_quiet_run_sounds_nothing(
    kind: type[torch.optim.Optimizer], factor: float
) -> None:
    def change(model: nn.Module, optimizer: torch.optim.Optimizer, monitor: Monitor | None, n: int) -> None:
        if n == 150:
            for group in optimizer.param_groups:
                group["lr"] *= factor

    monitor = unharmed(quiet_run(change, kind=kind)[0])
    assert monitor.history.last("learning_rate") == 1e-3 * factor


def unfreeze(model: nn.Module, optimizer: torch.optim.Optimizer, monitor: Monitor | None, n: int) -> None:
    if n == 150:
        optimizer.add_param_group({"params": list(model[:2].parameters()), "lr": 1e-4})


def test_a_parameter_group_added_later_is_read_and_changes_nothing() -> None:
    start = mlp()
    monitor, model, optimizer = quiet_run(unfreeze, part=slice(2, None))
    seen = unharmed(monitor)
    watched = snapshot(model, optimizer)
    assert not torch.equal(model[0].weight, start[0].weight)
    steps, norms = seen.history["weight_norm"]
    of_all = float(torch.cat([p.detach().flatten() for p in model.parameters()]).norm())
    # The last reading may be some tens of steps old.
    assert norms[-1] == pytest.approx(of_all, rel=3e-2), "the new group's weights count"
    assert norms[steps < 150][-1] < 0.95 * of_all
    _, model, optimizer = quiet_run(unfreeze, monitored=False, part=slice(2, None))
    assert not differences(watched, snapshot(model, optimizer))


def test_a_group_added_before_a_checkpoint_is_there_after_the_resume() -> None:
    monitor, model, optimizer = quiet_run(unfreeze, part=slice(2, None), steps=200)
    assert monitor is not None
    state = monitor.state_dict()
    monitor.close()
    second = Monitor(model, optimizer, console=False)
    second.load_state_dict(state)
    inputs = torch.randn(64, 12)
    F.cross_entropy(model(inputs), torch.randint(0, 7, (64,))).backward()
    optimizer.step()
    assert unharmed(second).step == 201


@pytest.mark.parametrize("by", [1000, -100])
def test_a_clock_that_is_set_on_the_way_sounds_nothing(by: int) -> None:
    """Loading an older or newer monitor state moves the step counter; training goes on as it was."""

    def change(model: nn.Module, optimizer: torch.optim.Optimizer, monitor: Monitor | None, n: int) -> None:
        if n == 150 and monitor is not None:
            state = monitor.state_dict()
            monitor.load_state_dict({**state, "step": state["step"] + by})

    monitor = unharmed(quiet_run(change)[0])
    assert monitor.step == 300 + by
