"""Absorbed, underflowed and ignored rows, told apart without labels, against what the labels say."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nfi_monitor.measure import absorption
from nfi_monitor.measure.rows import shown_precision
from tests.measure import reference as ref
from tests.measure.measured import absorbed_rows, quantities

pytestmark = pytest.mark.usefixtures("both_ways")

FAST = settings(deadline=None, derandomize=True, max_examples=50)

ONSET = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}
"""Absorption with one competitor begins at this many ln 2: where e^-margin is half an ulp below 1."""


def absorbed_by_label(grad: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    own = grad.gather(-1, y[:, None])[:, 0]
    others = grad.scatter(-1, y[:, None], 0).abs().amax(-1)
    return (own == 0) & (others > 0)


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([2, 3, 10, 1000]),
    pair=st.sampled_from(ref.PAIRS),
    loss=st.sampled_from([ref.cross_entropy, ref.class_weights]),
    margin=st.integers(-10, 120),
    spread=st.sampled_from([0.0, 1.0]),
)
def test_a_row_is_absorbed_iff_the_labels_gradient_is_0_and_others_are_not(
    seed, classes, pair, loss, margin, spread
):
    z, y = ref.make_logits(seed, 12, classes, spread=spread, margins=(margin, margin + 4))
    grad, logits = ref.gradients(z, y, pair, loss, ref.loss_scale(pair, 12))
    assert torch.equal(absorbed_rows(grad, logits), absorbed_by_label(grad, y))


@pytest.mark.parametrize("pair", ref.PAIRS, ids=str)
def test_absorption_is_read_right_at_vocabulary_size(pair):
    seen = set()
    for margin in (5.0, 14.0, 20.0, 30.0, 50.0):
        z, y = ref.make_logits(0, 2, 50_257, spread=0, margins=(margin, margin))
        grad, logits = ref.gradients(z, y, pair, scale=ref.loss_scale(pair, 2))
        found = absorbed_rows(grad, logits)
        assert torch.equal(found, absorbed_by_label(grad, y))
        seen |= set(found.tolist())
    # float16 cannot hold a p_k = e^-28 of its own, so there the row goes silent before it absorbs.
    assert seen == ({False} if pair == (torch.float16, torch.float32) else {True, False})


@pytest.mark.parametrize("dtype", ONSET, ids=str)
@pytest.mark.parametrize("classes", [2, 10])
def test_absorption_begins_where_the_table_says(dtype, classes):
    """One competitor, the others masked far away; every margin is a number of the dtype."""
    onset = ONSET[dtype] * math.log(2)
    spacing = 2.0 ** math.floor(math.log2(onset)) * 2 * ref.UNIT[dtype]
    step = max(spacing, 0.01)
    margins = onset + step * torch.arange(-4, 5, dtype=torch.float64)
    z = torch.full((9, classes), -150.0, dtype=torch.float64)
    z[:, 0], z[:, 1] = 0.0, -margins
    grad, logits = ref.gradients(
        z, torch.zeros(9, dtype=torch.long), (dtype, dtype), scale=ref.loss_scale((dtype, dtype), 9)
    )
    real = -logits[:, 1].double()
    found = absorbed_rows(grad, logits)
    assert found[real > onset + step].all() and (real > onset + step).sum() >= 2
    assert not found[real < onset - step].any() and (real < onset - step).sum() >= 2


@pytest.mark.parametrize("dtype", ONSET, ids=str)
@pytest.mark.parametrize("classes", [10, 1000])
def test_ties_delay_absorption_by_at_most_their_number(dtype, classes):
    """K − 1 tied competitors: between the onset of one, and the onset of one with all their mass."""
    onset = ONSET[dtype] * math.log(2)
    margins = torch.linspace(onset - 3, onset + math.log(classes - 1) + 1, 200, dtype=torch.float64)
    z = torch.zeros(200, classes, dtype=torch.float64)
    z[:, 0] = margins
    pair = (dtype, dtype)
    grad, logits = ref.gradients(z, torch.zeros(200, dtype=torch.long), pair, scale=ref.loss_scale(pair, 200))
    real, found = logits[:, 0].double(), absorbed_rows(grad, logits)
    first = real[found].min().item()
    coarse = 32 * ref.UNIT[dtype] + 0.05
    assert onset - coarse <= first <= onset + math.log(classes - 1) + coarse


def test_a_float64_loss_on_float32_logits_absorbs_nothing_that_float32_would():
    z, y = ref.make_logits(0, 64, 10, spread=1, margins=(17, 33))
    assert absorbed_rows(*ref.gradients(z, y, (torch.float32, torch.float32))).float().mean() > 0.9
    assert not absorbed_rows(*ref.gradients(z, y, (torch.float32, torch.float64))).any()


def test_rows_of_zeros_and_of_negative_zeros_are_not_absorbed():
    z = torch.randn(2, 4)
    assert not absorbed_rows(torch.zeros(2, 4), z).any()
    assert not absorbed_rows(-torch.zeros(2, 4), z).any()


def test_a_negative_zero_counts_as_exactly_zero():
    assert absorbed_rows(torch.tensor([[-0.0, 0.0, 1e-30]]), torch.tensor([[70.0, 0.0, 1.0]])).all()


def test_a_row_whose_correct_class_is_pushed_up_is_not_absorbed():
    """z-loss makes g_r positive on sure rows: no negative entry, and yet the correct class's is not 0."""
    z, y = ref.make_logits(0, 64, 10, spread=1, margins=(9, 12), shift=8.0)
    grad, logits = ref.gradients(z, y, loss=ref.z_loss)
    pushed = (grad >= 0).all(-1) & (grad.gather(-1, y[:, None])[:, 0] > 0)
    assert pushed.all()
    assert not absorbed_rows(grad, logits).any()


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    pair=st.sampled_from(
        [p for p in ref.PAIRS if p[0] is not torch.float64 and p != (torch.float32, torch.float16)]
    ),
    rows=st.sampled_from([1, 6, 33]),
    margin=st.integers(4, 120),
    scale=st.sampled_from([1.0, 128.0]),
)
def test_silent_rows_with_a_label_are_underflowed_and_ignored_ones_are_not(seed, pair, rows, margin, scale):
    """Ignored rows are unsure (margin below 3 nats); with a sure one, labels would be needed."""
    z, y = ref.make_logits(seed, rows, 5, spread=0.5, margins=(margin, margin + 6))
    ignored = torch.arange(rows) % 3 == 1
    y[ignored] = ref.IGNORED
    z[ignored] = z[ignored].clamp(-1, 1)
    grad, logits = ref.gradients(z, y, pair, scale=scale)
    silent = (grad == 0).all(-1)
    found = quantities(grad, logits)
    assert found["ignored_fraction"] * rows == pytest.approx(ignored.sum().item())
    counted = rows - ignored.sum().item()
    if counted:
        assert found["underflowed_fraction"] * counted == pytest.approx((silent & ~ignored).sum().item())


def test_rows_that_underflow_in_a_float16_loss_are_underflowed_in_its_float32_head():
    """The gradient that arrives is float32; that it went through float16 shows in the live rows."""
    z, y = ref.make_logits(0, 12, 5, spread=0.5, margins=(-1, 3))
    z[::2, :] = 0
    z[::2].scatter_(-1, y[::2, None], 25.0)
    grad, logits = ref.gradients(z, y, (torch.float32, torch.float16))
    found = quantities(grad, logits)
    assert found["live_fraction"] == 0.5
    assert found["underflowed_fraction"] == 0.5 and found["ignored_fraction"] == 0


@pytest.mark.parametrize("classes", [1000, 50_257])
def test_float16_rows_that_underflow_class_by_class_are_underflowed(classes):
    """Each p_k is below the smallest float16, their sum is not: the row counts all the same."""
    z = torch.zeros(1, classes, dtype=torch.float64)
    z[:, 0] = 19.0
    grad, logits = ref.gradients(z, torch.zeros(1, dtype=torch.long), (torch.float16, torch.float16))
    assert not grad.any()
    assert quantities(grad, logits).get("underflowed_fraction") == 1.0


def test_every_dtype_underflows_below_its_level_and_not_above():
    for dtype, lowest in ((torch.float16, 2.0**-24), (torch.float32, 2.0**-126), (torch.float64, 2.0**-1022)):
        assert absorption.underflow_level(dtype) == pytest.approx(math.log(lowest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 4096])
def test_a_silent_row_counts_once_its_share_of_a_mean_is_below_what_the_dtype_holds(dtype, rows):
    """Half a nat to either side: logits in bfloat16 are no finer."""
    lowest = 2.0**-24 if dtype is torch.float16 else torch.finfo(dtype).smallest_normal
    edge = -math.log(lowest) - math.log(rows)
    for margin, counts in ((edge - 0.5, 0.0), (edge + 0.5, 1.0)):
        logits = torch.tensor([[margin, 0.0]]).to(dtype)
        found = quantities(torch.zeros_like(logits), logits, rows)
        assert found["ignored_fraction"] == 1 - counts
        assert found.get("underflowed_fraction", 0.0) == counts


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_gradient_betrays_a_loss_computed_in_half_precision(narrow):
    z, y = ref.make_logits(2, 32, 10, spread=1, margins=(-2, 4))
    half, _ = ref.gradients(z, y, (torch.float32, narrow), scale=32.0)
    full, _ = ref.gradients(z, y)
    assert half.dtype is torch.float32 and not absorption.wider(half, narrow)
    assert absorption.wider(full, narrow)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_overflown_entries_neither_hide_nor_feign_a_loss_in_half_precision(narrow):
    z, y = ref.make_logits(2, 32, 10, spread=1, margins=(-2, 4))
    half, _ = ref.gradients(z, y, (torch.float32, narrow), scale=32.0)
    full, _ = ref.gradients(z, y)
    for bad in (math.inf, -math.inf, math.nan):
        half[3, 4] = full[3, 4] = bad
        assert shown_precision(half).eps == torch.finfo(narrow).eps
        assert shown_precision(full).eps == torch.finfo(torch.float32).eps
    nothing = torch.full_like(full, math.nan)
    assert shown_precision(nothing).eps == torch.finfo(torch.float32).eps
    assert shown_precision(nothing, shown_precision(half)).eps == torch.finfo(narrow).eps


def test_sum_and_mean_reduction_absorb_the_same_rows():
    z, y = ref.make_logits(0, 40, 6, spread=1, margins=(10, 24))
    mean = absorbed_rows(*ref.gradients(z, y))
    total = absorbed_rows(*ref.gradients(z, y, loss=lambda a, b: F.cross_entropy(a, b, reduction="sum")))
    assert torch.equal(mean, total) and mean.any() and not mean.all()
