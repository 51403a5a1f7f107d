"""Largest and smallest entries: NumPy's way on the host is torch's, in every dtype, with NaN and Inf."""

from __future__ import annotations

import math

import pytest
import torch

from nfi_monitor.capture import devices
from nfi_monitor.measure import extremes

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("find", [extremes.largest, extremes.smallest])
def test_the_way_on_the_host_finds_what_the_way_on_a_device_finds(monkeypatch, dtype, poison, find):
    values = torch.randn(6, 40, dtype=torch.float64).to(dtype)
    values[2, 7] = values[4, 39] = poison
    rows = values[::2]  # rows are sampled by a stride
    found, where = find(rows)
    monkeypatch.setattr(devices, "on_host", lambda tensor: False)
    expected, _ = find(rows)
    assert torch.equal(found.nan_to_num(99), expected.nan_to_num(99)) and found.dtype is dtype
    assert torch.equal(extremes.pick(rows, where).nan_to_num(99), expected.nan_to_num(99))


def test_of_equal_entries_the_first_is_named():
    values = torch.tensor([[1.0, 3.0, 3.0, 1.0]])
    assert extremes.largest(values)[1].item() == 1
    assert extremes.smallest(values)[1].item() == 0
