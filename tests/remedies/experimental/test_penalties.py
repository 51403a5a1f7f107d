"""The z-loss against its own formula."""

from __future__ import annotations

import pytest
import torch

from nfi_monitor.remedies import experimental


def test_the_gradient_of_a_z_loss_sums_to_twice_the_penalty_over_z() -> None:
    logits = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    experimental.z_loss(logits, 0.1).backward()
    assert logits.grad is not None
    assert float(logits.grad.sum()) == pytest.approx(2 * 0.1 * float(logits.detach().logsumexp(-1)))
