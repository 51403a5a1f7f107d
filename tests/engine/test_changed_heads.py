"""Logits that are changed after the head: margins and loss are those of the loss's logits, or left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor

D, H, K, STEPS = 12, 32, 7, 30
Change = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Returns its loss, its logits, or both; ``change`` is what happens after the head."""

    def __init__(self, change: Change, returns: str) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(D, H), nn.Linear(H, K)
        self.factor = nn.Parameter(torch.tensor(1.0))
        self.shift = nn.Parameter(torch.linspace(-2, 2, K))
        self.change, self.returns = change, returns
        self.steps = 0
        self.logits = torch.empty(0)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        self.steps += 1
        z = self.logits = self.change(self, self.head(self.first(x).relu()), y)
        if self.returns == "logits":
            return (z,)
        loss = F.cross_entropy(z, y)
        return (loss,) if self.returns == "loss" else (loss, z)


def train(
    change: Change, returns: str, *, watch: bool = True, report: bool = True
) -> tuple[dict[str, Tensor], Monitor | None, list[tuple[float, float]]]:
    """Return the weights, the monitor, and the true (median margin, loss) of each step."""
    torch.manual_seed(0)
    model = Net(change, returns)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(48, D)
    y = (x @ torch.randn(D, K))[:, :6].argmax(1)
    monitor = Monitor(model, optimizer, console=False, every=1) if watch else None
    true = []
    for _ in range(STEPS):
        out = model(x, y)
        loss = F.cross_entropy(out[0], y) if returns == "logits" else out[0]
        z = model.logits.detach()
        of_class = z.gather(1, y[:, None])
        margins = (of_class - z.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True)).flatten()
        true.append((margins.median().item(), F.cross_entropy(z, y).item()))
        if monitor is not None and report:
            monitor.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if monitor is not None:
        monitor.close()
    return model.state_dict(), monitor, true


def bias(model: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    return z + torch.linspace(-2, 2, K)


def trained_bias(model: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    return z + model.shift


def margin(model: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    return z - 2 * F.one_hot(y, K)


def mask(model: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    return z.masked_fill(torch.arange(K) == 6, -torch.inf)


def far_clamp(model: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    return z.clamp(-50, 50)


def finite(model: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    return torch.nan_to_num(z)


def check_values(monitor: Monitor, true: list[tuple[float, float]]) -> None:
    for name, at in (("margin_median", 0), ("head_loss", 1)):
        steps, values = monitor.history[name]
        assert {10, STEPS} <= set(steps.tolist()), name
        for step, value in zip(steps.tolist()[-20:], values.tolist()[-20:], strict=True):
            assert value == pytest.approx(true[step - 1][at], rel=5e-3, abs=2e-3), (name, step)


@pytest.mark.parametrize("returns", ["loss", "both", "logits"])
@pytest.mark.parametrize("change", [bias, trained_bias, margin, mask, far_clamp, finite])
def test_what_is_added_in_the_model_is_in_margins_and_displacements_stay(
    change: Change, returns: str
) -> None:
    state, monitor, true = train(change, returns)
    assert monitor is not None and monitor.alerts == []
    check_values(monitor, true)
    read = ("absorbed_fraction", "feature_mean_norm", "logit_displacement", "zero_sum_violation")
    assert all(len(monitor.history[name][0]) >= STEPS - 1 for name in read)
    bare, _, _ = train(change, returns, watch=False)
    assert all(torch.equal(state[name], bare[name]) for name in bare)


def test_a_loss_that_only_the_model_computes_is_seen_without_a_report() -> None:
    _, monitor, true = train(bias, "loss", report=False)
    assert monitor is not None
    check_values(monitor, true)
    assert not {"no_loss", "not_cross_entropy", "logits_added"} & {note.code for note in monitor.notes}


def soft_cap(model: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    return 3 * torch.tanh(z / 3)


def clamp(model: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    return z.clamp(-1, 1)


@pytest.mark.parametrize("returns", ["loss", "both", "logits"])
@pytest.mark.parametrize("change", [soft_cap, clamp])
def test_capped_logits_have_the_features_of_the_head_and_say_why_no_displacement(
    change: Change, returns: str
) -> None:
    state, monitor, true = train(change, returns)
    assert monitor is not None and monitor.alerts == []
    check_values(monitor, true)
    assert len(monitor.history["feature_mean_norm"][0]) >= STEPS - 1
    assert monitor.history["zero_sum_violation"][1].max() < 1e-4, "of the logits that the loss takes"
    assert len(monitor.history["logit_displacement"][0]) <= 1
    [note] = monitor.notes
    assert note.code == "displacement_left_out" and "multiplied or capped" in note.message
    bare, _, _ = train(change, returns, watch=False)
    assert all(torch.equal(state[name], bare[name]) for name in bare)


def trained_factor(model: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    return z * (model.factor + 0.5).exp()


def schedule(model: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    return z * 1.03 ** (model.steps + 15)


@pytest.mark.parametrize("report", [True, False])
@pytest.mark.parametrize("change", [trained_factor, schedule])
def test_a_factor_that_changes_is_followed(change: Change, report: bool) -> None:
    _, monitor, true = train(change, "logits", report=report)
    assert monitor is not None and monitor.alerts == []
    check_values(monitor, true)
    assert "logits_scaled" in {note.code for note in monitor.notes}
