"""Rows put together from their shards are the rows: held against row_statistics on the whole of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nfi_monitor.measure.rows import LossKind, finish, row_statistics
from nfi_monitor.measure.sharded.rows import (
    FIELDS,
    HEADER,
    SHOWN,
    JoinedRows,
    join_shards,
    pack_shards,
    shard_rows,
)
from nfi_monitor.quantities import QUANTITIES
from tests.measure import reference as ref

FAST = settings(deadline=None, derandomize=True, max_examples=80)
COUNTED = (
    "live_fraction", "ignored_fraction", "underflowed_fraction", "non_finite_rows", "absorbed_fraction",
    "zero_sum_violation_share", "unexplained_violation_fraction", "soft_target_fraction",
)  # fmt: skip
OF_WHOLE_ROWS = {
    name for name, quantity in QUANTITIES.items() if quantity.per_row and not quantity.per_row.from_shards
} | {"mismatch_fraction", "uneven_fraction"}
"""They read all logits or gradients of a row, which no rank has."""


def cuts(classes: int, ranks: int) -> list[tuple[int, int]]:
    """(first, number) of each rank's classes, cut as ``Shard`` does: the last ranks may have none."""
    each = -(-classes // ranks)
    return [(min(r * each, classes), max(0, min(each, classes - r * each))) for r in range(ranks)]


def block(grad: torch.Tensor, logits: torch.Tensor, first: int, slots: int, **header: Any) -> torch.Tensor:
    """What a rank with these classes sends."""
    level = header.pop("level", None)
    rows = header.pop("batch", len(grad))
    group, look = header.pop("group", 0), header.pop("look", True)
    part = shard_rows(grad, logits, first, rows, level, look=look)
    sent = pack_shards([part], first, grad.shape[1], group, slots)
    out = torch.zeros(len(HEADER) + len(FIELDS) * slots, dtype=torch.float64)
    out[:SHOWN] = torch.tensor(sent.header, dtype=torch.float64)
    out[SHOWN : len(HEADER)] = sent.shown
    numbers = sent.numbers.reshape(-1)
    out[len(HEADER) : len(HEADER) + len(numbers)] = numbers
    return out


def joined(
    grad: torch.Tensor, logits: torch.Tensor, ranks: int, *, look: bool = True, known: LossKind | None = None
) -> JoinedRows:
    slots = len(grad) + 3
    parts = [
        block(grad[:, a : a + k], logits[:, a : a + k], a, slots, look=look)
        if k
        else torch.zeros(len(HEADER) + len(FIELDS) * slots, dtype=torch.float64)
        for a, k in cuts(grad.shape[1], ranks)
    ]
    dtype = torch.float64 if torch.float64 in (grad.dtype, logits.dtype) else torch.float32
    found = join_shards(torch.stack(parts), grad.shape[1], known, look=look, dtype=dtype)
    assert found is not None
    return found


def quantities_of(found: Any) -> dict[str, float]:
    return finish(found.sums.tolist(), found.maxima.tolist(), single_output=False)


def assert_alike(grad: torch.Tensor, logits: torch.Tensor, ranks: int, **options: Any) -> dict[str, float]:
    whole = row_statistics(grad, logits, len(grad))
    expected, got = quantities_of(whole), quantities_of(joined(grad, logits, ranks, **options))
    # Which rows are none of a cross-entropy is not known of shards: there absorption is not left out.
    left_out = {"absorbed_fraction", "partially_absorbed_fraction"} - expected.keys()
    assert got.keys() - left_out == expected.keys() - OF_WHOLE_ROWS
    for name in got.keys() - left_out:
        value = expected[name]
        if name in COUNTED:
            assert got[name] == pytest.approx(value, abs=1e-9), name
        else:  # an ulp of a logit is a relative error of ε and of the loss
            assert got[name] == pytest.approx(value, rel=3e-5, abs=1e-6, nan_ok=True), name
    return got


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    classes=st.sampled_from([2, 3, 5, 10, 97]),
    ranks=st.sampled_from([1, 2, 3, 4]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    margins=st.tuples(st.floats(-20, 110), st.floats(0, 40)),
    smoothing=st.sampled_from([0.0, 0.0, 0.1]),
    ignored=st.sampled_from([0, 0, 2]),
)
def test_shards_put_together_say_what_whole_rows_say(
    seed: int, rows: int, classes: int, ranks: int, dtype: torch.dtype, margins: Any, smoothing: float,
    ignored: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    lift = margins[0] + margins[1] * torch.rand(rows, generator=generator)
    logits[torch.arange(rows), target] += lift
    target[:ignored] = -100
    z = logits.to(dtype).requires_grad_()
    F.cross_entropy(z, target, label_smoothing=smoothing, reduction="sum").backward()
    assert z.grad is not None
    grad, z = z.grad, z.detach()
    # What is counted against the rounding floor may fall to either side of it, one ulp apart.
    whole = row_statistics(grad, z, rows)
    violation = grad.sum(-1, dtype=torch.float64).abs() / grad.abs().sum(-1, dtype=torch.float64)
    floor = float(whole.loss_kind.floor) if whole.loss_kind is not None else 0.0
    if not any(abs(float(v) - floor) < 2e-7 for v in violation):
        assert_alike(grad, z, ranks)


def absorbing(rows: int = 24, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.randn(rows, classes)
    target = torch.arange(rows) % classes
    logits[torch.arange(rows), target] += 24.0
    z = logits.requires_grad_()
    F.cross_entropy(z, target, reduction="sum").backward()
    assert z.grad is not None
    return z.grad, z.detach(), target


def test_a_row_whose_correct_class_is_on_one_rank_and_its_rivals_on_others_is_absorbed() -> None:
    grad, logits, target = absorbing()
    got = assert_alike(grad, logits, 4)
    assert got["absorbed_fraction"] == 1.0 and got["zero_sum_violation"] == pytest.approx(1.0)
    assert dict(joined(grad, logits, 4).absorbed) == {k: int((target == k).sum()) for k in range(10)}


def test_healthy_rows_cancel_over_the_shards_though_no_shard_does() -> None:
    z = torch.randn(16, 12, requires_grad=True)
    F.cross_entropy(z, torch.arange(16) % 12).backward()
    assert z.grad is not None
    got = assert_alike(z.grad, z.detach(), 3)
    assert got["zero_sum_violation"] < 1e-6
    shard = z.grad[:, :4]
    assert float((shard.sum(-1).abs() / shard.abs().sum(-1)).min()) > 0.1


def test_masked_classes_a_shard_that_is_masked_whole_and_a_row_with_nan_are_as_in_one_piece() -> None:
    z = torch.randn(8, 9)
    z[:, 3:6] = -torch.inf
    z[2, 7] = torch.nan
    z.requires_grad_()
    F.cross_entropy(z, torch.tensor([0, 1, 2, 6, 7, 8, 0, 1]), reduction="sum").backward()
    assert z.grad is not None
    got = assert_alike(z.grad, z.detach(), 3)
    assert got["non_finite_rows"] == 1.0 and math.isfinite(got["mean_logit"])


def test_a_float32_gradient_of_a_bfloat16_loss_is_judged_by_bfloat16_over_all_shards() -> None:
    z = torch.randn(32, 8, requires_grad=True)
    F.cross_entropy(z.bfloat16(), torch.arange(32) % 8, reduction="sum").backward()
    assert z.grad is not None
    kind = joined(z.grad, z.detach(), 2).loss_kind
    assert float(kind.eps) == torch.finfo(torch.bfloat16).eps
    assert_alike(z.grad, z.detach(), 2)
    one = z.grad.clone()
    one[0, 7] *= 1 + 2.0**-20  # a single number on the last rank that bfloat16 has not
    assert float(joined(one, z.detach(), 2).loss_kind.eps) == torch.finfo(torch.float32).eps


def test_a_correct_class_that_is_pushed_down_is_not_absorbed_where_a_rival_underflows() -> None:
    """As under a z-loss: no entry is negative, and the smallest one is a rival's that vanished."""
    logits = torch.tensor([[30.0, 0.0, -80.0, 1.0]])
    grad = torch.tensor([[1e-3, 1e-6, 0.0, 2e-6]])
    assert assert_alike(grad, logits, 2)["absorbed_fraction"] == 0.0


def test_between_looks_the_kind_of_loss_stands_and_what_tells_it_is_absent() -> None:
    grad, logits, _ = absorbing()
    known = joined(grad, logits, 2).loss_kind
    later = joined(grad, logits, 2, look=False, known=known)
    assert later.loss_kind == known
    values = quantities_of(later)
    assert values["absorbed_fraction"] == 1.0 and "mean_logit" not in values


def test_two_replicas_add_up_and_an_incomplete_one_is_left_out() -> None:
    grad, logits, _ = absorbing()
    slots = 32
    healthy = torch.randn(24, 10, requires_grad=True)
    F.cross_entropy(healthy, torch.arange(24) % 10, reduction="sum").backward()
    assert healthy.grad is not None
    z = healthy.detach()
    first = [block(grad[:, a : a + 5], logits[:, a : a + 5], a, slots, group=0) for a in (0, 5)]
    second = [block(healthy.grad[:, a : a + 5], z[:, a : a + 5], a, slots, group=1) for a in (0, 5)]
    both = join_shards(torch.stack([*second, *first]), 10, None, look=True, dtype=torch.float32)
    assert both is not None and both.groups == 2
    assert quantities_of(both)["absorbed_fraction"] == pytest.approx(0.5)
    part = join_shards(torch.stack([*first, second[1]]), 10, None, look=True, dtype=torch.float32)
    assert part is not None and part.groups == 1
    assert quantities_of(part)["absorbed_fraction"] == 1.0
    uneven = block(grad[:20, 5:], logits[:20, 5:], 5, slots, group=0)
    assert join_shards(torch.stack([first[0], uneven]), 10, None, look=True, dtype=torch.float32) is None


def test_micro_batches_beyond_the_slots_are_thinned_evenly() -> None:
    grad, logits, _ = absorbing(rows=30)
    parts = [shard_rows(grad, logits, 0, 30, None, look=True) for _ in range(3)]
    sent = pack_shards(parts, 0, 10, 0, slots=32)
    assert sent.numbers.shape == (len(FIELDS), 30) and sent.header[HEADER.index("batch_rows")] == 90
    everything = torch.cat([part.numbers for part in parts], dim=1)
    assert torch.equal(sent.numbers, everything[:, ::3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_count_are_counted_by_every_rank_alike(dtype: torch.dtype) -> None:
    """So that features averaged over all ranks are the mean over the rows that count."""
    grad, logits, _ = absorbing()
    grad[3] = 0  # ignored
    whole = row_statistics(grad.to(dtype), logits.to(dtype), len(grad))
    for first, k in cuts(10, 2):
        piece = slice(first, first + k)
        part = shard_rows(grad[:, piece].to(dtype), logits[:, piece].to(dtype), first, 24, None, look=False)
        assert torch.equal(part.counts, whole.counts)


def test_a_row_that_underflowed_is_counted_by_the_rank_that_has_its_correct_class() -> None:
    z = torch.zeros(4, 6)
    z[:, 0] = 200.0
    z.requires_grad_()
    F.cross_entropy(z, torch.zeros(4, dtype=torch.int64)).backward()
    assert z.grad is not None and not z.grad.any()
    parts = [
        shard_rows(z.grad[:, a : a + 3], z.detach()[:, a : a + 3], a, 4, None, look=True) for a in (0, 3)
    ]
    assert [float(part.counts.sum()) for part in parts] == [4.0, 0.0]
    assert assert_alike(z.grad, z.detach(), 2)["underflowed_fraction"] == 1.0


def test_the_fields_are_those_of_the_reference() -> None:
    """The numbers of one shard, recomputed by hand in float64."""
    grad, logits, _ = absorbing(rows=5, classes=6)
    part = shard_rows(grad[:, 2:5], logits[:, 2:5], 2, 5, None, look=True)
    values = dict(zip(FIELDS, part.numbers.double(), strict=True))
    g, z = grad[:, 2:5].double(), logits[:, 2:5].double()
    assert torch.allclose(values["signed"], g.sum(-1), rtol=1e-6)
    assert torch.equal(values["lowest_class"].long(), g.argmin(-1) + 2)
    assert torch.equal(values["winner"].long(), z.argmax(-1) + 2)
    order = z.sort(-1, descending=True).values
    assert torch.equal(values["runner_up"], order[:, 1])
    assert torch.allclose(values["log_rest"], order[:, 1:].logsumexp(-1) - order[:, 0], atol=1e-5)
    assert torch.equal(values["negatives"].long(), (g < 0).sum(-1))
    assert set(ref.UNIT) >= {torch.float32}
