"""Complex parameters are left out and said; everything else is read, and the training is the same."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor

K = 7


class Fourier(nn.Module):
    """A real head after a complex layer, or a complex head whose output is made real."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.mix = nn.Parameter(torch.randn(16, 16, dtype=torch.cfloat) * 0.1)
        self.last = nn.Linear(16, K, dtype=torch.float if head == "real" else torch.cfloat)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.fft.fft(self.first(x).relu()) @ self.mix
        if self.head == "real":
            return self.last(mixed.real)
        return self.last(mixed).abs() if self.head == "absolute" else self.last(mixed).real


def train(
    head: str, kind: type[torch.optim.Optimizer], *, watch: bool
) -> tuple[dict[str, Tensor], Monitor | None]:
    torch.manual_seed(0)
    model = Fourier(head)
    optimizer = kind(model.parameters(), lr=1e-2)
    monitor = Monitor(model, optimizer, console=False, every=1) if watch else None
    x, y = torch.randn(24, 6), torch.randint(0, K, (24,))
    for _ in range(8):
        loss = F.cross_entropy(model(x), y)
        if monitor is not None:
            monitor.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if monitor is not None:
        norms = monitor.weight_norms()
        assert norms["mix"] == pytest.approx(math.sqrt(model.mix.detach().abs().square().sum()))
        monitor.close()
    return model.state_dict(), monitor


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam])
@pytest.mark.parametrize(
    ("head", "codes"),
    [
        ("real", {"state_unreadable"}),
        ("absolute", {"state_unreadable", "head_without_weight"}),
        ("real part", {"state_unreadable", "head_without_weight", "head_never_fired"}),
    ],
)
def test_complex_parameters_are_left_out_and_said(
    head: str, codes: set[str], kind: type[torch.optim.Optimizer]
) -> None:
    state, monitor = train(head, kind, watch=True)
    bare, _ = train(head, kind, watch=False)
    assert all(torch.equal(state[name], bare[name]) for name in bare)
    assert monitor is not None and monitor.alerts == []
    notes = {note.code: note.message for note in monitor.notes}
    assert notes.keys() - {"no_second_moment", "no_features"} == codes
    assert "Not read: complex parameters." in notes["state_unreadable"]
    read = ["weight_norm", "gradient_norm", "update_rms", "loss"]
    read += ["rms_t_max"] if kind is not torch.optim.SGD else []
    read += ["zero_sum_violation"] if head != "real part" else []
    assert all(len(monitor.history[name][0]) == 8 for name in read if name != "zero_sum_violation")
    assert all(len(monitor.history[name][0]) >= 7 for name in read)
