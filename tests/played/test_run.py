"""The monitor on an accelerator: it never waits, and judges what arrives late as it would have in time."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nfi_monitor import Autopilot, Monitor, remedies
from nfi_monitor.capture import devices
from nfi_monitor.native import library
from tests.played.device import Accelerator
from tests.played.training import Training, division, spiking_seed
from tests.remedies.test_hooks import APPLY
from tests.runs import differences, mlp, snapshot

ROUNDED = 1e-4
"""Sums in another order; the secant curvature is a quotient of sums that cancel, and the first steps move
little."""


def test_numbers_reach_the_device_without_waiting_for_it(device, accelerator: Accelerator) -> None:
    there = devices.send([1.0, 2.0], device)
    assert there.device == device and not accelerator.waits
    assert devices.send(there, device) is there
    assert devices.send([1.0], torch.device("cpu")).device.type == "cpu"


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "maximised": {"amsgrad": True},
}


@pytest.mark.parametrize("every", ["auto", 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 3])
def test_no_step_waits_for_the_device(device, accelerator: Accelerator, every, kind: str, parts: int) -> None:
    training = Training(device, accelerator, **KINDS[kind])
    with training.monitored(every=every) as monitor:
        training.run(20, monitor, parts=parts)
        assert not accelerator.waits
        codes = [note.code for note in monitor.notes]
        # The losses of micro-batches are reported divided by their number.
        known = {"half_precision_loss", *(["loss_divided"] if parts > 1 else [])}
        assert known.issuperset(codes), codes
        assert monitor.history["zero_sum_violation"][0].max() >= 19 if every == 1 else True
    assert monitor.history["loss"][0].tolist() == [*range(1, 21)]


def test_groups_with_rates_of_their_own_do_not_wait(device, accelerator: Accelerator) -> None:
    model = mlp().to(device)
    training = Training(device, accelerator, model)
    groups = [{"params": model[:4].parameters()}, {"params": model[4].parameters(), "lr": 1e-3, "eps": 1e-6}]
    training.optimizer = torch.optim.AdamW(groups, lr=1e-2)
    with training.monitored(every=1) as monitor:
        training.run(12, monitor)
        assert not accelerator.waits
    assert len(monitor.history["secant_curvature"][0]) == 11


# ASGD is left out: its own step reads its rate from the device.
@pytest.mark.parametrize("kind", ["SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax"])
def test_reading_by_what_other_optimizers_divide_does_not_wait(
    device, accelerator: Accelerator, kind: str
) -> None:
    model = mlp().to(device)
    training = Training(device, accelerator, model)
    groups = [{"params": model[:4].parameters()}, {"params": model[4].parameters(), "lr": 1e-3}]
    training.optimizer = getattr(torch.optim, kind)(groups, lr=1e-2, foreach=True)
    with training.monitored(every=1) as monitor:
        training.run(12, monitor)
        assert not accelerator.waits
    assert len(monitor.history["secant_curvature"][0]) == 11


def history(monitor: Monitor) -> dict[str, list[list[float]]]:
    return {name: [column.tolist() for column in monitor.history[name]] for name in monitor.history}


def of_the_host(steps: int, accelerator: Accelerator, every: Any = 1, parts: int = 1, **options: Any):
    with library.disabled():
        training = Training("cpu", accelerator, **options)
        with training.monitored(every=every) as monitor:
            training.run(steps, monitor, parts=parts)
    return monitor, training


@pytest.mark.parametrize(
    ("kind", "parts", "lateness"),
    [("plain", 1, 1), ("plain", 3, 3), ("bfloat16", 1, 3), ("bfloat16", 3, 1), ("maximised", 1, 3)],
)
def test_readings_are_those_of_the_host(
    device, accelerator: Accelerator, kind: str, parts: int, lateness: int
) -> None:
    accelerator.lateness = lateness
    known, there = of_the_host(70, accelerator, parts=parts, **KINDS[kind])
    training = Training(device, accelerator, **KINDS[kind])
    with library.disabled(), training.monitored(every=1) as monitor:
        training.run(70, monitor, parts=parts)
        assert len(monitor.history["loss"][0]) == 70 - lateness
    assert not differences(*(snapshot(one.model.cpu(), one.optimizer)["model"] for one in (there, training)))
    found, expected = history(monitor), history(known)
    assert found.keys() == expected.keys()
    near = 0.02 if kind == "bfloat16" else ROUNDED
    for name, (steps, values) in expected.items():
        assert found[name][0] == steps, name
        if "fraction" in name or name == "non_finite_rows":
            assert found[name][1] == pytest.approx(values, abs=1e-6, nan_ok=True), name
        else:
            scale = max((abs(x) for x in values if math.isfinite(x)), default=1.0)
            least = max(near * scale, 1e-7 if "violation" in name else 0.0)  # itself an error of rounding
            assert found[name][1] == pytest.approx(values, rel=near, abs=least, nan_ok=True), name


@pytest.mark.parametrize("every", ["auto", 1])
def test_the_training_has_the_same_bits_with_and_without_the_monitor(
    device, accelerator: Accelerator, every
) -> None:
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 7))
        training = Training(device, accelerator, body)
        if watched:
            with training.monitored(every=every) as monitor:
                training.run(60, monitor)
        else:
            training.run(60)
        ends.append(snapshot(training.model.cpu(), training.optimizer))
    for end in ends:  # the state of the optimizer is on the device
        state = end.pop("optimizer")["state"]
        end["state"] = [x.cpu() for entry in state.values() for x in entry.values()]
    assert not differences(*ends)


def alerts_of(place: torch.device | str, accelerator: Accelerator) -> list[tuple[Any, ...]]:
    seed, begun = spiking_seed()
    with library.disabled():
        training = division(place, accelerator, seed)
        with training.monitored(every=1, snapshots=False) as monitor:
            training.run(begun + 30, monitor)
            assert not accelerator.waits
    assert {x.kind.value for x in monitor.alerts} >= {"at_risk", "slingshot"}
    assert training.losses[begun - 1].item() > 0.1, "the same training"
    return [(x.kind, x.rule, x.first_step, x.last_step, x.state, x.mechanism) for x in monitor.alerts]


def test_alerts_are_those_of_the_host(device, accelerator: Accelerator) -> None:
    accelerator.lateness = 4
    assert alerts_of(device, accelerator) == alerts_of("cpu", Accelerator())


def test_a_snapshot_is_copied_without_waiting_and_brings_every_bit_back(
    device, accelerator: Accelerator
) -> None:
    training = Training(device, accelerator)
    with training.monitored(every=1, snapshots=1 << 22) as monitor:
        training.run(5, monitor)
        kept = monitor._loop.recent_snapshots
        kept.take(5, None)
        before = [x.clone() for x in training.model.parameters()]
        training.run(5, monitor)
        assert not accelerator.waits
        [taken] = monitor.snapshots
        taken.restore(training.model, training.optimizer)
        assert all(map(torch.equal, before, training.model.parameters()))


@pytest.mark.parametrize("loss", ["zero_sum_cross_entropy", "float64_cross_entropy"])
def test_a_loss_has_the_numbers_of_the_host(device, accelerator: Accelerator, loss: str) -> None:
    known = Training("cpu", accelerator)
    known.run(10, loss_of=getattr(remedies, loss))
    training = Training(device, accelerator)
    training.run(10, loss_of=getattr(remedies, loss))
    assert not accelerator.waits
    for one, two in zip(known.losses, training.losses, strict=True):
        assert two.item() == pytest.approx(one.item(), rel=1e-5)


@pytest.mark.parametrize("name", APPLY)
def test_a_remedy_does_not_wait(device, accelerator: Accelerator, name: str) -> None:
    training = Training(device, accelerator)
    with training.monitored(every=1) as monitor:
        training.run(3, monitor)
        handle = APPLY[name](training.model, training.optimizer)
        training.run(6, monitor)
        assert not accelerator.waits
        handle.undo()
    assert not [note for note in monitor.notes if note.code.startswith("failed")]


@pytest.mark.slow
def test_the_autopilot_acts_without_waiting(device, accelerator: Accelerator) -> None:
    seed, begun = spiking_seed()
    training = division(device, accelerator, seed)
    pilot = Autopilot()
    with training.monitored(every=1, on_alert=pilot) as monitor:
        training.run(begun + 30, monitor, loss_of=pilot.loss)
        assert not accelerator.waits
    assert pilot.swapped and "slingshot" not in {alert.kind.value for alert in monitor.alerts}


@pytest.mark.parametrize(
    ("function", "lost", "kept"),
    [
        ("nfi_monitor.measure.late.rows.sum_rows", "live_fraction", "weight_norm"),
        ("nfi_monitor.measure.late.step._finish_sums", "weight_norm", "live_fraction"),
    ],
)
def test_an_error_on_the_host_costs_one_reading_of_one_part(
    device, accelerator: Accelerator, monkeypatch, function: str, lost: str, kept: str
) -> None:
    module, _, name = function.rpartition(".")
    whole = getattr(importlib.import_module(module), name)
    calls: list[int] = []

    def once(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError("short once")
        return whole(*args)

    monkeypatch.setattr(function, once)
    training = Training(device, accelerator)
    with training.monitored(every=1) as monitor:
        training.run(30, monitor)
    assert len(monitor.history[kept][0]) == 30 and 27 <= len(monitor.history[lost][0]) < 30
    [note] = monitor.notes
    assert note.code.startswith("failed") and "MemoryError: short once" in note.message


def test_a_head_with_one_output_is_read(device, accelerator: Accelerator) -> None:
    training = Training(device, accelerator, nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1)))
    with training.monitored(every=1) as monitor:
        training.run(12, monitor, lambda z, y: F.mse_loss(z.squeeze(-1), y.float()))
        assert not accelerator.waits
    assert len(monitor.history["live_fraction"][0]) == 12
