"""W_G, μ_G and their cosine."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfi_monitor.measure import global_means
from tests.measure import reference as ref

FAST = settings(deadline=None, derandomize=True, max_examples=40)


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([2, 23, 3000]),
    dtype=st.sampled_from(list(ref.UNIT)),
    drift=st.sampled_from([0.0, 1e-3, 10.0]),
)
def test_the_classifier_mean_is_the_mean_over_classes_taken_in_float32(seed, classes, dtype, drift):
    weight = (torch.randn(classes, 4, generator=torch.Generator().manual_seed(seed)) + drift).to(dtype)
    found = global_means.classifier_mean(weight)
    assert found.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    columns = weight.double().T.tolist()
    expected = [math.fsum(column) / classes for column in columns]
    unit = ref.UNIT[found.dtype]
    scale = max(map(abs, weight.double().flatten().tolist()))
    assert found.double().tolist() == pytest.approx(expected, abs=unit * 16 * scale)


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_feature_sum_takes_the_rows_that_count(seed, rows, dtype):
    generator = torch.Generator().manual_seed(seed)
    features = (torch.randn(rows, 5, generator=generator) + 3).to(dtype)
    counts = torch.randint(2, (rows,), generator=generator).float()
    found = global_means.feature_sum(features, counts)
    kept = [row for row, count in zip(features.double().tolist(), counts.tolist(), strict=True) if count]
    expected = [math.fsum(column) for column in zip(*kept, strict=True)] if kept else [0.0] * 5
    assert found.dtype is dtype
    assert found.double().tolist() == pytest.approx(
        expected, rel=ref.UNIT[dtype] * rows, abs=ref.UNIT[dtype] * 8 * rows
    )


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 2, 128, 4096]),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    angle=st.sampled_from([-1.0, -0.9999, 0.0, 0.7, 1.0]),
)
def test_the_cosine_equals_the_float64_one(seed, size, scale, angle):
    """Tolerance u·(4 + √d): rounding errors of the d products are of random sign."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(size, generator=generator)
    b = (angle * a + math.sqrt(1 - angle**2) * torch.randn(size, generator=generator)) * scale
    x, y = a.double().tolist(), b.double().tolist()
    dot = math.fsum(p * q for p, q in zip(x, y, strict=True))
    expected = dot / math.sqrt(math.fsum(p * p for p in x) * math.fsum(q * q for q in y))
    assert global_means.cosine(a, b).item() == pytest.approx(
        expected, abs=2.0**-24 * (8 + 2 * math.sqrt(size))
    )


def test_the_cosine_with_nothing_is_no_number():
    assert global_means.cosine(torch.zeros(3), torch.ones(3)).isnan()
