"""τ comes from the decay of the squared gradient, wherever an optimizer keeps it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nfi_monitor import Monitor
from nfi_monitor.capture.betas import ASSUMED_BETAS, betas_of, slots, value_at
from tests import own_optimizers as own
from tests.runs import batch, mlp


def named(name: str) -> Any:
    return type(name, (), {})()


@pytest.mark.parametrize(
    ("name", "betas", "state", "beta2"),
    [
        ("AdamW", (0.9, 0.999), (), 0.999),
        ("AdEMAMix", (0.9, 0.95, 0.9999), ("exp_avg", "exp_avg_sq", "exp_avg_slow"), 0.95),
        ("Adan", (0.98, 0.92, 0.99), (), 0.99),
        ("Other", (0.98, 0.92, 0.99), ("exp_avg", "exp_avg_sq", "exp_avg_diff"), 0.99),
        ("PNM", (0.9, 1.0), (), None),
        ("LARS", (0.9, 0.0), ("state1", "unorm_vec"), None),
        ("Lion", (0.9, 0.98), (), None),
        ("AggMo", (0.0, 0.9, 0.99), (), None),
        ("Signs", (0.9, 0.98), ("step", "exp_avg"), None),
        ("NovoGrad", (0.95, 0.98), ("moments", "grads_ema"), 0.98),
        ("AdaFactor", (0.9, 0.999), (), None),
        ("SGD", None, ("momentum_buffer",), None),
        ("Odd", (0.9, "high"), (), None),
        ("Odd", 0.9, (), None),
        ("Odd", (), (), None),
        ("Tensors", (torch.tensor(0.9), torch.tensor(0.99)), (), 0.99),
    ],
)
def test_the_decay_of_the_squared_gradient_is_found(name: str, betas: Any, state: Any, beta2: Any) -> None:
    found = betas_of(named(name), {"betas": betas}, dict.fromkeys(state, 0), None)
    assert found is None if beta2 is None else found is not None and found[1] == pytest.approx(beta2)


def test_where_the_moment_shows_its_decay_that_counts() -> None:
    group = {"betas": (0.9, 0.5, 0.99), "beta": 0.7}
    assert slots(group) == [("betas", 1), ("betas", 2), ("beta", None)]
    assert value_at(group, ("betas", 2)) == 0.99 and value_at(group, ("rho", None)) is None
    assert betas_of(named("Any"), group, {}, ("betas", 2)) == (0.9, 0.99)
    assert betas_of(named("Any"), {"beta": 0.7}, {}, ("beta", None)) == (ASSUMED_BETAS[0], 0.7)


class Third(own.Own):
    """Its third beta averages the squares."""

    def update(self, param: Any, grad: Any, state: Any, group: Any) -> None:
        super().update(param, grad, state, {**group, "betas": (0.9, group["betas"][2])})


def test_tau_follows_the_decay_with_which_the_moment_really_moves() -> None:
    model = mlp()
    optimizer = Third(model.parameters(), betas=(0.9, 0.5, 0.98))
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for step in range(5):
            inputs, targets = batch(seed=step)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        assert monitor.tau == pytest.approx(50)
        steps, means = monitor.history["sqrt_exp_avg_sq_mean"]
        moments = torch.cat([state["exp_avg_sq"].flatten() for state in optimizer.state.values()])
        assert steps[-1] == 5
        assert means[-1] == pytest.approx((moments / (1 - 0.98**5)).sqrt().mean().item(), rel=1e-5)


@pytest.mark.parametrize(("betas", "tau"), [((0.9, 1.0), 100), ((0.98, 0.92, 0.96), 25)])
def test_tau_is_right_from_the_first_step_on(betas: Any, tau: float) -> None:
    model = mlp()
    kind = own.Adan if len(betas) > 2 else own.Momentum
    with Monitor(model, kind(model.parameters(), betas=betas), console=False) as monitor:
        assert monitor.tau == pytest.approx(tau)
