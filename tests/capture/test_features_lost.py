"""Features that the loop frees or overwrites after its backward pass must cost their own reading only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor
from nfi_monitor.native import library

Lose = Callable[[Tensor], object]
LOST = "features whose memory was freed or written to before the step"


def train(
    lose: Lose, losing: tuple[int, ...], make: type[torch.optim.Optimizer]
) -> tuple[Monitor, list[float]]:
    """Train with every step read; return the true norm of the mean feature of each step, too."""
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 5)
    optimizer = make([*body.parameters(), *head.parameters()], lr=1e-3)
    norms = []
    with Monitor(nn.ModuleList([body, head]), optimizer, head=head, console=False, every=1) as monitor:
        for step in range(1, 11):
            optimizer.zero_grad()
            hidden = body(torch.randn(32, 8))
            F.cross_entropy(head(hidden), torch.randint(5, (32,))).backward()
            norms.append(float(hidden.detach().mean(0).norm()))
            if step in losing:
                lose(hidden)
            optimizer.step()
    return monitor, norms


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize(
    "lose",
    [
        lambda hidden: hidden.untyped_storage().resize_(0),
        lambda hidden: hidden.untyped_storage().resize_(8),
        lambda hidden: hidden.detach().fill_(7.0),
    ],
    ids=["freed", "made smaller", "written to"],
)
def test_features_that_are_gone_before_the_step_are_left_out_once(
    lose: Lose, make: type[torch.optim.Optimizer], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(library, "library", lambda: None)
    monitor, norms = train(lose, (4,), make)
    steps, means = monitor.history["feature_mean_norm"]
    assert steps.tolist() == [step for step in range(1, 11) if step != 4]
    assert means.tolist() == pytest.approx([x for at, x in enumerate(norms, 1) if at != 4], rel=1e-5)
    assert monitor.history["gradient_norm"][0].tolist() == [*range(1, 11)]
    assert monitor.history["margin_median"][0].tolist() == [*range(1, 11)]
    assert [note.step for note in monitor.notes if LOST in note.message] == [4]
    assert not [note for note in monitor.notes if note.code.startswith("failed")]


def test_an_input_buffer_may_be_filled_with_the_next_micro_batch() -> None:
    torch.manual_seed(0)
    head, buffer, norms = nn.Linear(16, 5), torch.empty(32, 16), []
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    with Monitor(head, optimizer, head=head, console=False, every=1) as monitor:
        for _ in range(6):
            optimizer.zero_grad()
            means = []
            for scale in (1.0, 30.0):
                buffer.copy_(scale * torch.randn(32, 16))
                means.append(buffer.mean(0))
                F.cross_entropy(head(buffer), torch.randint(5, (32,))).backward()
            norms.append(float(torch.stack(means).mean(0).norm()))
            optimizer.step()
    assert monitor.history["feature_mean_norm"][1].tolist() == pytest.approx(norms, rel=1e-5)
    assert not [note for note in monitor.notes if LOST in note.message]
