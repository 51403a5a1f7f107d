"""What notes say about the kind of loss must be true: rounding is no design, and a penalty is no rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor


def _codes(monitor: Monitor) -> set[str]:
    return {note.code for note in monitor.notes}


@pytest.mark.parametrize("order", [1, -1])
def test_a_pass_of_nothing_but_rounding_shows_no_design(order: int) -> None:
    """R-drop without dropout, most rows masked: the gradient of one of the passes is only rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = torch.randn(64, 16), torch.randint(0, 40, (64,))
    y[:56] = -100
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(20):
            first, second = (model(x), model(x))[::order]
            apart = F.kl_div(first.log_softmax(-1), second.softmax(-1), reduction="batchmean")
            loss = F.cross_entropy(first, y) + apart
            loss.backward()
            monitor.observe_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert not _codes(monitor)
    assert monitor.history["unexplained_violation_fraction"][1].max() == 0


class Fused(torch.autograd.Function):
    """A linear cross-entropy in bfloat16 that reads the head's weight, and never calls the head."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        with torch.enable_grad():
            h, w = (one.detach().bfloat16().requires_grad_() for one in (hidden, weight))
            loss = F.cross_entropy((h @ w.T).float(), y)
            loss.backward()
        ctx.save_for_backward(h.grad, w.grad)
        return loss.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        h, w = ctx.saved_tensors
        return grad * h.float(), grad * w.float(), None


def test_a_weight_gradient_rounded_to_half_precision_shows_no_design() -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(16, 32), nn.Linear(32, 50, bias=False)
    model = nn.ModuleDict({"body": body, "head": head})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = torch.randn(64, 16), torch.randint(0, 50, (64,))
    with Monitor(model, optimizer, head=head, console=False, every=1) as monitor:
        for _ in range(20):
            loss = Fused.apply(body(x).relu(), head.weight, y)
            loss.backward()  # type: ignore[no-untyped-call]
            monitor.observe_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert monitor.history["zero_sum_violation_weight"][1].max() > 1e-5
    assert _codes(monitor) == {"head_never_fired"}


class MarginInside(torch.autograd.Function):
    """The cross-entropy of z − 4 at the target, in one operation that no graph shows."""

    @staticmethod
    def forward(ctx, z: Tensor, y: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        chances = (z - 4 * F.one_hot(y, z.shape[1])).softmax(-1)
        ctx.save_for_backward(chances - F.one_hot(y, z.shape[1]))
        return -chances.gather(1, y[:, None]).log().mean()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (difference,) = ctx.saved_tensors
        return grad * difference / len(difference), None


@pytest.mark.parametrize(
    ("loss_of", "said"),
    [
        (F.cross_entropy, False),
        (lambda z, y: F.cross_entropy(z, y) + 0.5 * z.softmax(-1).square().sum(-1).mean() + 1, False),
        (lambda z, y: F.cross_entropy(z, y, reduction="sum"), False),
        (MarginInside.apply, True),
    ],
    ids=["plain", "with another part", "a sum", "a margin inside"],
)
def test_a_loss_that_is_not_the_one_at_the_head_and_whose_graph_tells_nothing_is_said(
    loss_of: Any, said: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = torch.randn(64, 16), torch.randint(0, 40, (64,))
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(12):
            loss = loss_of(model(x), y)
            loss.backward()
            monitor.observe_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert ("loss_not_at_head" in _codes(monitor)) is said
