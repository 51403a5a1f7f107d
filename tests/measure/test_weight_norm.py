"""Norms and sums: exact where all is read, within the sample's own error bar where it is not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfi_monitor.capture.sampling import COORDINATES, COORDINATES_FULL, REDUCTION, CoordinateSample
from nfi_monitor.measure import weight_norm

FAST = settings(deadline=None, derandomize=True, max_examples=25)


def error_bar(tensors: list[torch.Tensor], sample: CoordinateSample) -> float:
    """Standard error of the stratified estimate of Σx²."""
    variance = 0.0
    for tensor, (start, end) in zip(tensors, sample.spans, strict=True):
        squares, read = tensor.double().flatten() ** 2, end - start
        if read < squares.numel():
            share = 1 - read / squares.numel()
            variance += squares.numel() ** 2 / read * share * squares.var().item()
    return math.sqrt(variance)


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    shapes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_small_models_are_read_whole_and_exactly(seed, shapes, dtype):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    sample = CoordinateSample(tensors)
    values = sample.gather(tensors)
    assert sample.weights is None and len(values) == sum(t.numel() for t in tensors) <= COORDINATES_FULL
    expected = math.sqrt(math.fsum(x * x for t in tensors for x in t.double().flatten().tolist()))
    assert weight_norm.norm(values, sample.weights).item() == pytest.approx(expected, rel=1e-5)
    total = math.fsum(x for t in tensors for x in t.double().flatten().tolist())
    assert weight_norm.stratified_sum(values, None).item() == pytest.approx(total, rel=1e-5, abs=1e-2)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_sampled_norm_lies_within_its_error_bar(seed, dtype):
    """Layers of very different scale, entries with heavy tails, a bias smaller than one stride."""
    torch.manual_seed(seed)
    shapes = [(300, 301), (77, 131), (64,), (5,), (1000, 90)]
    tensors = [
        (torch.randn(shape) * torch.exp(torch.randn(shape)) * scale).to(dtype)
        for shape, scale in zip(shapes, (0.1, 3.0, 10.0, 50.0, 0.01), strict=True)
    ]
    sample = CoordinateSample(tensors)
    values = sample.gather(tensors)
    assert len(values) < 0.2 * sum(t.numel() for t in tensors)
    squared = weight_norm.stratified_sum(values * values, sample.weights).item()
    exact = sum((t.double() ** 2).sum().item() for t in tensors)
    assert abs(squared - exact) <= 4 * error_bar(tensors, sample)
    assert weight_norm.norm(values, sample.weights).item() == pytest.approx(math.sqrt(squared), rel=1e-5)
    assert sample.weights.sum().item() == pytest.approx(sum(t.numel() for t in tensors), rel=1e-4)


@pytest.mark.parametrize("shape", [(16_384, 64), (2_048, 512), (512, 2_048)])
def test_the_sample_of_a_matrix_does_not_sit_in_a_few_of_its_columns(shape):
    """Columns are features: a stride that divides their number would always see the same few."""
    weight = torch.zeros(shape)
    sample = CoordinateSample([weight])
    columns = torch.arange(shape[1], dtype=torch.float32).expand(shape).contiguous()
    seen = sample.gather([columns]).unique()
    assert len(seen) >= shape[1] / 2
    rows = torch.arange(shape[0], dtype=torch.float32)[:, None].expand(shape).contiguous()
    assert len(sample.gather([rows]).unique()) >= min(shape[0], len(sample.segments)) / 2


@pytest.mark.parametrize("width", [300, 210, 30_030, 512, 997])
@pytest.mark.parametrize("size", [60_000, 200_000])
@pytest.mark.parametrize("reduced", [False, True])
def test_few_widths_make_the_sample_much_larger_or_smaller_than_its_budget(width, size, reduced):
    """A width of many small factors has few strides that visit all of its columns: 30,030 has 1 and 17."""
    sample = CoordinateSample([torch.empty(size // width + 1, width)], reduced=reduced)
    budget = COORDINATES // (REDUCTION if reduced else 1)
    assert budget / 4.2 <= len(sample.segments) <= 4.2 * budget


@pytest.mark.parametrize("shape", [(4, 3), (200, 210), (2, 30_030), (300, 200), (1024, 1024)])
def test_a_sample_can_be_lowered_only_where_that_makes_another_one(shape):
    tensors = [torch.empty(shape)]
    full, reduced = CoordinateSample(tensors), CoordinateSample(tensors, reduced=True)
    assert full.can_reduce is (full.strides != reduced.strides) and not reduced.can_reduce


def test_a_norm_that_lives_in_one_column_is_seen():
    weight = torch.zeros(16_384, 64)
    weight[:, 7] = 1.0
    sample = CoordinateSample([weight])
    found = weight_norm.norm(sample.gather([weight]), sample.weights).item()
    assert found == pytest.approx(128.0, rel=0.25)


def test_every_tensor_is_sampled_however_small():
    tensors = [torch.zeros(400, 500), torch.ones(3), torch.ones(70)]
    sample = CoordinateSample(tensors)
    assert (sample.counts >= torch.tensor([64.0, 3.0, 64.0])).all()
    assert torch.equal(sample.counts, sample.segments.bincount().float())
    assert sample.spans[-1][1] == len(sample.segments)
    assert weight_norm.stratified_sum(sample.gather(tensors), sample.weights).item() == pytest.approx(
        73, rel=1e-5
    )


def test_the_sample_is_the_same_every_time_and_takes_no_random_number():
    state = torch.get_rng_state()
    tensors = [torch.arange(90_000.0).reshape(300, 300)]
    one, two = (CoordinateSample(tensors).gather(tensors) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(state, torch.get_rng_state())
