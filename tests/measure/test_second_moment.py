"""sqrt(v̂), RMS_t and the effective learning rate, against the papers' formulas and torch's own optimizer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfi_monitor.capture.sampling import CoordinateSample
from nfi_monitor.measure import second_moment
from tests.measure import reference as ref

FAST = settings(deadline=None, derandomize=True, max_examples=30)


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 12),
    beta2=st.sampled_from([0.9, 0.95, 0.99, 0.999]),
    eps=st.sampled_from([1e-10, 1e-8, 1e-3]),
    scale=st.sampled_from([1e-9, 1e-3, 10.0]),
    kind=st.sampled_from([torch.optim.Adam, torch.optim.AdamW]),
    foreach=st.booleans(),
)
def test_root_is_the_denominator_of_the_real_step(seed, steps, beta2, eps, scale, kind, foreach):
    """sqrt(v̂) from torch's state equals the formula's on the same gradients, and explains the step taken."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(30, generator=generator, dtype=torch.float64))
    options = {"lr": 1e-2, "betas": (0.9, beta2), "eps": eps, "weight_decay": 0.0, "foreach": foreach}
    optimizer = kind([weight], **options)
    truth = ref.Adam64(1e-2, (0.9, beta2), eps, 0.0)
    expected = weight.detach().numpy().copy()
    for _ in range(steps):
        weight.grad = scale * torch.randn(30, generator=generator, dtype=torch.float64)
        expected = truth.step(expected, weight.grad.numpy())
        optimizer.step()
    state = optimizer.state[weight]
    root = second_moment.root(state["exp_avg_sq"], 1 - beta2 ** state["step"].item())
    np.testing.assert_allclose(root.numpy(), truth.root(), rtol=1e-12)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-12, atol=1e-15)


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    eps=st.sampled_from([1e-8, 1e-2, 10.0]),
    per_coordinate=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_rms_t_of_each_tensor_equals_a_loop(seed, sizes, eps, per_coordinate, dtype):
    random = np.random.default_rng(seed)
    grads = [random.standard_normal(size) * 10.0 ** random.integers(-6, 2) for size in sizes]
    roots = [np.abs(random.standard_normal(size)) * 10.0 ** random.integers(-6, 2) for size in sizes]
    packed_grad = torch.from_numpy(np.concatenate(grads)).to(dtype)
    packed_root = torch.from_numpy(np.concatenate(roots)).to(dtype)
    sample = CoordinateSample([torch.empty(size) for size in sizes])
    given_eps = torch.full_like(packed_root, eps) if per_coordinate else eps
    found = second_moment.rms_t(packed_grad, packed_root, given_eps, sample)
    expected = []
    for grad, root in zip(packed_grad.split(sizes), packed_root.split(sizes), strict=True):
        terms = [g * g / max(r * r, eps * eps) for g, r in zip(grad.tolist(), root.tolist(), strict=True)]
        expected.append(math.sqrt(math.fsum(terms) / len(terms)))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_rms_t_is_1_where_the_second_moment_describes_the_gradient():
    grad = torch.randn(50)
    sample = CoordinateSample([grad])
    assert second_moment.rms_t(grad, grad.abs(), 1e-12, sample).item() == pytest.approx(1, rel=1e-6)


@FAST
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 4096))
def test_the_median_of_a_small_sample_is_exact(seed, size):
    values = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    assert second_moment.median(values).item() == ref.lower_median(values.tolist())


@pytest.mark.parametrize("size", [4097, 20_000, 32_768])
def test_the_median_of_a_large_sample_lies_between_its_own_quantiles(size):
    """Of n entries the median's rank is off by √n/2: four of those, out of at least 2048 entries."""
    values = torch.exp(4 * torch.randn(size))
    ranks = 0.5 + torch.tensor([-1.0, 1.0]) * 4 * 0.5 / math.sqrt(2048)
    low, high = torch.quantile(values, ranks).tolist()
    assert low <= second_moment.median(values).item() <= high


@FAST
@given(lr=st.floats(1e-6, 1), root=st.floats(0, 1), eps=st.floats(1e-10, 1e-3))
def test_the_effective_learning_rate_is_lr_over_root_plus_eps(lr, root, eps):
    found = second_moment.effective_learning_rate(lr, torch.tensor(root, dtype=torch.float64), eps)
    assert found.item() == pytest.approx(lr / (root + eps), rel=1e-12)
