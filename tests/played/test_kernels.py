"""How many kernels a reading launches: the host is busy for as long as it takes to launch them."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

from nfi_monitor.measure.accumulator import looks
from tests.played.device import Accelerator
from tests.played.training import Training

MOST = 60
"""Kernels of a reading."""
READ, LOOKED = 13, 64
"""Steps: one that is read, and one that looks at the kind of loss as well."""


def kernels(device: torch.device, accelerator: Accelerator, layers: int, step: int, **options: Any) -> int:
    """Of a reading: what a step launches with the monitor, less what it launches without."""
    hidden = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(layers)]
    body = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), *chain(*hidden), nn.Linear(16, 7))
    training = Training(device, accelerator, body, **options)
    training.run(2)
    with accelerator.counted() as bare:
        training.run(1)
    with training.monitored(every=1) as monitor:
        training.run(step - 1, monitor)
        with accelerator.counted() as watched:
            training.run(1, monitor)
        launched: Counter[str] = watched - bare
        assert monitor.history["secant_curvature"][0][-1] == step - 1
    return launched.total()


@pytest.mark.parametrize("layers", [0, 20, 72, 126])
def test_a_reading_launches_few_kernels_at_any_number_of_parameters(
    device, accelerator: Accelerator, layers: int
) -> None:
    """72 layers have 148 tensors, as GPT-2 has; 126 have 256. From there on, each 32 tensors add a launch."""
    assert not looks(READ) and looks(LOOKED)
    assert kernels(device, accelerator, layers, READ) <= MOST


def test_half_precision_adds_the_conversions(device, accelerator: Accelerator) -> None:
    assert kernels(device, accelerator, 2, READ, dtype=torch.bfloat16) <= MOST + 5


def test_a_reading_that_looks_at_the_kind_of_loss_launches_no_more(device, accelerator: Accelerator) -> None:
    assert kernels(device, accelerator, 2, LOOKED) <= MOST


def test_a_step_that_is_not_read_launches_nothing_but_a_copy_of_its_loss(
    device, accelerator: Accelerator
) -> None:
    training = Training(device, accelerator)
    training.run(2)
    with accelerator.counted() as bare:
        training.run(1)
    with training.monitored(every=50) as monitor:
        training.run(3, monitor)
        with accelerator.counted() as watched:
            training.run(40, monitor)
    assert (watched.total() - 40 * bare.total()) <= 40
