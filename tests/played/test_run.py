"""The monitor on an accelerator: it never waits, and judges what arrives late as it would have in time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nfi_monitor import Monitor
from nfi_monitor.capture import devices
from tests.played.device import Accelerator
from tests.runs import batch, mlp


def train(monitor: Monitor | None, model, optimizer, accelerator: Accelerator, device, steps: int) -> None:
    inputs, targets = (x.to(device) for x in batch())
    accelerator.waits.clear()
    for _ in range(steps):
        loss = F.cross_entropy(model(inputs), targets)
        if monitor is not None:
            monitor.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accelerator.pass_step()


def test_numbers_reach_the_device_without_waiting_for_it(device, accelerator: Accelerator) -> None:
    there = devices.send([1.0, 2.0], device)
    assert there.device == device and not accelerator.waits
    assert devices.send(there, device) is there
    assert devices.send([1.0], torch.device("cpu")).device.type == "cpu"


def test_no_step_waits_for_the_device(device, accelerator: Accelerator) -> None:
    model = mlp().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        train(monitor, model, optimizer, accelerator, device, 12)
        assert not accelerator.waits
        assert len(monitor.history["loss"][0]) == 11, "the last one is on its way"
        assert not monitor.notes
    assert len(monitor.history["loss"][0]) == 12
