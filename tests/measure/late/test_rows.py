"""Rows reduced for a late host against the same rows measured at once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nfi_monitor.capture.rows import Rows
from nfi_monitor.measure import native_rows
from nfi_monitor.measure import rows as eager
from nfi_monitor.measure.late import rows as late
from nfi_monitor.measure.late.rows import KnownLoss, RowTotals, absorbed_classes, add_late, late_rows
from nfi_monitor.measure.rows import LOOK_SUMS, MASKS, MAXIMA, SUMS, RowStatistics
from tests.measure.late import unexpected

FAST = settings(deadline=None, derandomize=True, max_examples=100)


def rows_of(
    dtype: torch.dtype, rows: int, classes: int, scale: float, smoothing: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Gradient and logits; the first of several rows is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=generator) * scale).to(dtype).requires_grad_()
    targets = torch.randint(classes, (rows,), generator=generator)
    targets[: rows > 1] = -100
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    (grad,) = torch.autograd.grad(loss / rows, logits)
    return grad, logits.detach()


def both(grad: Tensor, logits: Tensor, rows: int) -> tuple[RowStatistics, Tensor, RowStatistics]:
    """As they arrive, with the mask of the device, and as measured at once."""
    facts = KnownLoss()
    facts.kind = eager.row_statistics(grad, logits, rows).loss_kind
    packed, counts = late_rows(Rows(grad, logits, None, rows), facts, look=False)
    found, rest = packed.outline().read(torch.cat(packed.flat), unexpected)
    assert not len(rest)
    return found, counts, eager.row_statistics(grad, logits, rows, facts.kind, look=False)


def same(found: RowStatistics, counts: Tensor, known: RowStatistics) -> None:
    assert counts.dtype is torch.bool and torch.equal(counts, known.counts > 0)
    for name in ("counts", "absorbed", "winner"):
        assert torch.equal(getattr(found, name), getattr(known, name)), name
    of_masks = len(MASKS)
    assert torch.equal(found.sums[:of_masks], known.sums[:of_masks])
    near = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(found.sums, known.sums, **near)
    torch.testing.assert_close(found.maxima, known.maxima, **near)


@FAST
@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    rows=st.sampled_from([1, 2, 9, 80]),
    classes=st.sampled_from([2, 3, 10, 300]),
    scale=st.sampled_from([0.1, 1.0, 10.0, 60.0, 300.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
)
def test_rows_that_arrive_late_are_those_measured_at_once(dtype, rows, classes, scale, smoothing, seed):
    same(*both(*rows_of(dtype, rows, classes, scale, smoothing, seed), rows))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logits", "gradient", "all but one logit", "all logits"])
def test_odd_rows_are_counted_as_they_are_at_once(value: float, where: str) -> None:
    grad, logits = rows_of(torch.float32, 6, 4, 3.0)
    if where == "gradient":
        grad[2, 1] = value
    else:
        logits[2, {"logits": slice(1), "all but one logit": slice(1, 4), "all logits": slice(4)}[where]] = (
            value
        )
    same(*both(grad, logits, 6))


def test_a_factor_after_the_head_is_that_of_the_last_look() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(40, 9) * 30).requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(logits / 16, torch.randint(9, (40,))), logits)
    found, _, known = both(grad, logits.detach(), 40)
    assert known.maxima[MAXIMA.index("logit_scale")] == pytest.approx(1 / 16, rel=1e-2)
    same(found, known.counts > 0, known)


def test_micro_batches_are_added_on_the_host() -> None:
    parts = [rows_of(torch.float32, 8, 5, 40.0, seed=seed) for seed in range(3)]
    facts = KnownLoss()
    facts.kind = eager.row_statistics(*parts[0], 8).loss_kind
    known = [eager.row_statistics(*part, 8, facts.kind, look=False) for part in parts]
    packed = [late_rows(Rows(*part, None, 8), facts, look=False)[0] for part in parts[1:]]
    first = RowTotals(known[0].sums, known[0].maxima)
    numbers = torch.cat([*(flat for one in packed for flat in one.flat), torch.ones(2)])
    totals, absorbed, rest = add_late(first, [one.outline() for one in packed], numbers, unexpected)
    assert totals is not None and rest.tolist() == [1.0, 1.0]
    torch.testing.assert_close(totals.sums, sum(one.sums for one in known), equal_nan=True)
    torch.testing.assert_close(totals.maxima, torch.stack([one.maxima for one in known]).amax(0))
    assert absorbed == absorbed_classes(known[1]) + absorbed_classes(known[2]) and absorbed.total() > 0
    assert sum(one.sums[SUMS.index("absorbed")] for one in known[1:]) == absorbed.total()


def arrived(rows: Rows, facts: KnownLoss, *, look: bool = True) -> RowStatistics:
    packed, _ = late_rows(rows, facts, look=look)
    return packed.outline().read(torch.cat(packed.flat).double(), unexpected)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pass_that_looks_brings_its_rows_and_its_facts_to_the_host(dtype: torch.dtype) -> None:
    grad, logits = rows_of(dtype, 40, 5, 3.0)
    facts = KnownLoss()
    found = arrived(Rows(grad, logits, None, 40), facts)
    known = native_rows.row_statistics(grad, logits, 40)
    torch.testing.assert_close(found.sums, known.sums)
    torch.testing.assert_close(found.maxima, known.maxima)
    assert known.loss_kind is not None and facts.kind == known.loss_kind
    assert not torch.isnan(found.sums).any()


def test_the_first_pass_looks_though_none_is_due_and_those_before_it_arrives_as_well() -> None:
    grad, logits = rows_of(torch.float32, 8, 5, 3.0)
    facts = KnownLoss()
    waiting = [late_rows(Rows(grad, logits, None, 8), facts, look=False)[0] for _ in range(2)]
    assert all("grad" in one.parts for one in waiting)
    waiting[0].finish(waiting[0].parts)
    assert "grad" not in late_rows(Rows(grad, logits, None, 8), facts, look=False)[0].parts


def test_of_many_logits_some_rows_are_looked_at_and_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    grad, logits = rows_of(torch.float32, 60, 5, 3.0)
    monkeypatch.setattr(late, "LOOKED_AT", 100)
    facts = KnownLoss()
    found = arrived(Rows(grad, logits, None, 60), facts)
    some = eager.row_statistics(grad[::3], logits[::3], 60)
    known = eager.row_statistics(grad, logits, 60)
    assert some.loss_kind == facts.kind
    for name, value, whole, part in zip(SUMS, found.sums, known.sums, some.sums, strict=True):
        expected = 3 * part if name in LOOK_SUMS else whole
        assert value.item() == pytest.approx(expected.item(), rel=1e-5), name


def test_recomputed_rows_that_are_not_the_run_s_do_not_count() -> None:
    grad, logits = rows_of(torch.float32, 8, 5, 3.0)
    for valid in (True, False):
        rows = Rows(grad, logits, None, 8, recomputed=torch.tensor(valid))
        packed, counts = late_rows(rows, KnownLoss(), look=True)
        found, _ = packed.outline().read(torch.cat(packed.flat), unexpected)
        assert counts.any() == found.sums.any() == valid
        assert found.sums[SUMS.index("recomputed")] == (8 if valid else 0)


def test_log_probabilities_show_no_mean_logit() -> None:
    grad, logits = rows_of(torch.float32, 8, 5, 3.0)
    found = arrived(Rows(grad, logits, None, 8, normalized=True), KnownLoss())
    assert math.isnan(found.sums[SUMS.index("mean_logit")])
