"""Shards: what parts of a step add up to is what the whole step shows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nfi_monitor.capture.sampling import CoordinateSample
from nfi_monitor.capture.update import Update
from nfi_monitor.measure.memory import Memory
from nfi_monitor.measure.native_step import step_statistics
from nfi_monitor.measure.sharded.step import (
    HEAD_SUMS,
    HeadParts,
    StepParts,
    finish_head,
    finish_step,
    head_parts,
    step_parts,
)

K, D, ROWS = 7, 5, 4
SHAPES = [(6, D), (6,), (K, D), (K,)]  # a hidden layer and the head, with biases


def tensors(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def update_of(cut: tuple[int, int] | None, step: int) -> tuple[Update | None, list[int]]:
    """The step, or the part of it whose first axis lies in ``cut``; and which tensors it is of."""

    def part(values: list[Tensor]) -> list[Tensor]:
        return values if cut is None else [value[cut[0] : cut[1]] for value in values]

    grad, before = part(tensors(10 + step)), part(tensors(20 + step))
    moved, moment = part(tensors(30 + step, 0.1)), part([value.square() for value in tensors(40 + step)])
    places = [place for place, value in enumerate(grad) if value.numel()]
    if not places:
        return None, []
    kept = [before[place] for place in places]
    sample = CoordinateSample(kept)

    def packed(values: list[Tensor]) -> Tensor:
        return sample.gather([values[place] for place in places])

    after = [b + m for b, m in zip(before, moved, strict=True)]
    return Update(
        sample=sample,
        params=(),
        grad=packed(grad),
        before=packed(before),
        after=packed(after),
        exp_avg_sq=packed(moment),
        correction=0.3,
        eps=1e-3,
        lr=0.05,
        lrs=None,
        found_inf=None,
        head_position=places.index(2) if 2 in places else None,
        head_weight_update=after[2] - before[2],
        head_bias_update=after[3] - before[3],
        head_weight=after[2],
        head_weight_grad=grad[2],
        head_bias_grad=grad[3],
    ), places


def added(parts: list[Any]) -> Any:
    """Field by field: sums, and for ``extremes`` the largest."""
    fields = type(parts[0])._fields
    return type(parts[0])(
        *(
            torch.stack([getattr(part, name) for part in parts]).amax(0)
            if name == "extremes"
            else torch.stack([getattr(part, name) for part in parts]).sum(0)
            for name in fields
        )
    )


def whole() -> dict[str, float]:
    memory = None
    for step in (1, 2):
        update, _ = update_of(None, step)
        assert update is not None
        values, memory = step_statistics(update, features(), feature_mean(step), memory, step)
    return {name: float(value) for name, value in values.items()}


def features() -> Tensor:
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(1))


def feature_mean(step: int) -> Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(step))


def from_shards(cuts: list[tuple[int, int] | None], shares: float) -> dict[str, float]:
    steps: list[StepParts] = []
    heads: list[HeadParts] = []
    for cut in cuts:
        memory: Memory | None = None
        for step in (1, 2):
            update, places = update_of(cut, step)
            if update is None:
                continue
            share = [shares] * len(places)
            parts, memory = step_parts(update, places, share, len(SHAPES), memory, step)
        if update is not None:
            steps.append(parts)
        given = update if update is not None else empty()
        heads.append(head_parts(given, shares, (D, D, ROWS), features(), feature_mean(2) - feature_mean(1)))
    step_sums, head_sums = added(steps), added(heads)
    values = finish_step(step_sums.sums, step_sums.tensors, [len(s) > 1 for s in SHAPES], 2, 0.05)
    return values | finish_head(head_sums, K, len(cuts), feature_mean(2), ROWS, moved=True, tied=False)


def empty() -> Update:
    """Of a rank that holds nothing."""
    full, _ = update_of(None, 2)
    assert full is not None
    nothing = torch.zeros(0, D)
    return replace(
        full,
        head_weight=nothing,
        head_weight_update=nothing,
        head_weight_grad=nothing,
        head_bias_update=torch.zeros(0),
        head_bias_grad=torch.zeros(0),
    )


EXACT_SPLIT = {
    "two shards": ([(0, 4), (4, K)], 1.0),
    "one shard is empty": ([(0, 0), (0, K)], 1.0),
    "three replicas": ([None] * 3, 1 / 3),
    "two shards, held twice": ([(0, 3), (3, K)] * 2, 0.5),
}
MEDIANS = {"sqrt_exp_avg_sq_median", "head_sqrt_exp_avg_sq_median", "effective_learning_rate"}


@pytest.mark.parametrize("case", EXACT_SPLIT)
def test_parts_add_up_to_the_whole_step(case: str) -> None:
    cuts, shares = EXACT_SPLIT[case]
    expected, got = whole(), from_shards(cuts, shares)
    # The rows of two steps are compared by each rank for itself, not from shards.
    assert got.keys() | {"feature_mean_norm", "row_match"} == expected.keys()
    for name in got.keys() - MEDIANS:
        assert math.isclose(got[name], expected[name], rel_tol=2e-5, abs_tol=1e-6), (name, got[name])


def test_medians_are_those_of_the_shards_weighted_by_their_coordinates() -> None:
    got = from_shards([(0, 4), (4, K)], 1.0)
    roots = []
    for cut in ((0, 4), (4, K)):
        update, _ = update_of(cut, 2)
        assert update is not None and update.exp_avg_sq is not None
        root = (update.exp_avg_sq / 0.3).sqrt()
        roots.append((float(root.median()), len(root)))
    expected = sum(median * count for median, count in roots) / sum(count for _, count in roots)
    assert math.isclose(got["sqrt_exp_avg_sq_median"], expected, rel_tol=1e-6)
    head = got["head_sqrt_exp_avg_sq_median"]
    assert math.isclose(got["effective_learning_rate"], 0.05 / (head + 1e-3), rel_tol=1e-6)


def test_with_a_shard_missing_nothing_is_said_of_the_head() -> None:
    update, _ = update_of((0, 4), 2)
    assert update is not None
    parts = head_parts(update, 1.0, (D, D, ROWS), None, None)
    values = finish_head(parts, K, 2, feature_mean(2), 0, moved=False, tied=False)
    assert values == {}


def test_shards_of_groups_with_their_own_rates_add_up_to_the_whole_step() -> None:
    memory = parts_memory = None
    rates = [0.05, 0.05, 0.001, 0.0]
    for step in (1, 2):
        update, places = update_of(None, step)
        assert update is not None
        update = replace(update, lr=0.001, lrs=torch.tensor(rates)[update.sample.segments])
        values, memory = step_statistics(update, None, None, memory, step)
        parts, parts_memory = step_parts(update, places, [1.0] * 4, 4, parts_memory, step)
    finished = finish_step(parts.sums, parts.tensors, [len(s) > 1 for s in SHAPES], 2, 0.001)
    assert math.isclose(finished["secant_curvature"], float(values["secant_curvature"]), rel_tol=1e-4)


def test_shards_that_take_turns_are_not_compared_with_each_other() -> None:
    memory = None
    for step in (1, 2):
        update, places = update_of(None, step)
        assert update is not None
        update.sample.layout = tuple((place + 4 * step, 1) for place in range(4))
        parts, memory = step_parts(update, places, [1.0] * 4, 4, memory, step)
    assert "secant_curvature" not in finish_step(parts.sums, parts.tensors, [True] * 4, 2, 0.05)


@pytest.mark.parametrize("class_axis", [0, 1])
def test_a_large_head_that_is_read_for_many_ranks_is_not_copied(class_axis: int) -> None:
    classes, features = 8192, 64
    full, _ = update_of(None, 2)
    assert full is not None
    lies = torch.randn(classes, features) if class_axis == 0 else torch.randn(features, classes).T
    update = replace(
        full, head_weight=lies, head_weight_grad=None, head_bias_grad=None, head_weight_update=None
    )
    moved = torch.randn(features, dtype=torch.float64)
    with torch.profiler.profile(profile_memory=True) as profile:
        parts = head_parts(update, 1.0, (features, 0, 0), None, moved)
    made = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert 0 < made < lies.numel() * 4 // 2
    wide = lies.double()
    sums = dict(zip(HEAD_SUMS, parts.sums.tolist(), strict=True))
    assert sums["squares"] == pytest.approx(float(wide.square().sum()), rel=1e-5)
    torch.testing.assert_close(parts.classifier, wide.sum(0), rtol=1e-4, atol=1e-2)
    assert float(parts.extremes[0, 0]) == pytest.approx(float((wide @ moved).amax()), rel=1e-5)
