"""The played accelerator itself: what it counts, what it records, and when copies arrive."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.played.device import Accelerator
from tests.runs import batch, differences, mlp, snapshot


def test_a_training_on_it_has_the_bits_of_the_host(device) -> None:
    ends = []
    for place in ("cpu", device):
        model = mlp().to(place)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
        inputs, targets = (x.to(place) for x in batch())
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        state = snapshot(model.cpu(), optimizer)
        ends.append(state["model"])
    assert not differences(*ends)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.empty(3).copy_(x, non_blocking=True),  # into memory that is not pinned
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0]).to(x.device),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave(x, torch.ones_like(x).long()),
    ],
    ids=["item", "bool", "tolist", "cpu", "copy", "nonzero", "mask", "send", "tensor", "equal", "repeat"],
)
def test_what_waits_is_recorded(device, accelerator: Accelerator, wait) -> None:
    x = torch.arange(3.0).to(device)
    accelerator.waits.clear()
    wait(x)
    assert accelerator.waits


def test_what_does_not_wait_is_not_recorded(device, accelerator: Accelerator) -> None:
    x = torch.ones(3).pin_memory().to(device, non_blocking=True)
    y = torch.full_like(x, 2.0).add_(x).view(3, 1)[1:]
    torch.repeat_interleave(x, torch.ones_like(x).long(), output_size=3)
    assert not accelerator.waits and y.device == device


def test_a_late_copy_is_garbage_until_it_arrives(device, accelerator: Accelerator) -> None:
    x = torch.ones(3).to(device)
    host = torch.empty(3, pin_memory=True)
    host.copy_(x, non_blocking=True)
    x.zero_()  # later work of the device does not change what is copied
    event = torch.played.Event()  # type: ignore[attr-defined]
    event.record(torch.played.current_stream())  # type: ignore[attr-defined]
    assert all(map(math.isnan, host.tolist())) and not event.query()
    accelerator.pass_step()
    assert event.query() and host.tolist() == [1.0] * 3


def test_kernels_are_counted_as_an_accelerator_launches_them(device, accelerator: Accelerator) -> None:
    many = [torch.ones(2).to(device) for _ in range(200)]
    with accelerator.counted() as kernels:
        views = [x.view(1, 2)[0].detach() for x in many]
        torch.empty(3, device=device)
        assert not kernels
        torch.cat(views)
        torch._foreach_mul_(views, 2.0)
        nn.functional.relu(views[0])
    assert kernels == {"cat": 2, "_foreach_mul_.Scalar": 2, "relu": 1}
