"""What is no logits is said once when it is tapped, comes back unchanged, and costs nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nfi_monitor import Monitor
from tests.runs import batch, mlp


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((None,), "got NoneType"),
        (([torch.zeros(2, 3)],), "got list"),
        ((torch.zeros(3, dtype=torch.int64),), "got torch.int64"),
        ((torch.tensor(1.0),), "of shape []"),
        ((torch.zeros(2, 3), 2), "class_axis=2 is no axis"),
        ((torch.zeros(2, 3), -3), "class_axis=-3 is no axis"),
        ((torch.zeros(2, 3), "classes"), "class_axis='classes' is no axis"),
    ],
)
def test_what_is_no_logits_is_said_and_rows_of_the_head_are_read(
    arguments: tuple[Any, ...], said: str
) -> None:
    model, (inputs, targets) = mlp(), batch()
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(7):
            optimizer.zero_grad()
            assert monitor.tap(*arguments) is arguments[0]
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        assert len(monitor.history["zero_sum_violation"][0]) == 7
    assert [note.code for note in monitor.notes] == ["tap_unusable"]
    assert said in monitor.notes[0].message
