"""The secant curvature is exact where the loss is a quadratic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfi_monitor.detect.situation import RunContext
from nfi_monitor.measure import curvature

FAST = settings(deadline=None, derandomize=True, max_examples=40)


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 20),
    lr=st.floats(1e-5, 1.0),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_secant_curvature_of_a_quadratic_is_its_preconditioned_rayleigh_quotient(
    seed, size, lr, weighted, dtype
):
    """lr · sᵀHs / sᵀPs; with sampling weights, of the weighted sums."""
    random = np.random.default_rng(seed)
    root = random.standard_normal((size, size))
    hessian = root @ root.T + np.eye(size)
    start, step = random.standard_normal((2, size))
    preconditioner = np.exp(random.standard_normal(size))
    weights = np.exp(random.standard_normal(size)) if weighted else np.ones(size)
    gradient_change = hessian @ (start + step) - hessian @ start
    tensors = [torch.from_numpy(x).to(dtype) for x in (step, gradient_change, preconditioner, weights)]
    found = curvature.secant_curvature(*tensors[:3], lr, tensors[3] if weighted else None)
    expected = lr * (step * weights) @ (hessian @ step) / ((step * weights) @ (preconditioner * step))
    # Weighted terms cancel: the error is relative to their absolute sum.
    terms = (
        lr * np.abs(step * weights) @ np.abs(hessian @ step) / ((step * weights) @ (preconditioner * step))
    )
    unit = 2.0**-24 if dtype is torch.float32 else 2.0**-53
    assert found.item() == pytest.approx(expected, rel=1e-12, abs=64 * unit * terms)


def test_a_step_that_did_not_move_has_no_curvature():
    nothing = torch.zeros(4)
    assert curvature.secant_curvature(nothing, nothing, torch.ones(4), 1e-3, None).isnan()


def test_each_coordinate_counts_with_its_own_rate_and_one_whose_rate_is_0_not_at_all():
    step, change, metric, lr, weights = torch.tensor(
        [[1.0, 2.0, 3.0], [4.0, -1.0, 2.0], [1.0, 0.5, 2.0], [1e-5, 1e-3, 0.0], [1.0, 3.0, 5.0]],
        dtype=torch.float64,
    )
    moving = slice(2)
    own = (step * weights * metric / lr * step)[moving].sum()
    expected = (step * weights * change)[moving].sum() / own
    assert curvature.secant_curvature(step, change, metric, lr, weights).item() == pytest.approx(
        expected.item(), rel=1e-12
    )


def test_adam_oscillates_on_a_quadratic_just_above_the_stability_limit_and_not_just_below():
    """The limit is a claim about torch's Adam, so torch's Adam decides: preconditioner held constant."""
    beta1 = 0.9
    for factor, stable in ((0.97, True), (1.03, False)):
        sharpness = factor * RunContext(beta1=beta1).stability_limit
        # So small that sqrt(v̂) is nothing beside ε_A, and the preconditioner is P = ε_A = 1.
        x = torch.tensor([1e-30], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([x], lr=1.0, betas=(beta1, 0.999), eps=1.0)
        path = []
        for _ in range(150):
            x.grad = sharpness * x.detach()
            optimizer.step()
            path.append(abs(x.item()))
        assert (max(path[100:]) < max(path[50:100])) is stable


@pytest.mark.parametrize("beta1, limit", [(0.9, 38.0), (0.0, 2.0), (0.5, 6.0)])
def test_the_stability_limit_of_cohen_et_al(beta1, limit):
    assert RunContext(beta1=beta1).stability_limit == pytest.approx(limit)
