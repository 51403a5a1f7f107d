"""Which rows are read: deterministic, all of them in time, and none preferred."""

from __future__ import annotations

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nfi_monitor import Monitor
from nfi_monitor.capture.sampling import (
    ROW_ELEMENTS,
    ROW_SHARE,
    CoordinateSample,
    auto_interval,
    offset,
    row_stride,
)
from nfi_monitor.measure import zero_sum
from nfi_monitor.native import library
from tests.measure import reference as ref

FAST = settings(deadline=None, derandomize=True, max_examples=100)


@FAST
@given(rows=st.integers(1, 10**6), classes=st.integers(1, 300_000))
def test_the_rows_read_respect_the_budget_and_are_never_none(rows, classes):
    stride = row_stride(rows, classes)
    read = math.ceil(rows / stride)
    assert 1 <= stride <= rows
    assert read <= max(ROW_ELEMENTS // classes, rows // ROW_SHARE, 1)
    if rows * classes <= ROW_ELEMENTS:
        assert stride == 1
    # At least a third of what the budget allows is used.
    assert read * 3 >= min(rows, max(ROW_ELEMENTS // classes, rows // ROW_SHARE, 1))


@FAST
@given(step=st.integers(0, 10**7), stride=st.integers(1, 5000))
def test_the_offset_is_a_function_of_the_step_and_lies_inside_the_stride(step, stride):
    assert 0 <= offset(step, stride) < stride
    assert offset(step, stride) == offset(step, stride)


@pytest.mark.parametrize("interval", range(1, 17))
@pytest.mark.parametrize("start", [1, 1_000_000])
def test_every_row_is_visited_whatever_the_cadence(interval, start):
    """Within 12 strides of readings; the slowest cadence, 16, takes 9.4."""
    for stride in (2, 3, 7, 16, 26, 64):
        seen = {offset(start + reading * interval, stride) for reading in range(12 * stride)}
        assert seen == set(range(stride))


@pytest.mark.parametrize("stride", [4, 16, 64])
def test_no_row_is_preferred(stride):
    readings = 200 * stride
    visits = torch.tensor([offset(step, stride) for step in range(1, readings + 1)]).bincount(
        minlength=stride
    )
    assert visits.min() >= 180 and visits.max() <= 220


@FAST
@given(tau=st.floats(0.1, 1e6))
def test_the_cadence_is_a_fifth_of_tau_between_8_and_16_and_at_most_half_of_a_short_one(tau):
    interval = auto_interval(tau)
    assert 1 <= interval <= max(1, min(16, math.ceil(tau / 2)))
    if tau >= 40:
        assert interval == min(16, round(tau / 5))
    elif tau >= 16:
        assert interval == 8
    else:
        assert interval == max(1, round(tau / 2))


@pytest.mark.parametrize("pair", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_a_sampled_violation_lies_within_its_error_bar_of_the_full_one(pair):
    """Rows from unsure to absorbed in random order: four standard errors, for each offset."""
    rows, classes = 4096, 256
    z, y = ref.make_logits(0, rows, classes, spread=1, margins=(-2, 22))
    grad, _ = ref.gradients(z, y, pair)
    full = zero_sum.row_violation(*zero_sum.row_sums(grad)).double()
    stride = row_stride(rows, classes)
    assert stride > 1
    for first in range(stride):
        part = zero_sum.row_violation(*zero_sum.row_sums(grad[first::stride])).double()
        bar = full.std().item() * math.sqrt((1 - 1 / stride) / len(part))
        assert abs(part.mean() - full.mean()).item() <= 4 * bar


def test_an_order_of_rows_with_the_period_of_the_stride_averages_out_over_steps():
    """Sequences of one length, the last token absorbed: one reading sees all or none of them."""
    rows, classes = 2048, 1024
    stride = row_stride(rows, classes)
    assert stride == 8
    violation = (torch.arange(rows) % stride == stride - 1).double()
    readings = [violation[offset(step, stride) :: stride].mean().item() for step in range(1, 8 * stride + 1)]
    assert set(readings) == {0.0, 1.0}
    assert sum(readings) / len(readings) == pytest.approx(1 / stride, abs=0.03)


@FAST
@given(
    sizes=st.lists(st.integers(1, 3_000), min_size=1, max_size=40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_sums_of_each_tensor_are_those_of_its_coordinates_and_of_no_other(sizes, dtype):
    sample = CoordinateSample([torch.empty(size) for size in sizes])
    values = torch.arange(2 * len(sample.segments), dtype=dtype).reshape(2, -1).sin()
    expected = torch.stack([values[:, start:end].double().sum(-1) for start, end in sample.spans], -1)
    torch.testing.assert_close(sample.per_tensor(values).double(), expected, rtol=1e-5, atol=1e-4)
    one = sample.per_tensor(values[0])
    assert one.shape == (len(sizes),) and one.dtype is dtype
    assert torch.equal(one, sample.per_tensor(values)[0])


@pytest.mark.parametrize("asked_before", [False, True])
def test_segments_and_weights_are_made_where_they_are_asked_for(asked_before: bool) -> None:
    """The library needs neither: together they take three times the memory of the sampled coordinates."""
    sample = CoordinateSample([torch.zeros(300, 200), torch.zeros(7), torch.zeros(90_000)])
    assert not {"segments", "weights"} & vars(sample).keys()
    end = sample.spans[1][1]
    known = [torch.full((stop - start,), tensor) for tensor, (start, stop) in enumerate(sample.spans)]
    if asked_before:
        assert torch.equal(sample.segments, torch.cat(known)) and sample.weights is not None
    part = sample.leading(2)
    assert torch.equal(part.segments, torch.cat(known[:2]))
    assert part.weights is not None and sample.weights is not None
    assert torch.equal(part.weights, sample.weights[:end])
    assert part.weights.sum().item() == pytest.approx(60_007, rel=1e-6)


def test_a_step_that_the_library_reads_makes_no_segments() -> None:
    if library.library() is None:
        pytest.skip("no C library")
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    others = [item for item in gc.get_objects() if type(item) is CoordinateSample]
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(6):
            F.cross_entropy(model(torch.randn(8, 6)), torch.randint(5, (8,))).backward()
            optimizer.step()
            optimizer.zero_grad()
        found = [item for item in gc.get_objects() if type(item) is CoordinateSample]
        samples = [item for item in found if all(item is not other for other in others)]
        assert samples and not any({"segments", "weights"} & vars(sample).keys() for sample in samples)
        assert monitor.history.full_readings == 6
