"""Updates are clipped as StableAdamW clips them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nfi_monitor.remedies import experimental
from tests.remedies.training import adam
from tests.runs import mlp


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_is_clipped_by_its_own_rms(dtype: torch.dtype) -> None:
    """Against StableAdamW written out: the tensor's learning rate over max(1, RMS_t)."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(5, dtype=dtype))
    reference = parameter.detach().clone()
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.95), weight_decay=0.3)
    experimental.clip_update_rms(optimizer)
    first, second = torch.zeros_like(reference), torch.zeros_like(reference)
    clipped = 0
    for step in range(1, 9):
        grad = torch.randn(5, dtype=dtype) * (100.0 if step == 6 else 1.0)
        first, second = 0.9 * first + 0.1 * grad, 0.95 * second + 0.05 * grad**2
        root = (second / (1 - 0.95**step)).sqrt()
        rms = float((grad**2 / root**2).mean().sqrt())
        rate = 0.1 / max(1.0, rms)
        clipped += rms > 1
        reference = reference * (1 - rate * 0.3) - rate * (first / (1 - 0.9**step)) / (root + 1e-8)
        parameter.grad = grad
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), reference, rtol=1e-4, atol=1e-6)
    assert clipped >= 1


def test_clipping_refuses_what_it_cannot_hold_against_anything() -> None:
    with pytest.raises(ValueError, match="SGD has no second moment"):
        experimental.clip_update_rms(torch.optim.SGD(mlp().parameters(), lr=0.1))
    with pytest.raises(ValueError, match="positive"):
        experimental.clip_update_rms(adam(mlp()), -1)
