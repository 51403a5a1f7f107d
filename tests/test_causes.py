"""The cause, the precision of the loss and its kind, as whole runs with the monitor's defaults show them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import AlertKind, Mechanism, Monitor

Loss = Callable[[Tensor, Tensor], Tensor]


def watch(
    loss_of: Loss,
    steps: int,
    *,
    disturb: Callable[[int, torch.optim.Optimizer, Tensor], Tensor] = lambda step, optimizer, y: y,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.95),
    observe: bool = True,
    classes: int = 10,
) -> Monitor:
    """Train a small network on random rows, and return its monitor."""
    torch.manual_seed(0)
    x = torch.randn(150, 30)
    y = (x @ torch.randn(30, classes) + 0.5 * torch.randn(150, classes)).argmax(1)
    model = nn.Sequential(nn.Linear(30, 96), nn.ELU(), nn.Linear(96, 96), nn.ELU(), nn.Linear(96, classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=betas)
    with Monitor(model, optimizer, console=False, overhead_budget=None) as monitor:
        for step in range(1, steps + 1):
            loss = loss_of(model(x), disturb(step, optimizer, y))
            optimizer.zero_grad()
            loss.backward()
            if observe:
                monitor.observe_loss(loss)
            optimizer.step()
    return monitor


def slingshots(monitor: Monitor) -> list[Mechanism]:
    return [alert.mechanism for alert in monitor.alerts if alert.kind is AlertKind.SLINGSHOT]


def codes(monitor: Monitor) -> set[str]:
    return {note.code for note in monitor.notes}


def wrong_labels(step: int, optimizer: torch.optim.Optimizer, y: Tensor) -> Tensor:
    return (y + 1) % 10 if step == 300 else y


def large_rate(step: int, optimizer: torch.optim.Optimizer, y: Tensor) -> Tensor:
    if step == 300:
        optimizer.param_groups[0]["lr"] *= 300
    return y


@pytest.mark.parametrize("disturb", [wrong_labels, large_rate])
def test_in_a_run_that_absorbs_a_cause_from_outside_is_named_external(disturb) -> None:
    monitor = watch(F.cross_entropy, 340, disturb=disturb)
    assert any(alert.kind is AlertKind.AT_RISK for alert in monitor.alerts), "it absorbs"
    assert slingshots(monitor)[:1] == [Mechanism.EXTERNAL]


def test_without_a_cause_from_outside_the_same_run_has_a_numeric_slingshot() -> None:
    assert slingshots(watch(F.cross_entropy, 640)) == [Mechanism.NUMERICAL_FEATURE_INFLATION]


def one_hot(z: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(y, z.shape[-1]).float()


def focal(z: Tensor, y: Tensor) -> Tensor:
    each = F.binary_cross_entropy_with_logits(z, one_hot(z, y), reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).sum(-1).mean()


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda z, y: F.binary_cross_entropy_with_logits(z, one_hot(z, y)),
        lambda z, y: F.binary_cross_entropy_with_logits(z, (one_hot(z, y) + one_hot(z, 9 - y)).clamp(max=1)),
        focal,
        lambda z, y: F.mse_loss(z, one_hot(z, y)),
        lambda z, y: F.cross_entropy(10 * torch.tanh(z / 10), y),
    ],
    ids=["one-vs-rest", "multi-label", "focal", "regression", "soft-capped"],
)  # fmt: skip
def test_a_loss_without_a_zero_sum_stays_one_when_it_gets_small(loss_of: Loss) -> None:
    monitor = watch(loss_of, 500)
    assert [a for a in monitor.alerts if a.mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION] == []
    # Of capped logits, the graph shows that they are no longer the head's.
    said = codes(monitor) - {"logits_changed"}
    assert said == {"not_shift_invariant"}, "neither half precision nor soft targets explain it"


def test_logits_scaled_after_the_head_are_noticed_and_their_margins_alarm_nobody() -> None:
    monitor = watch(lambda z, y: F.cross_entropy(z / 50, y, label_smoothing=0.1), 400, lr=3e-3, observe=False)
    assert "logits_scaled" in codes(monitor) and monitor.alerts == []
    assert "logits_scaled" not in codes(watch(F.cross_entropy, 200))


@pytest.mark.parametrize("factor", [1 / 16, 30.0], ids=["muP", "cosine head"])
def test_a_factor_after_the_head_is_recovered_and_everything_is_in_nats_of_the_loss(factor: float) -> None:
    """The same training twice: with the factor behind the head, and with it in the head's own weight."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 12), torch.randint(0, 6, (64,))
    body = nn.Linear(12, 16)
    found = {}
    for behind in (True, False):
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))
        model[0].load_state_dict(body.state_dict())
        nn.init.zeros_(model[2].bias)
        with torch.no_grad():
            torch.manual_seed(1)
            weight = torch.randn(6, 16) / 4
            model[2].weight.copy_(weight / factor if behind else weight)
        # SGD: with the factor in the weight, the same step needs the rate times the factor squared.
        rates = [1e-2 / factor**2 if behind else 1e-2, 1e-2]
        optimizer = torch.optim.SGD(
            [{"params": model[2].parameters(), "lr": rates[0]}, {"params": model[0].parameters(), "lr": 1e-2}]
        )
        with Monitor(model, optimizer, console=False, every=1) as monitor:
            for _ in range(10):
                z = model(x)
                F.cross_entropy(z * factor if behind else z, y).backward()
                optimizer.step()
                optimizer.zero_grad()
        found[behind] = monitor.history
        assert ("logits_scaled" in codes(monitor)) is behind
    assert found[True]["logit_scale"][1] == pytest.approx(factor, rel=1e-3)
    assert len(found[False]["logit_scale"][1]) == 0
    for name in (
        "head_loss", "margin_median", "margin_min", "residual_mass", "mean_logit", "logit_displacement",
        "logit_displacement_rms", "feature_displacement",
    ):  # fmt: skip
        steps, expected = found[False][name]  # of a factor that may move, some are read more often
        others, values = found[True][name]
        assert len(steps) >= 8 and set(steps) <= set(others), name
        values = values[[step in steps for step in others]]
        assert values == pytest.approx(expected, rel=2e-3, abs=2e-5), name


def test_the_precision_of_the_loss_is_said_at_the_first_reading() -> None:
    half = watch(lambda z, y: F.cross_entropy(z.bfloat16(), y), 3)
    assert [(note.code, note.step) for note in half.notes] == [("half_precision_loss", 1)]
    unreported = watch(lambda z, y: F.cross_entropy(z.bfloat16(), y), 3, observe=False)
    assert "half_precision_loss" in codes(unreported)
    for loss_of in (F.cross_entropy, F.multi_margin_loss, lambda z, y: F.cross_entropy(z.double(), y)):
        assert "half_precision_loss" not in codes(watch(loss_of, 120))


def test_a_float32_run_that_explodes_is_not_called_half_precision() -> None:
    """Its last gradients are 0 and ±1/64, which fit into bfloat16 as well."""
    random = torch.Generator().manual_seed(4)
    x, y = torch.randn(64, 20, generator=random), torch.randint(10, (64,), generator=random)
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, console=False, overhead_budget=None) as monitor:
        for step in range(1, 301):
            if step == 100:  # the weights explode, and each row is sure of some class
                optimizer.param_groups[0]["lr"] = 0.0
                with torch.no_grad():
                    model[2].weight.mul_(1e6)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert monitor.history["loss_epsilon"][1].max() > 1e-4, "a reading looks like half precision"
    assert "half_precision_loss" not in codes(monitor)


def test_autocast_with_a_float32_loss_is_not_called_half_precision() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(8, 5), torch.randn(32, 8), torch.randint(0, 5, (32,))
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, console=False) as monitor:
        for _ in range(20):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            monitor.observe_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert "half_precision_loss" not in codes(monitor)


def test_advice_follows_the_precision_of_the_loss() -> None:
    half = watch(lambda z, y: F.cross_entropy(z.bfloat16(), y), 150)
    advice = " ".join(line for alert in half.alerts for line in alert.advice)
    assert "logits.float()" in advice and "raise_epsilon" not in advice


def test_finite_gradients_and_weights_that_are_not_mean_that_the_update_made_them() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(20, 5).half(), torch.randn(64, 20).half(), torch.randint(0, 5, (64,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)  # eps 1e-8 is 0 in float16
    with Monitor(model, optimizer, console=False) as monitor:
        for _ in range(3):
            loss = F.cross_entropy(model(x).float(), y) + 0.0 * model.bias[0]
            model.zero_grad()
            loss.backward()
            model.weight.grad[0, 0] = 0.0  # 0 / (0 + eps)
            monitor.observe_loss(loss)
            optimizer.step()
    alert = monitor.alerts[0]
    assert alert.evidence["non_finite_gradients"].value == 0 and "eps=1e-4" in alert.advice[0]
