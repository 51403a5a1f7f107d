"""Zero-sum violation: against exactly rounded sums, on the gradients that autograd makes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfi_monitor.measure import zero_sum
from tests.measure import reference as ref

FAST = settings(deadline=None, derandomize=True, max_examples=40)


def violation(grad: torch.Tensor) -> torch.Tensor:
    return zero_sum.row_violation(*zero_sum.row_sums(grad))


def exact(grad: torch.Tensor) -> list[float]:
    rows = grad.double().tolist()
    return [min(abs(math.fsum(g)) / math.fsum(map(abs, g)), 1.0) if any(g) else 0.0 for g in rows]


def close(grad: torch.Tensor, expected):
    """The monitor's own sums: the signed one is pairwise, 6 u of Σ|g|; the absolute one is torch's vector
    norm, which adds one entry after the other, up to K/2 u relative (3.4e-4 measured at K = 50,257)."""
    unit = ref.UNIT[torch.float64 if grad.dtype is torch.float64 else torch.float32]
    return pytest.approx(expected, rel=unit * (4 + grad.shape[-1] / 2), abs=6 * unit)


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([2, 3, 10, 97, 1000]),
    pair=st.sampled_from(ref.PAIRS),
    loss=st.sampled_from(ref.SHIFT_INVARIANT + ref.NOT_SHIFT_INVARIANT),
    margin=st.sampled_from([-5.0, 1.0, 6.0, 14.0, 18.0, 40.0, 120.0]),
    spread=st.sampled_from([0.0, 1.0, 5.0]),
)
def test_row_violation_is_the_exactly_rounded_ratio(seed, classes, pair, loss, margin, spread):
    z, y = ref.make_logits(seed, 8, classes, spread=spread, margins=(margin - 1, margin + 1))
    grad, _ = ref.gradients(z, y, pair, loss, ref.loss_scale(pair, 8))
    found = violation(grad)
    assert found.dtype is (torch.float64 if pair[0] is torch.float64 else torch.float32)
    assert found.tolist() == close(grad, exact(grad))


@pytest.mark.parametrize("pair", ref.PAIRS, ids=str)
def test_row_violation_is_right_at_vocabulary_size(pair):
    for spread, margin in ((0.0, 0.0), (0.0, 19.0), (2.0, 3.0)):
        z, y = ref.make_logits(1, 2, 50_257, spread=spread, margins=(margin, margin))
        grad, _ = ref.gradients(z, y, pair, scale=ref.loss_scale(pair, 2))
        assert violation(grad).tolist() == close(grad, exact(grad))


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    power=st.integers(-20, 20),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_power_of_two_changes_no_bit_of_the_violation(seed, power, dtype):
    z, y = ref.make_logits(seed, 6, 20, spread=2, margins=(-3, 20))
    grad, _ = ref.gradients(z, y, (dtype, dtype))
    assert torch.equal(violation(grad), violation(grad * 2.0**power))


@pytest.mark.parametrize("pair", [p for p in ref.PAIRS if torch.float16 not in p], ids=str)
def test_loss_scaling_and_sum_reduction_change_no_bit_of_the_violation(pair):
    z, y = ref.make_logits(3, 16, 12, spread=2, margins=(-3, 20))
    mean, _ = ref.gradients(z, y, pair)
    scaled, _ = ref.gradients(z, y, pair, scale=65536.0)
    summed, _ = ref.gradients(
        z, y, pair, loss=lambda a, b: torch.nn.functional.cross_entropy(a, b, reduction="sum")
    )
    assert torch.equal(violation(mean), violation(scaled))
    assert torch.equal(violation(mean), violation(summed))


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([2, 3, 10, 100, 1000]),
    pair=st.sampled_from(ref.PAIRS),
    spread=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_rows_with_margins_up_to_2_stay_under_the_rounding_floor(seed, classes, pair, spread):
    z, y = ref.make_logits(seed, 32, classes, spread=spread, margins=(-2, 2))
    grad, _ = ref.gradients(z, y, pair, scale=ref.loss_scale(pair, 32))
    floor = zero_sum.rounding_floor(ref.effective(pair), classes)
    assert violation(grad).max().item() <= floor


@pytest.mark.parametrize("pair", ref.PAIRS, ids=str)
@pytest.mark.parametrize("classes", [10_000, 50_257])
def test_rows_with_margins_up_to_2_stay_under_the_rounding_floor_at_vocabulary_size(pair, classes):
    for spread in (0.0, 1.0):
        z, y = ref.make_logits(4, 3, classes, spread=spread, margins=(0, 2))
        grad, _ = ref.gradients(z, y, pair, scale=ref.loss_scale(pair, 3))
        floor = zero_sum.rounding_floor(ref.effective(pair), classes)
        assert violation(grad).max().item() <= floor


@pytest.mark.parametrize("dtype", ref.UNIT, ids=str)
def test_the_rounding_floor_is_far_below_a_violation_that_matters(dtype):
    # 5% is where absorption is called; a floor near it would call nothing partial.
    assert all(zero_sum.rounding_floor(dtype, classes) <= 0.05 for classes in (2, 1000, 50_257))


@pytest.mark.parametrize("classes", [2, 3, 1000, 50_257])
def test_an_absorbed_row_violates_the_zero_sum_fully(classes):
    z, y = ref.make_logits(0, 2, classes, spread=0, margins=(30, 60))
    grad, _ = ref.gradients(z, y)
    assert grad.gather(-1, y[:, None]).abs().max() == 0
    assert violation(grad).tolist() == close(grad, [1.0, 1.0])
    assert violation(grad).max() <= 1.0


def test_a_row_without_gradient_has_no_violation():
    for dtype in ref.UNIT:
        assert violation(torch.zeros(3, 7, dtype=dtype)).tolist() == [0.0] * 3


def test_no_rows_give_no_violations():
    assert violation(torch.zeros(0, 7)).shape == (0,)


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    margin=st.sampled_from([0.0, 8.0, 15.0, 20.0]),
    classes=st.sampled_from([2, 23, 300]),
)
def test_weight_and_bias_violation_equal_the_exactly_rounded_sums(seed, dtype, margin, classes):
    z, y = ref.make_logits(seed, 24, classes, spread=1, margins=(margin, margin + 2))
    grad, _ = ref.gradients(z, y, (dtype, dtype))
    features = torch.randn(24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weight_grad = (grad.double().T @ features).to(dtype)
    bias_grad = grad.sum(0)
    tolerance = ref.UNIT[torch.float64 if dtype is torch.float64 else torch.float32] * classes * 5 / 2
    columns = weight_grad.double().T.tolist()
    signed = math.fsum(abs(math.fsum(column)) for column in columns)
    absolute = math.fsum(math.fsum(map(abs, column)) for column in columns)
    assert zero_sum.weight_violation(weight_grad).item() == pytest.approx(
        signed / absolute, rel=tolerance, abs=tolerance
    )
    assert zero_sum.bias_violation(bias_grad).item() == pytest.approx(
        exact(bias_grad[None])[0], rel=tolerance, abs=tolerance
    )


def test_weight_violation_reads_a_transposed_view_alike():
    """GPT-2's Conv1D keeps the weight [d, K]."""
    grad = torch.randn(40, 6)
    assert zero_sum.weight_violation(grad.T.contiguous().T).item() == pytest.approx(
        zero_sum.weight_violation(grad).item(), rel=1e-5
    )


def test_a_few_columns_are_read_without_changing_them():
    grad = torch.randn(300, 20)
    before = grad.clone()
    found = zero_sum.weight_violation(grad[:, 3:5])
    assert torch.equal(grad, before)
    assert torch.equal(found, zero_sum.weight_violation(before[:, 3:5].clone()))


def test_gradients_that_are_all_zero_give_a_weight_violation_of_zero():
    assert zero_sum.weight_violation(torch.zeros(4, 3)).item() == 0
    assert zero_sum.bias_violation(torch.zeros(4)).item() == 0
