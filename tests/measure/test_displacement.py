"""Logit displacement against a double loop; probe margins against their definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfi_monitor.measure import displacement
from tests.measure import reference as ref

FAST = settings(deadline=None, derandomize=True, max_examples=40)


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(2, 12),
    features=st.integers(1, 9),
    rows=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    bias=st.booleans(),
    common=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_logit_displacement_equals_a_double_loop(seed, classes, features, rows, dtype, bias, common):
    """``common`` moves all classes alike, which must not count.

    Tolerance: d products and two subtractions of numbers as large as the common part.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(classes, features, generator=generator) + common).to(dtype)
    moved = (torch.randn(classes, generator=generator) + common).to(dtype) if bias else None
    h = torch.randn(rows, features, generator=generator).to(dtype)
    largest, rms = displacement.logit_displacement(weight, moved, h)
    true_largest, true_rms = ref.logit_displacement(weight, moved, h)
    tolerance = ref.UNIT[dtype] * (features + 8) * (4 + common) * (1 + h.abs().max().item())
    assert largest.item() == pytest.approx(true_largest, abs=tolerance)
    assert rms.item() == pytest.approx(true_rms, abs=tolerance)


def test_a_common_shift_of_all_logits_is_no_displacement():
    weight = torch.full((5, 3), 0.25)
    largest, rms = displacement.logit_displacement(weight, torch.full((5,), 2.0), torch.randn(4, 3))
    assert largest.item() == rms.item() == 0


def test_displacement_is_what_the_margins_of_a_linear_head_feel():
    """Twice δ bounds the change of any margin."""
    torch.manual_seed(0)
    before, update, h = (
        torch.randn(6, 4).double(),
        0.1 * torch.randn(6, 4).double(),
        torch.randn(9, 4).double(),
    )
    y = torch.randint(6, (9,))
    old = displacement.probe_margins(h @ before.T, y)
    new = displacement.probe_margins(h @ (before + update).T, y)
    largest, _ = displacement.logit_displacement(update, None, h)
    felt = displacement.margin_displacement(old, new, 1).item()
    assert 0 < felt <= 2 * largest.item() + 1e-12


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 8),
    classes=st.sampled_from([2, 3, 40]),
    dtype=st.sampled_from(list(ref.UNIT)),
    margin=st.floats(-100, 120),
)
def test_probe_margins_are_the_label_minus_the_best_other_class(seed, rows, classes, dtype, margin):
    z, y = ref.make_logits(seed, rows, classes, spread=2, margins=(margin, margin + 1))
    z = z.to(dtype)
    expected = []
    for row, r in zip(z.double().tolist(), y.tolist(), strict=True):
        expected.append(row[r] - max(x for k, x in enumerate(row) if k != r))
    unit = ref.UNIT[dtype]
    assert displacement.probe_margins(z, y).double().tolist() == pytest.approx(expected, rel=unit, abs=0)


def test_tied_and_masked_probe_rows():
    z = torch.tensor([[1.0, 1.0, -math.inf], [5.0, -math.inf, 2.0]])
    assert displacement.probe_margins(z, torch.tensor([0, 2])).tolist() == [0.0, -3.0]


@FAST
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 16))
def test_margin_displacement_is_the_largest_change_per_step(seed, steps):
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    expected = max(abs(a - b) for a, b in zip(after.tolist(), before.tolist(), strict=True)) / steps
    found = displacement.margin_displacement(before, after, steps)
    assert found.item() == pytest.approx(expected, rel=1e-14)
