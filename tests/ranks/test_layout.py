"""One rank's share of the vector that all ranks add up."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from nfi_monitor.ranks.layout import Message


def test_what_one_rank_says_may_lie_on_two_devices() -> None:
    message = Message(SimpleNamespace(at=lambda name: 0, line=0), 0)  # type: ignore[arg-type]
    for place, device in enumerate(("cpu", "meta", "cpu")):
        message.add("rows", torch.ones(2, device=device), 2 * place)
    packed = message.pack()
    assert (packed.tensor.shape, packed.tensor.device.type) == ((6,), "meta")
