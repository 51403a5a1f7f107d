"""Stablemax and orthogonal gradients against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nfi_monitor.remedies import experimental


def test_orthogonal_gradients_are_orthogonal_and_as_long() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0, 2.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    experimental.orthogonal_gradients(optimizer)
    before, grad = parameter.detach().clone(), torch.tensor([3.0, 0.0, 4.0])
    parameter.grad = grad.clone()
    optimizer.step()
    moved = before - parameter.detach()
    assert abs(float(moved @ before)) < 1e-5
    assert float(moved.norm()) == pytest.approx(5.0)


def test_stablemax_is_its_definition_and_a_probability() -> None:
    logits = torch.tensor([[2.0, -3.0, 0.0], [100.0, 0.0, 0.0]], dtype=torch.float64)
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits))
    expected = -(s[:, 0] / s.sum(-1)).log()
    found = experimental.stablemax_cross_entropy(logits, torch.tensor([0, 0]), reduction="none")
    torch.testing.assert_close(found, expected)
    ignored = experimental.stablemax_cross_entropy(logits, torch.tensor([0, -100]))
    torch.testing.assert_close(ignored, expected[0])
    with pytest.raises(ValueError, match="got 'avg'"):
        experimental.stablemax_cross_entropy(logits, torch.tensor([0, 0]), reduction="avg")
