"""Everything a backward pass is reduced to, against the labelled reference, row by row."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nfi_monitor.capture.head_probe import Rows
from nfi_monitor.measure.accumulator import RowAccumulator
from nfi_monitor.measure.native_rows import row_statistics
from nfi_monitor.measure.rows import MAXIMA, SUMS, LossKind, finish, single_output_statistics
from nfi_monitor.quantities import QUANTITIES
from tests.measure import reference as ref
from tests.measure.measured import quantities

pytestmark = pytest.mark.usefixtures("both_ways")

FAST = settings(deadline=None, derandomize=True, max_examples=60)
EXACT = (
    "live_fraction", "ignored_fraction", "underflowed_fraction", "non_finite_rows", "absorbed_fraction",
    "soft_target_fraction",
)  # fmt: skip
"""Counts: no tolerance."""


def check(found: dict[str, float], expected: dict[str, float], logits: torch.Tensor) -> None:
    """Tolerances: an ulp of a logit is a relative error of ε and of the loss (margins.py); sums of K (the
    absolute one runs one entry after the other) and of N terms add theirs."""
    unit = ref.UNIT[torch.float64 if logits.dtype is torch.float64 else torch.float32]
    rows, classes = logits.shape
    largest = logits[logits.isfinite()].abs().max().item()
    relative = unit * (10 + 4 * largest + classes / 2 + rows)
    missing = set(expected) - set(found)
    assert not missing
    for name, value in expected.items():
        if name in EXACT:
            assert found[name] == pytest.approx(value, rel=1e-12), name
        elif name in ("margin_median", "margin_min", "mean_logit"):
            assert found[name] == pytest.approx(value, rel=relative, abs=4 * unit * largest), name
        elif name in ("residual_mass", "head_loss"):
            # Below the smallest normal number the exponential itself may be flushed.
            tiny = torch.finfo(torch.float64 if logits.dtype is torch.float64 else torch.float32).tiny
            assert found[name] == pytest.approx(value, rel=relative, abs=tiny), name
        else:
            assert found[name] == pytest.approx(value, rel=relative, abs=6 * unit), name


def truths(grad: torch.Tensor, logits: torch.Tensor, y: torch.Tensor) -> list[ref.RowTruth]:
    return [ref.row_truth(g, z, r) for g, z, r in zip(grad, logits, y.tolist(), strict=True)]


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    classes=st.sampled_from([2, 3, 10, 97]),
    pair=st.sampled_from(ref.PAIRS),
    loss=st.sampled_from([ref.cross_entropy, ref.class_weights]),
    margins=st.tuples(st.floats(-30, 118), st.floats(0, 60)),
    spread=st.sampled_from([0.0, 0.5, 3.0]),
    ignored=st.sampled_from([0, 0, 2, 3]),
    scale=st.sampled_from([1.0, 64.0]),
)
def test_every_row_quantity_equals_the_labelled_reference(
    seed, rows, classes, pair, loss, margins, spread, ignored, scale
):
    low, width = margins
    z, y = ref.make_logits(seed, rows, classes, spread=spread, margins=(low, min(low + width, 120)))
    if ignored:
        # Padding that the model is not sure about: with a margin beyond the underflow only labels could tell.
        y[::ignored] = ref.IGNORED
        z[::ignored] = z[::ignored].clamp(-2, 2)
    if bool((y == ref.IGNORED).all()):
        y[-1], z[-1] = 0, 0.0
    if torch.float16 in pair:
        scale *= ref.loss_scale(pair, rows)
        z = z.clamp(-8, 12)  # beyond, class by class underflow: test_absorption.py
    grad, logits = ref.gradients(z, y, pair, loss, scale)
    check(quantities(grad, logits), ref.batch_truth(truths(grad, logits, y)), logits)


@pytest.mark.parametrize("pair", ref.PAIRS, ids=str)
def test_every_row_quantity_equals_the_reference_at_vocabulary_size(pair):
    # float16 rows stay where no p_k of their own underflows: test_absorption.py has the others.
    sure = (1, 2) if torch.float16 in pair else (10, 30)
    for spread, margins in ((0.0, (-1, 3)), (2.0, sure)):
        z, y = ref.make_logits(1, 2, 50_257, spread=spread, margins=margins)
        grad, logits = ref.gradients(z, y, pair, scale=ref.loss_scale(pair, 2))
        check(quantities(grad, logits), ref.batch_truth(truths(grad, logits, y)), logits)


@pytest.mark.parametrize("dtype", ref.UNIT, ids=str)
def test_tied_logits_are_measured_like_any_other(dtype):
    z = torch.zeros(6, 12, dtype=torch.float64)
    z[3:] = -7.0
    y = torch.arange(6)
    grad, logits = ref.gradients(z, y, (dtype, dtype), scale=ref.loss_scale((dtype, dtype), 6))
    found = quantities(grad, logits)
    assert found["margin_min"] == found["margin_median"] == 0
    assert found["residual_mass"] == pytest.approx(11 / 12, rel=1e-6)
    assert found["absorbed_fraction"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_masked_classes_change_no_quantity_of_the_others(dtype):
    z, y = ref.make_logits(2, 8, 5, spread=1, margins=(-2, 20))
    nothing = torch.zeros(8, 3, dtype=dtype)
    grad, logits = ref.gradients(z, y, (dtype, dtype))
    masked_grad, masked_logits = ref.gradients(
        torch.cat([z, (nothing - math.inf).double()], -1), y, (dtype, dtype)
    )
    assert torch.equal(masked_grad[:, 5:], nothing)
    # Eight classes are added in another order than five: the rest of the gradient is the same but for
    # rounding, and in a confident row there is nothing else.
    plain, found = quantities(grad, logits), quantities(torch.cat([grad, nothing], -1), masked_logits)
    for name in set(plain) - {"mean_logit", "zero_sum_violation_share", "partially_absorbed_fraction"}:
        assert found[name] == pytest.approx(plain[name], rel=1e-5, abs=4 * ref.UNIT[dtype]), name


def test_masked_classes_do_not_make_the_mean_logit_infinite():
    z = torch.randn(4, 5)
    z[:, 3:] = -math.inf
    grad, logits = ref.gradients(z, torch.zeros(4, dtype=torch.long))
    assert quantities(grad, logits)["mean_logit"] == pytest.approx(logits[:, :3].mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "where, poison",
    [("grad", math.nan), ("grad", math.inf), ("grad", -math.inf), ("logits", math.nan), ("logits", math.inf)],
)
def test_a_row_that_is_not_finite_is_counted_and_spoils_nothing(where, poison):
    z, y = ref.make_logits(2, 8, 5, spread=1, margins=(-2, 20))
    grad, logits = ref.gradients(z, y)
    keep = torch.arange(8) != 3
    expected = quantities(grad[keep], logits[keep])
    (grad if where == "grad" else logits)[3, 2] = poison
    found = quantities(grad, logits)
    assert found["non_finite_rows"] == 1
    assert found["live_fraction"] == 7 / 8
    for name in set(expected) - {"live_fraction", "ignored_fraction", "non_finite_rows"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_a_batch_without_one_finite_row_says_only_that():
    bad = torch.full((3, 4), math.nan)
    found = quantities(bad, torch.zeros(3, 4))
    assert found == {"live_fraction": 0, "ignored_fraction": 0, "non_finite_rows": 3}


def test_a_batch_of_ignored_rows_has_no_violation_and_no_loss():
    found = quantities(torch.zeros(6, 5), torch.randn(6, 5))
    assert found["ignored_fraction"] == 1 and found["live_fraction"] == 0
    assert set(found) == {"live_fraction", "ignored_fraction", "non_finite_rows"}


def test_a_batch_without_rows_gives_no_quantities():
    assert finish([0.0] * len(SUMS), [-math.inf] * len(MAXIMA), single_output=False) == {}
    assert quantities(torch.zeros(0, 5), torch.zeros(0, 5)) == {}


def test_all_names_are_in_the_catalogue():
    z, y = ref.make_logits(0, 6, 5, spread=1, margins=(-1, 30))
    assert set(quantities(*ref.gradients(z, y))) <= set(QUANTITIES)


def test_healthy_rows_of_a_float32_head_with_a_half_precision_loss_are_not_partially_absorbed():
    """The floor is that of the precision the gradient shows, not of the tensor it arrives in."""
    z, y = ref.make_logits(0, 64, 10, spread=1, margins=(-2, 1))
    for narrow in (torch.bfloat16, torch.float16):
        found = quantities(*ref.gradients(z, y, (torch.float32, narrow), scale=64.0))
        assert found["partially_absorbed_fraction"] == 0


def test_rows_near_the_threshold_are_partially_absorbed():
    z, y = ref.make_logits(0, 64, 2, spread=0, margins=(14, 16))
    found = quantities(*ref.gradients(z, y))
    assert found["partially_absorbed_fraction"] > 0.9
    assert found["absorbed_fraction"] == 0


@pytest.mark.parametrize("classes", [5, 10, 100])
def test_rows_surer_than_their_smoothed_label_keep_their_margin(classes):
    """Label smoothing turns the signs around: every wrong class is pushed up a little, the right one down."""
    z, y = ref.make_logits(0, 32, classes, spread=0.3, margins=(8, 10))
    grad, logits = ref.gradients(z, y, loss=ref.label_smoothing)
    found = quantities(grad, logits)
    assert found["soft_target_fraction"] == 1
    expected = ref.batch_truth(truths(grad, logits, y))
    assert found["margin_min"] == pytest.approx(expected["margin_min"], rel=1e-5)
    assert found["residual_mass"] == pytest.approx(expected["residual_mass"], rel=1e-4)


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([3, 10, 97]),
    pair=st.sampled_from([pair for pair in ref.PAIRS if torch.float16 not in pair]),
    loss=st.sampled_from([ref.cross_entropy, ref.soft_targets, ref.label_smoothing]),
    margins=st.tuples(st.floats(-10, 30), st.floats(0, 10)),
)
def test_soft_targets_are_the_rows_with_several_negative_gradients(seed, classes, pair, loss, margins):
    low, width = margins
    grad, logits = ref.gradients(
        *(inputs := ref.make_logits(seed, 9, classes, spread=1, margins=(low, low + width))), pair, loss
    )
    expected = ref.batch_truth(truths(grad, logits, inputs[1]))
    assert quantities(grad, logits)["soft_target_fraction"] == pytest.approx(
        expected["soft_target_fraction"], rel=1e-12
    )


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([2, 10, 97]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    margins=st.tuples(st.floats(-5, 40), st.floats(0, 10)),
)
def test_rows_above_the_rounding_floor_are_those_of_the_reference(seed, classes, dtype, margins):
    low, width = margins
    z, y = ref.make_logits(seed, 9, classes, spread=1, margins=(low, low + width))
    grad, logits = ref.gradients(z, y, (dtype, dtype))
    rows = truths(grad, logits, y)
    expected = ref.above_the_floor(rows, dtype, classes)
    floor = expected.pop("floor")
    # A row that is nearer to the floor than its own sums are exact may be counted on either side.
    unit = ref.UNIT[torch.float64 if dtype is torch.float64 else torch.float32]
    assume(all(abs(row.violation - floor) > unit * (2 + classes) for row in rows))
    found = quantities(grad, logits)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_counted_as_in_the_reference(poison):
    z, y = ref.make_logits(3, 8, 5, spread=1, margins=(-2, 20))
    grad, logits = ref.gradients(z, y)
    grad[1, 0] = grad[4, 2] = poison
    expected = ref.batch_truth(truths(grad, logits, y))
    assert expected["non_finite_rows"] == 2
    assert quantities(grad, logits)["non_finite_rows"] == expected["non_finite_rows"]


def test_hard_labels_are_not_taken_for_soft_ones():
    for pair in ref.PAIRS:
        z, y = ref.make_logits(0, 32, 10, spread=1, margins=(-20, 30))
        found = quantities(*ref.gradients(z, y, pair, scale=ref.loss_scale(pair, 32)))
        assert found["soft_target_fraction"] == 0


# --- micro-batches ---------------------------------------------------------------------------------


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 8), min_size=2, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    margin=st.sampled_from([-3.0, 6.0, 14.0, 30.0]),
)
def test_micro_batches_merge_to_the_whole_batch(seed, sizes, dtype, margin):
    """All but the median, of which the mean weighted by rows is taken."""
    total = sum(sizes)
    z, y = ref.make_logits(seed, total, 7, spread=1, margins=(margin, margin + 5))
    y[::3] = ref.IGNORED
    z[::3] = z[::3].clamp(-1, 1)
    if bool((y == ref.IGNORED).all()):
        return
    grad, logits = ref.gradients(z, y, (dtype, dtype))
    features = torch.randn(total, 4, generator=torch.Generator().manual_seed(seed))
    whole, parts = RowAccumulator(), RowAccumulator()
    whole.add(Rows(grad, logits, features, total))
    for g, h, f in zip(grad.split(sizes), logits.split(sizes), features.split(sizes), strict=True):
        parts.add(Rows(g, h, f, len(g)))
    one = finish(whole.sums.tolist(), whole.maxima.tolist(), single_output=False)
    many = finish(parts.sums.tolist(), parts.maxima.tolist(), single_output=False)
    assert set(one) == set(many)
    medians = [
        row_statistics(g, h, len(g)) for g, h in zip(grad.split(sizes), logits.split(sizes), strict=True)
    ]
    counted, median_rows = SUMS.index("counted"), SUMS.index("margin_median_rows")
    expected = sum(s.sums[median_rows].item() for s in medians) / sum(s.sums[counted].item() for s in medians)
    assert many.pop("margin_median") == pytest.approx(expected, rel=1e-5)
    one.pop("margin_median")
    for name, value in one.items():
        assert many[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    counts = torch.tensor([row.counts for row in truths(grad, logits, y)])
    mean = features[counts].double().mean(0)
    assert parts.feature_mean.tolist() == pytest.approx(mean.tolist(), rel=1e-5, abs=1e-6)
    assert whole.absorbed == parts.absorbed


def test_the_classes_that_absorb_are_those_of_the_labels():
    z, y = ref.make_logits(5, 200, 6, spread=1, margins=(10, 30))
    grad, logits = ref.gradients(z, y)
    accumulator = RowAccumulator()
    accumulator.add(Rows(grad, logits, None, 200))
    expected = torch.bincount(y[grad.gather(-1, y[:, None])[:, 0] == 0], minlength=6)
    assert dict(accumulator.most_absorbed(None)) == {
        k: float(count) for k, count in enumerate(expected.tolist()) if count
    }
    ranked = [count for _, count in accumulator.most_absorbed(3)]
    assert ranked == sorted(expected.tolist(), reverse=True)[:3]


def test_absorbed_classes_are_counted_past_the_last_float32_integer():
    """2^24 + 1 is no float32: a long run of a language model gets there."""
    z = torch.tensor([[40.0, 0.0, 0.0]])
    grad, logits = ref.gradients(z, torch.tensor([0]))
    accumulator = RowAccumulator()
    accumulator.add(Rows(grad, logits, None, 1))
    accumulator.absorbed[0] = 2.0**24
    accumulator.add(Rows(grad, logits, None, 1))
    assert accumulator.most_absorbed(1) == [(0, 2.0**24 + 1)]


def test_absorbed_classes_are_counted_while_their_number_changes():
    """Contrastive logits [B, B] of ragged batches."""
    accumulator = RowAccumulator()
    for classes in (3, 5, 2, 5):
        z = torch.zeros(1, classes)
        z[0, -1] = 40.0
        accumulator.add(Rows(*ref.gradients(z, torch.tensor([classes - 1])), None, 1))
    assert accumulator.most_absorbed(None) == [(4, 2.0), (1, 1.0), (2, 1.0)]


def test_no_row_that_counts_leaves_the_feature_mean_undefined():
    accumulator = RowAccumulator()
    assert accumulator.feature_mean is None
    accumulator.add(Rows(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 4), 2))
    assert accumulator.feature_mean.isnan().all()


def test_ignored_rows_do_not_enter_the_feature_mean():
    z, y = ref.make_logits(0, 4, 3, spread=1, margins=(-1, 1))
    y[:2] = ref.IGNORED
    grad, logits = ref.gradients(z, y)
    features = torch.tensor([[100.0], [100.0], [1.0], [3.0]])
    accumulator = RowAccumulator()
    accumulator.add(Rows(grad, logits, features, 4))
    assert accumulator.feature_mean.tolist() == [2.0]


def test_a_row_that_is_not_finite_does_not_spoil_the_feature_mean():
    z, y = ref.make_logits(0, 4, 3, spread=1, margins=(-1, 1))
    grad, logits = ref.gradients(z, y)
    logits[0], grad[0] = math.nan, math.nan
    features = torch.tensor([[math.nan], [1.0], [2.0], [3.0]])
    accumulator = RowAccumulator()
    accumulator.add(Rows(grad, logits, features, 4))
    assert accumulator.feature_mean.tolist() == [2.0]


def test_one_batch_of_padding_does_not_make_a_float32_loss_look_like_half_precision():
    """Zeros are numbers of every dtype: they say nothing about the precision of the loss."""
    z, y = ref.make_logits(0, 16, 10, spread=1, margins=(-2, 2), shift=3.0)
    grad, logits = ref.gradients(z, y)
    accumulator = RowAccumulator()
    for step in range(1, 20):
        accumulator.clear(step)
        accumulator.add(Rows(torch.zeros_like(grad) if step in (1, 16) else grad, logits, None, 16))
        if step > 1:
            assert accumulator.loss_kind.eps == 2.0**-23


# --- one output ------------------------------------------------------------------------------------


def test_a_head_with_one_output_shows_live_rows_and_the_mean_logit():
    z = torch.tensor([[2.0], [-1.0], [3.0], [math.nan]], requires_grad=True)
    target = torch.tensor([1.0, -1.0, 1.0, 1.0])
    torch.relu(1 - target * z[:, 0]).sum().backward()
    statistics = single_output_statistics(z.grad, z.detach(), 4)
    found = finish(statistics.sums.tolist(), statistics.maxima.tolist(), single_output=True)
    assert found["non_finite_rows"] == 1
    assert found["live_fraction"] == 0
    assert found["mean_logit"] == pytest.approx((2 - 1 + 3) / 3)
    assert not [name for name in found if "violation" in name or "margin" in name]


@FAST
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 20), dtype=st.sampled_from(list(ref.UNIT)))
def test_one_output_counts_hinge_rows_inside_the_margin(seed, rows, dtype):
    generator = torch.Generator().manual_seed(seed)
    z = (2 * torch.randn(rows, 1, generator=generator)).to(dtype).requires_grad_()
    y = torch.randint(2, (rows,), generator=generator).to(dtype) * 2 - 1
    F.relu(1 - y * z[:, 0]).sum().backward()
    statistics = single_output_statistics(z.grad, z.detach(), rows)
    found = finish(statistics.sums.tolist(), statistics.maxima.tolist(), single_output=True)
    inside = (y.double() * z.detach().double()[:, 0] < 1).double().mean().item()
    assert found["live_fraction"] == pytest.approx(inside)
    assert found["mean_logit"] == pytest.approx(z.detach().double().mean().item(), rel=1e-5, abs=1e-6)


def test_rows_of_another_device_than_the_first_are_left_out():
    def rows(device: str) -> Rows:
        z, y = ref.make_logits(3, 8, 5, spread=1, margins=(-2, 20))
        grad, logits = ref.gradients(z, y, (torch.float32, torch.float32))
        return Rows(grad.to(device), logits.to(device), torch.ones(8, 3, device=device), 8)

    alone, among = RowAccumulator(), RowAccumulator()
    alone.add(rows("cpu"))
    for device in ("cpu", "meta"):
        among.add(rows(device))
    assert among.devices == [torch.device("cpu"), torch.device("meta")]
    for name in ("sums", "maxima", "feature_mean", "features"):
        assert torch.equal(getattr(among, name), getattr(alone, name)), name
    assert among.absorbed == alone.absorbed
    among.clear(2)
    among.add(rows("meta"))
    assert among.sums is None


def test_what_a_run_knows_of_the_loss_is_on_the_host_wherever_its_rows_are():
    rows = RowAccumulator()
    rows.loss_kind = LossKind(*(torch.tensor(x) for x in (1e-7, 1e-6, -100.0, 0.0)))
    rows.add(Rows(torch.ones(8, 5, device="meta"), torch.ones(8, 5, device="meta"), None, 8))
    assert {known.device.type for known in rows.loss_kind} == {"cpu"}
    assert rows.sums is None and {part.device.type for part in rows.late[0].flat} == {"meta"}


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_epsilon_is_that_of_the_narrowest_precision_that_fits(narrow):
    z, y = ref.make_logits(2, 32, 10, spread=1, margins=(-2, 4))
    grad, logits = ref.gradients(z, y, (torch.float32, narrow), scale=32.0)
    statistics = row_statistics(grad, logits, 32)
    values = finish(statistics.sums.tolist(), statistics.maxima.tolist(), single_output=False)
    assert values["loss_epsilon"] == torch.finfo(narrow).eps


def test_unsure_rows_are_those_of_which_logits_and_gradient_say_so():
    """Of a plain cross-entropy both say 1 − p; of one-vs-rest BCE near its optimum the gradient is small."""
    z, y = ref.make_logits(3, 40, 6, spread=1, margins=(-3, 12))
    grad, logits = ref.gradients(z, y)
    statistics = row_statistics(grad, logits, 40)
    values = finish(statistics.sums.tolist(), statistics.maxima.tolist(), single_output=False)
    doubt = 1 - torch.softmax(z.double(), -1).gather(1, y[:, None])
    expected = (doubt > 0.1).double().mean().item()
    assert values["unsure_fraction"] == pytest.approx(expected) and 0 < expected < 1
    fitted = grad.clone()
    fitted[: len(grad) // 2] *= 1e-3
    statistics = row_statistics(fitted, logits, 40)
    values = finish(statistics.sums.tolist(), statistics.maxima.tolist(), single_output=False)
    assert values["unsure_fraction"] == pytest.approx((doubt[20:] > 0.1).double().sum().item() / 40)
