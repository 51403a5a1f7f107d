"""The numbers of a row plan are those of the row statistics, and it serves only where it may."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nfi_monitor.capture.rows import Rows
from nfi_monitor.measure import row_plan
from nfi_monitor.measure.accumulator import RowAccumulator
from nfi_monitor.measure.global_means import feature_sum
from nfi_monitor.measure.native_rows import row_statistics
from nfi_monitor.measure.row_plan import RowPlans
from nfi_monitor.native import library

pytestmark = pytest.mark.skipif(library.library() is None, reason="no C library")


def rows_of(
    count: int, classes: int, width: int, *, dtype: torch.dtype, seed: int, scale: float = 1.0
) -> Rows:
    """Rows of a cross-entropy, some of them absorbed where the scale is large."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=random, dtype=torch.float64)
    logits = (scale * torch.randn(count, classes, generator=random)).to(dtype).requires_grad_()
    target = torch.randint(classes, (count,), generator=random)
    target[::5] = logits.detach()[::5].argmax(-1)
    if count > 2:
        target[2] = -100
    F.cross_entropy(logits, target, reduction="sum").div(count).backward()
    assert logits.grad is not None
    kept = torch.float32 if dtype is torch.bfloat16 else dtype
    return Rows(logits.grad, logits.detach(), features.to(kept), total=count)


@given(
    count=st.integers(1, 70),
    classes=st.integers(2, 40),
    width=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    scale=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_the_numbers_are_those_of_the_row_statistics(
    count: int, classes: int, width: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    rows = rows_of(count, classes, width, dtype=dtype, seed=seed, scale=scale)
    kind = row_statistics(rows.grad, rows.logits, rows.total).loss_kind
    known = row_statistics(rows.grad, rows.logits, rows.total, kind, look=False)
    plans = RowPlans()
    for _ in range(2):  # the second time by the same plan
        found = plans.measure(rows, kind)
        assert found is not None and rows.features is not None
        assert torch.equal(
            torch.tensor(found.sums, dtype=known.sums.dtype).nan_to_num(7), known.sums.nan_to_num(7)
        )
        assert found.maxima == known.maxima.tolist()
        assert known.winner is not None and known.absorbed is not None
        assert sorted(found.absorbed.elements()) == sorted(known.winner[known.absorbed > 0].tolist())
        assert found.counted == known.counts.sum()
        assert found.feature_sum is not None and found.features is not None
        torch.testing.assert_close(found.feature_sum, feature_sum(rows.features, known.counts))
        assert torch.equal(found.features, rows.features[: row_plan.FEATURE_ROWS])


def test_features_of_rows_that_do_not_count_are_left_out() -> None:
    rows = rows_of(6, 4, 3, dtype=torch.float32, seed=0)
    assert rows.features is not None
    rows.features[2] = torch.nan  # row 2 is ignored
    kind = row_statistics(rows.grad, rows.logits, rows.total).loss_kind
    found = RowPlans().measure(rows, kind)
    assert found is not None and found.feature_sum is not None
    assert found.counted == 5 and torch.isfinite(found.feature_sum).all()


def test_strided_features_are_read_in_place() -> None:
    rows = rows_of(6, 4, 3, dtype=torch.float32, seed=1)
    assert rows.features is not None
    wide = torch.randn(6, 10)
    wide[:, 2:5] = rows.features
    kind = row_statistics(rows.grad, rows.logits, rows.total).loss_kind
    plans = RowPlans()
    known, found = plans.measure(rows, kind), None
    rows.features = wide[:, 2:5]
    found = plans.measure(rows, kind)
    assert known is not None and found is not None
    assert torch.equal(known.feature_sum, found.feature_sum) and torch.equal(known.features, found.features)


def added(parts: list[Rows]) -> RowAccumulator:
    accumulator = RowAccumulator()
    accumulator.add(parts[0])  # the kind of loss is looked at
    accumulator.clear(100)
    for part in parts:
        accumulator.add(part)
    return accumulator


def numbers(accumulator: RowAccumulator) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    accumulator.settle()
    total, mean = accumulator.feature_total, accumulator.feature_mean
    assert accumulator.sums is not None and accumulator.maxima is not None
    assert total is not None and mean is not None
    return accumulator.sums, accumulator.maxima, mean, total


def test_micro_batches_are_added_as_tensors_are() -> None:
    parts = [rows_of(9, 5, 3, dtype=torch.float32, seed=seed, scale=20.0) for seed in range(3)]
    by_plan = added(parts)
    assert by_plan.numbers is not None and by_plan.measured
    with library.disabled():
        by_torch = added(parts)
    assert by_torch.numbers is None
    torch.testing.assert_close(numbers(by_plan), numbers(by_torch), equal_nan=True)
    assert by_plan.absorbed == by_torch.absorbed


def test_rows_that_no_plan_can_read_are_added_to_the_numbers() -> None:
    parts = [rows_of(9, 5, 3, dtype=torch.float32, seed=seed) for seed in range(2)]
    by_plan = added(parts)
    parts[1].grad = parts[1].grad.t().contiguous().t()
    mixed = added(parts)
    assert mixed.numbers is None and mixed.sums is not None
    torch.testing.assert_close(numbers(mixed), numbers(by_plan), equal_nan=True)


def test_an_error_of_the_library_costs_no_rows() -> None:
    parts = [rows_of(9, 5, 3, dtype=torch.float32, seed=0)]
    known = numbers(added(parts))
    with patch.object(row_plan.RowPlan, "measure", side_effect=MemoryError("none")):
        failures = library._state.failures
        try:
            torch.testing.assert_close(numbers(added(parts)), known, equal_nan=True)
            assert library._state.failures == failures + 1
        finally:
            library._state.failures, library._state.fault = failures, ""


@pytest.mark.parametrize("what", ["normalized", "recomputed", "features"])
def test_other_rows_are_left_to_tensors(what: str) -> None:
    rows = rows_of(6, 4, 3, dtype=torch.float32, seed=0)
    kind = row_statistics(rows.grad, rows.logits, rows.total).loss_kind
    if what == "normalized":
        rows.normalized = True
    elif what == "recomputed":
        rows.recomputed = torch.tensor(True)
    else:
        rows.features = torch.randn(6, 3).half()
    assert RowPlans().measure(rows, kind) is None
