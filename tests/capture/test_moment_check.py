"""What an optimizer's state means is found out by how it moves; RMS_t is right, or absent with a note."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nfi_monitor import Monitor
from nfi_monitor.capture.moment_check import MomentCheck
from tests import own_optimizers as own
from tests.runs import batch, differences, mlp, snapshot

STEPS = 24


def trained(
    kind: Any,
    watch: bool = True,
    *,
    steps: int = STEPS,
    closure: bool = False,
    dtype: Any = None,
    **options: Any,
) -> tuple[Any, Any, dict[int, float]]:
    """Train with new rows at each step; also return the largest RMS_t, from own averages of the gradients."""
    model = mlp().to(dtype)
    optimizer = kind(model.parameters(), **options)
    monitor = Monitor(model, optimizer, console=False, every=1) if watch else None
    averages = [torch.zeros_like(param, dtype=torch.float64) for param in model.parameters()]
    expected = {}
    for step in range(1, steps + 1):
        inputs, targets = batch(seed=step)

        def loss_of(inputs: Any = inputs, targets: Any = targets) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs.to(dtype)), targets)
            loss.backward()
            return loss

        if closure:
            optimizer.step(loss_of)
            continue
        loss = loss_of()
        if monitor is not None:
            monitor.observe_loss(loss)
        beta2, largest = optimizer.param_groups[0]["betas"][1], 0.0
        for average, param in zip(averages, model.parameters(), strict=True):
            square = param.grad.double().square()
            average.mul_(beta2).add_(square, alpha=1 - beta2)
            unbiased = (average / (1 - beta2**step)).clamp_min(1e-16)
            largest = max(largest, (square / unbiased).mean().sqrt().item())
        expected[step] = largest
        optimizer.step()
    return monitor, snapshot(model, optimizer), expected


def rms_t(monitor: Monitor) -> dict[int, float]:
    if "rms_t_max" not in monitor.history:
        return {}
    return dict(zip(*(column.tolist() for column in monitor.history["rms_t_max"]), strict=True))


def codes(monitor: Monitor) -> list[str]:
    return [note.code for note in monitor.notes]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.RAdam, {}),
        (own.Own, {}),
        (own.Own, {"betas": (0.9, 0.999, 0.9999)}),
        (own.Nested, {}),
        (own.Uncounted, {}),
        (own.Shared, {}),
        (own.Seeded, {}),
        (own.InPlace, {}),
    ],
)
def test_rms_t_of_a_true_second_moment_is_that_of_own_averages(kind: Any, options: dict[str, Any]) -> None:
    monitor, state, expected = trained(kind, **options)
    found = rms_t(monitor)
    assert len(found) >= STEPS - 1 and codes(monitor) == [] and monitor.alerts == []
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-3)
    assert differences(state, trained(kind, watch=False, **options)[1]) == []
    assert len(monitor.history["weight_norm"][0]) == STEPS
    monitor.close()


def test_a_moment_of_gradients_with_l2_is_understood() -> None:
    monitor, state, _ = trained(own.Coupled, weight_decay=1e-2)
    moment = torch.cat([held["exp_avg_sq"].flatten() for held in state["optimizer"]["state"].values()])
    found = monitor.history["sqrt_exp_avg_sq_mean"][1]
    assert len(found) >= STEPS - 1 and codes(monitor) == []
    assert found[-1] == pytest.approx((moment / (1 - 0.99**STEPS)).sqrt().mean().item(), rel=1e-4)
    monitor.close()


def test_the_maximum_divides_where_the_optimizer_keeps_one() -> None:
    monitor, state, _ = trained(own.Amsgrad)
    most = torch.cat([held["max_exp_avg_sq"].flatten() for held in state["optimizer"]["state"].values()])
    root = (most / (1 - 0.99**STEPS)).sqrt()
    assert monitor.history["sqrt_exp_avg_sq_mean"][1][-1] == pytest.approx(root.mean().item(), rel=1e-4)
    monitor.close()


def test_a_moment_that_begins_at_the_first_square_is_not_corrected() -> None:
    monitor, state, _ = trained(own.FromFirst, betas=(0.9, 0.9999))
    moment = torch.cat([held["exp_avg_sq"].flatten() for held in state["optimizer"]["state"].values()])
    found = monitor.history["sqrt_exp_avg_sq_mean"][1][-1]
    assert found == pytest.approx(moment.sqrt().mean().item(), rel=1e-4)
    monitor.close()


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (own.Scaled, {}, "6 of 6 tensors, which does not move in Scaled as an average of squared gradients"),
        (own.PerTensor, {}, "6 of 6 tensors, which PerTensor keeps in another shape"),
        (own.Adan, {"betas": (0.98, 0.92, 0.99)}, "which Adan makes of differences between gradients"),
        (own.Adafactor, {"betas": None}, "which Adafactor averages without a constant β2"),
        (own.Momentum, {}, "Momentum keeps no exp_avg_sq"),
    ],
)
def test_what_is_no_second_moment_is_left_out_and_said_once(
    kind: Any, options: dict[str, Any], says: str
) -> None:
    model = mlp()
    optimizer = kind(model.parameters(), **options)
    monitor = Monitor(model, optimizer, console=False, every=1)
    for step in range(STEPS):
        inputs, targets = batch(seed=step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        monitor.observe_loss(loss)
        loss.backward()
        optimizer.step()
    assert codes(monitor) == ["no_second_moment"] and says in monitor.notes[0].message
    assert rms_t(monitor) == {} and monitor.alerts == []
    for name in ("weight_norm", "gradient_norm", "update_rms", "logit_displacement", "zero_sum_violation"):
        assert len(monitor.history[name][0]) == STEPS, name
    monitor.close()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (own.Rotated, "3 of 6 tensors, which does not move"),
        (own.LowRank, "3 of 6 tensors, which LowRank keeps"),
    ],
)
def test_of_some_tensors_the_second_moment_is_read_and_norms_are_those_of_all(kind: Any, says: str) -> None:
    monitor, state, _ = trained(kind)
    assert codes(monitor) == ["second_moment_in_part"] and says in monitor.notes[0].message
    held = state["optimizer"]["state"]
    names = list(state["model"])
    moments = [held[at]["exp_avg_sq"] for at, name in enumerate(names) if name.endswith("bias")]
    root = (torch.cat(moments) / (1 - 0.99**STEPS)).sqrt()
    assert monitor.history["sqrt_exp_avg_sq_mean"][1][-1] == pytest.approx(root.mean().item(), rel=1e-4)
    norm = math.sqrt(sum(float(value.square().sum()) for value in state["model"].values()))
    steps, norms = monitor.history["weight_norm"]
    assert len(steps) == STEPS and norms[-1] == pytest.approx(norm, rel=1e-5)
    assert max(rms_t(monitor).values()) < 10 and "rms_t_head" not in monitor.history
    assert monitor.alerts == []
    monitor.close()


def test_a_moment_that_changes_its_meaning_later_is_left_out_from_then_on() -> None:
    monitor, _, expected = trained(own.Warming, steps=40)
    found = rms_t(monitor)
    assert set(range(2, 16)) <= set(found) and not set(found) & set(range(19, 41))
    assert all(found[step] == pytest.approx(expected[step], rel=1e-3) for step in range(2, 11))
    assert codes(monitor) == ["no_second_moment"]
    monitor.close()


def test_moments_of_half_precision_are_understood() -> None:
    monitor, _, expected = trained(own.Own, dtype=torch.bfloat16)
    found = rms_t(monitor)
    assert "no_second_moment" not in codes(monitor)
    assert len(found) >= STEPS - 1
    assert found[3] == pytest.approx(expected[3], rel=0.1)
    monitor.close()


def test_a_monitor_attached_late_understands_the_moments_too() -> None:
    model = mlp()
    optimizer = own.Own(model.parameters())
    for step in range(40):
        if step == 30:
            monitor = Monitor(model, optimizer, console=False, every=1)
        inputs, targets = batch(seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    assert sorted(rms_t(monitor)) == list(range(1, 11))
    moments = torch.cat([state["exp_avg_sq"].flatten() for state in optimizer.state.values()])
    root = (moments / (1 - 0.99**40)).sqrt().mean().item()
    assert monitor.history["sqrt_exp_avg_sq_mean"][1][-1] == pytest.approx(root, rel=1e-5)
    monitor.close()


@pytest.mark.parametrize("part", ["_before", "_after"])
def test_an_error_in_a_check_costs_the_second_moment_alone(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr(MomentCheck, part, fail)
    monitor, _, _ = trained(own.Own)
    assert codes(monitor) == ["failed_moment_check", "no_second_moment"]
    assert all("RuntimeError: odd" in note.message for note in monitor.notes)
    assert len(monitor.history["weight_norm"][0]) == STEPS and rms_t(monitor) == {}
    monitor.close()


def test_moments_of_double_precision_are_understood() -> None:
    monitor, _, expected = trained(own.Own, dtype=torch.float64, betas=(0.9, 0.999))
    found = rms_t(monitor)
    assert len(found) >= STEPS - 1 and codes(monitor) == []
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-6)
    monitor.close()


class FirstRows(nn.Module):
    """Computes its logits with the head's weight: no head runs, and only its gradient is read."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 64), nn.Linear(64, 7)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(self.body(inputs).relu(), self.head.weight, self.head.bias)


@pytest.mark.parametrize("closure", [False, True])
def test_an_update_made_in_the_gradients_memory_breaks_no_zero_sum(closure: bool) -> None:
    torch.manual_seed(0)
    model = FirstRows()
    optimizer = own.InPlace(model.parameters(), lr=1e-2)
    monitor = Monitor(model, optimizer, head="head", console=False, every=1)
    for step in range(STEPS):
        inputs, targets = batch(seed=step)

        def loss_of(inputs: Any = inputs, targets: Any = targets) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        loss = optimizer.step(loss_of) if closure else loss_of()
        if not closure:
            monitor.observe_loss(loss)
            optimizer.step()
    violations = monitor.history["zero_sum_violation_weight"][1] if not closure else []
    assert (len(violations), monitor.alerts) == (0 if closure else STEPS, [])
    assert all(violation < 1e-5 for violation in violations)
    assert ("zero_sum_violation_weight" in monitor.history) != closure
    unreadable = [note.message for note in monitor.notes if note.code == "state_unreadable"]
    assert len(unreadable) == closure and all("InPlace may overwrite it" in said for said in unreadable)
    for note in monitor.notes:
        if note.code == "no_second_moment":
            assert (
                closure and "left after optimizer.step(closure), where InPlace may overwrite" in note.message
            )
    monitor.close()


def test_gradients_of_a_closure_are_read_where_the_moments_agree_with_them() -> None:
    monitor, _, _ = trained(own.Own, closure=True)
    assert "zero_sum_violation_weight" in monitor.history and len(rms_t(monitor)) >= STEPS - 1
    assert not {"state_unreadable", "no_second_moment"} & set(codes(monitor))
    monitor.close()
