"""The head reduced for a late host adds to the ranks' sums what it adds at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nfi_monitor.measure.late.head import late_head
from nfi_monitor.measure.sharded.step import head_parts
from tests.measure.late import unexpected
from tests.measure.sharded.test_step import D, update_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("moved", [True, False])
def test_a_head_that_arrives_late_is_that_measured_at_once(dtype, read: bool, moved: bool) -> None:
    update, _ = update_of(None, 1)
    assert update is not None and update.head_weight is not None
    update = replace(
        update,
        head_weight=update.head_weight.to(dtype) if read else None,
        head_weight_grad=None,
        head_bias_grad=None,
        head_weight_update=None,
    )
    mean = torch.randn(D, dtype=torch.float64) if moved else None
    late = late_head(update.head_weight, 0.5, (D, D, 3), mean)
    found, rest = late.outline().read(torch.cat([*late.flat, torch.ones(1)]), unexpected)
    assert rest.tolist() == [1.0]
    known = head_parts(update, 0.5, (D, D, 3), None, mean)
    for name in known._fields:
        torch.testing.assert_close(getattr(found, name), getattr(known, name), rtol=1e-6, atol=1e-6)
