"""The C library against torch operations, and both against torch in float64."""

from __future__ import annotations

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nfi_monitor.measure import native_rows
from nfi_monitor.measure import rows as eager
from nfi_monitor.measure.rows import LOOK_SUMS, MASKS, MAXIMA, SUMS, LossKind, RowStatistics
from nfi_monitor.native import library
from tests.measure import reference as ref

pytestmark = pytest.mark.skipif(library.library() is None, reason=f"no C library: {library.missing()}")

FAST = settings(deadline=None, derandomize=True, max_examples=150)
EXACT = ("live", "absorbed", "underflowed", "silent", "finite", "rows", "sampled", "counted", "recomputed")
JUDGED = ("unexplained", "contradicted", "unsure", "soft")
SHARES = ("mismatch", "uneven")
"""Counts and shares of rows whose sums are above a level: equal unless rounding of the sums decides."""
LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "classes first": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: torch.stack([x, x * 3 + 1], 1)[:, 0],
    "every other class": lambda x: torch.stack([x, x * 3 + 1], -1)[..., 0],
    "inside another": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1))[3:-1, 1:-2],
}


def penalty(z: Tensor, y: Tensor) -> Tensor:
    """All logits of all rows have a gradient, also where the cross-entropy's is gone."""
    return ref.cross_entropy(z, y) + 1e-6 * z.square().mean()


def row_weights(z: Tensor, y: Tensor) -> Tensor:
    return (torch.linspace(0.01, 3, len(z), dtype=z.dtype) * F.cross_entropy(z, y, reduction="none")).mean()


def policy_gradient(z: Tensor, y: Tensor) -> Tensor:
    return (torch.linspace(-2, 2, len(z), dtype=z.dtype) * F.cross_entropy(z, y, reduction="none")).mean()


LOSSES = (
    *(ref.cross_entropy, ref.class_weights, ref.label_smoothing, ref.focal, ref.z_loss, ref.soft_targets),
    *(ref.squared_error, ref.one_against_rest, ref.soft_capped, penalty, row_weights, policy_gradient),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def by_library(grad: Tensor, logits: Tensor, *args, **kwargs) -> RowStatistics:
    """The library's result; an assertion error if torch operations served."""
    assert native_rows._fits(grad, logits)
    found = native_rows.row_statistics(grad, logits, *args, **kwargs)
    assert library.fault() == ""
    return found


def named(found: RowStatistics) -> dict[str, float]:
    return dict(zip(SUMS, found.sums.tolist(), strict=True))


def above_floor(grad: Tensor, kind: LossKind, live: Tensor) -> tuple[int, int]:
    """How many violations are above the floor, and how many so near that a sum in grad's dtype decides."""
    floor, classes = kind.floor.item(), grad.shape[1]
    unit = 2.0**-53 if grad.dtype is torch.float64 else 2.0**-24
    sums = [(math.fsum(row), math.fsum(map(abs, row))) for row in grad.double()[live].tolist()]
    violations = [abs(signed) / absolute for signed, absolute in sums]
    near = [abs(violation - floor) < (4 + classes / 8) * unit for violation in violations]
    return sum(violation > floor for violation in violations), sum(near)


def compare(
    grad: Tensor, logits: Tensor, rows: int, kind: LossKind | None = None, *, look: bool = True
) -> None:
    """Hold the library against torch operations."""
    found = by_library(grad, logits, rows, kind, look=look)
    known = eager.row_statistics(grad, logits, rows, kind, look=look)
    assert torch.equal(found.winner, known.winner)
    assert torch.equal(found.counts, known.counts)
    assert torch.equal(found.absorbed, known.absorbed)
    assert found.sums.dtype is known.sums.dtype and found.maxima.dtype is known.maxima.dtype
    one, two = named(found), named(known)
    double = eager.row_statistics(grad.double(), logits.double(), rows, kind, look=look)
    exact, shares = named(double), dict(zip(LossKind._fields, double.loss_kind, strict=True))
    unit = 2.0**-53 if known.sums.dtype is torch.float64 else 2.0**-24
    size = logits.double()[logits.isfinite()].abs().max().item() if logits.isfinite().any() else 1.0
    relative = unit * (
        20 + 4 * size * max(found.loss_kind.slope.item(), 1.0) + logits.shape[1] / 2 + len(grad)
    )
    for name in SUMS:
        if name in EXACT:
            assert one[name] == two[name], name
        elif name == "above_floor":
            above, near = above_floor(grad, found.loss_kind, found.counts.bool() & (grad != 0).any(-1))
            assert abs(one[name] - above) <= (near if grad.dtype is torch.float64 else 0)
            assert abs(two[name] - above) <= near
        elif name in JUDGED:
            if two[name] == exact[name] or math.isnan(two[name]):
                assert one[name] == pytest.approx(two[name], nan_ok=True), name
        else:
            # The signed sum cancels: its rounding is that of the absolute one.
            near = relative * two["absolute"] if name == "signed" else 4 * len(grad) * unit * (1 + size)
            assert one[name] == pytest.approx(two[name], rel=relative, abs=near, nan_ok=True), name
    for name, a, b in zip(MAXIMA, found.maxima.tolist(), known.maxima.tolist(), strict=True):
        if name in SHARES and b != pytest.approx(shares[name].item(), rel=1e-6):
            continue  # rounding of a row's numbers decides
        assert a == (b if name == "epsilon" else pytest.approx(b, rel=relative, abs=relative)), name
    for name, a, b in zip(LossKind._fields, found.loss_kind, known.loss_kind, strict=True):
        assert a.dtype is b.dtype and a.shape == b.shape == (), name
        if name in SHARES and b.item() != pytest.approx(shares[name].item(), rel=1e-6):
            continue
        assert a.item() == pytest.approx(b.item(), rel=relative, abs=0), name


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    classes=st.sampled_from([2, 3, 10, 63, 64, 65, 97, 1000]),
    pair=st.sampled_from(ref.PAIRS),
    loss=st.sampled_from(LOSSES),
    margins=st.tuples(st.floats(-30, 118), st.floats(0, 60)),
    spread=st.sampled_from([0.0, 0.5, 3.0]),
    ignored=st.sampled_from([0, 2, 3]),
    layouts=st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS))),
    known=st.booleans(),
    look=st.booleans(),
)
def test_the_library_counts_the_rows_that_torch_counts(
    seed, rows, classes, pair, loss, margins, spread, ignored, layouts, known, look
):
    z, y = ref.make_logits(seed, rows, classes, spread=spread, margins=(margins[0], min(sum(margins), 120)))
    if ignored and loss in (ref.cross_entropy, ref.class_weights):
        y[::ignored] = ref.IGNORED
        if bool((y == ref.IGNORED).all()):
            y[-1] = 0
    if torch.float16 in pair:
        z = z.clamp(-8, 12)
    grad, logits = ref.gradients(z, y, pair, loss, ref.loss_scale(pair, rows))
    grad, logits = LAYOUTS[layouts[0]](grad), LAYOUTS[layouts[1]](logits)
    kind = eager.row_statistics(grad, logits, rows).loss_kind if known else None
    compare(grad, logits, 7 * rows, kind, look=look)


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 12),
    classes=st.sampled_from([2, 3, 10, 70]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, math.nan, math.inf, -math.inf, 1e-40, 6e4, -6e4, 1e38]),
        min_size=1,
        max_size=6,
    ),
)
def test_odd_numbers_make_the_same_rows_live(seed, rows, classes, dtypes, values):
    generator = torch.Generator().manual_seed(seed)

    def drawn(dtype: torch.dtype) -> Tensor:
        places = torch.randint(len(values), (rows, classes), generator=generator)
        ordinary = torch.randn(rows, classes, generator=generator).double()
        chosen = torch.rand(rows, classes, generator=generator) < 0.3
        return torch.where(chosen, torch.tensor(values, dtype=torch.float64)[places], ordinary).to(dtype)

    grad, logits = drawn(dtypes[0]), drawn(dtypes[1])
    found, known = by_library(grad, logits, rows), eager.row_statistics(grad, logits, rows)
    assert torch.equal(found.winner, known.winner)
    assert torch.equal(found.counts, known.counts)
    assert torch.equal(found.absorbed, known.absorbed)
    one, two = named(found), named(known)
    assert [one[name] for name in EXACT] == [two[name] for name in EXACT]
    assert found.loss_kind.eps == known.loss_kind.eps


@pytest.mark.parametrize("logits_dtype", DTYPES, ids=str)
def test_a_sum_that_is_too_large_for_the_gradients_dtype_is_none(logits_dtype):
    grad, logits = torch.full((2, 10), 1e38), torch.ones(2, 10).to(logits_dtype)
    grad[1, 3:] = 0.0
    for look in (True, False):
        kind = eager.row_statistics(grad, logits, 2).loss_kind
        found = by_library(grad, logits, 2, kind, look=look)
        assert found.counts.tolist() == eager.row_statistics(grad, logits, 2).counts.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("temperature", [0.02, 0.25, 1.0, 10.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_factor_after_the_head_is_that_of_torch(temperature, dtype):
    z, y = ref.make_logits(3, 64, 20, spread=1.0, margins=(0, 2))
    z = (z / temperature).to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(ref.cross_entropy(z.float() * temperature, y), z)
    compare(grad, z.detach(), 64)
    known = eager.row_statistics(grad, z.detach(), 64).loss_kind
    compare(grad, z.detach(), 64, known, look=False)
    compare(2.0 * grad, z.detach(), 64, known)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 10, 300])
def test_the_loss_is_told_as_torch_tells_it(loss, dtype, classes):
    """Rows from misclassified to fitted have the shares of torch, at the first look and the second."""
    z, y = ref.make_logits(7, 61, classes, spread=1.0, margins=(-3, 11))
    grad, logits = ref.gradients(z, y, (dtype, dtype), loss, ref.loss_scale((dtype, dtype), 61))
    compare(grad, logits, 61)
    first = eager.row_statistics(grad, logits, 61).loss_kind
    compare(0.25 * grad, logits, 61, first)
    compare(grad[:5], logits[:5], 61, first, look=False)
    found = by_library(grad, logits, 61).loss_kind
    assert (found.mismatch, found.uneven) == (first.mismatch, first.uneven)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_have_only_a_penalty_keep_their_target(dtype):
    """The gradient of the correct class in a misclassified row is not below a share of the largest one."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(40, 6, generator=generator)
    winner = logits.argmax(-1)
    for size in (1e-3, 4.9e-3, 5e-3, 5.1e-3, 0.1):
        grad = torch.zeros(40, 6)
        grad[0, 0], grad[0, 1] = -1.0, 1.0
        grad[1:].scatter_(-1, ((winner[1:] + 1) % 6)[:, None], -size)
        grad[1:].scatter_(-1, winner[1:, None], size)
        for scale in (0.0, 0.5, 3.0):
            first = eager.row_statistics(grad.to(dtype), logits.to(dtype), 40).loss_kind
            kind = first._replace(scale=torch.full_like(first.scale, scale))
            compare(grad.to(dtype), logits.to(dtype), 40, kind)
            compare(grad.to(dtype), logits.to(dtype), 40, kind, look=False)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1.0, 1e6])
def test_the_scale_of_the_gradients_decides_which_rows_have_underflowed(scale):
    logits = torch.zeros(60, 3)
    logits[:, 0] = torch.arange(60) * 2.0
    grad = torch.zeros(60, 3)
    kind = eager.row_statistics(torch.randn(4, 3), torch.randn(4, 3), 4).loss_kind
    kind = kind._replace(scale=torch.tensor(scale))
    compare(grad, logits, 60, kind, look=False)
    assert 0 < named(by_library(grad, logits, 60, kind))["underflowed"] < 60


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_instruction_set_gives_the_same_rows(level, dtype):
    z, y = ref.make_logits(5, 30, 130, spread=1.0, margins=(-2, 11))
    grad, logits = ref.gradients(z, y, (dtype, dtype), scale=ref.loss_scale((dtype, dtype), 30))
    with library.at_level(level) as available:
        if not available:
            pytest.skip("not on this processor")
        compare(grad, logits, 30)


@pytest.mark.parametrize("classes", [50_257, 200_000])
def test_rows_of_a_vocabulary_are_those_of_torch(classes):
    z, y = ref.make_logits(1, 3, classes, spread=2.0, margins=(1, 30))
    grad, logits = ref.gradients(z, y)
    compare(grad, logits, 3)


@pytest.mark.parametrize("make", [torch.float64, torch.float32], ids=str)
def test_half_precision_is_converted_exactly(make):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        every = bits.view(dtype)
        finite = every[every.isfinite()].reshape(-1, 2)
        other = torch.zeros_like(finite).to(make)
        found = by_library(other, finite, len(finite))
        assert torch.equal(found.winner, finite.to(make).max(-1).indices)
        assert named(found)["finite"] == len(finite)
        total = finite.double().abs().sum(-1)
        found = by_library(finite, other, len(finite))
        held = total.float().isfinite()  # two of the largest bfloat16 numbers are too large for float32
        assert torch.equal(found.counts > 0, (total > 0) & held)
        if dtype is torch.float16:
            assert named(found)["absolute"] == pytest.approx(total.sum().item(), rel=1e-6)


def refused(grad: Tensor, logits: Tensor) -> None:
    """Check that torch operations serve."""
    assert not native_rows._fits(grad, logits)
    native_rows.row_statistics(grad, logits, max(len(grad), 1))
    assert library.fault() == ""


def test_what_the_library_cannot_read_is_left_to_torch():
    some = torch.randn(4, 3)
    refused(some[:0], some[:0])
    assert not native_rows._fits(some, torch.randn(4, 2))
    assert not native_rows._fits(some, some.to("meta"))
    assert not native_rows._fits(some, some.to_sparse())
    assert not native_rows._fits(some[:, :1], some[:, :1])
    assert not native_rows._fits(some, torch._neg_view(some))
    assert not native_rows._fits(some.int(), some)


def test_a_tensor_whose_memory_is_gone_is_refused():
    grad, logits = torch.randn(4, 3), torch.randn(4, 3)
    logits.untyped_storage().resize_(0)
    assert not native_rows._fits(grad, logits)
    logits.untyped_storage().resize_(4 * 11)  # one number is missing
    assert not native_rows._fits(grad, logits)


def test_rows_that_repeat_one_memory_are_read():
    row = torch.tensor([[0.5, -0.75, 0.25]])
    compare(row.expand(5, 3), torch.tensor([[1.0, 2.0, 0.0]]).expand(5, 3), 5)


def test_an_error_in_the_library_leaves_the_work_to_torch(monkeypatch):
    class Broken:
        def nfi_rows(self, address: int) -> int:
            return 1

        def __getattr__(self, name: str):
            return getattr(library._state.library, name)

    grad, logits = ref.gradients(*ref.make_logits(0, 4, 3, spread=1, margins=(0, 2)))
    with monkeypatch.context() as patch:
        patch.setattr(library, "library", Broken)
        patch.setattr(library._state, "fault", "")
        patch.setattr(library._state, "failures", 0)
        found = native_rows.row_statistics(grad, logits, 4)
        assert library.fault().startswith("MemoryError")
    assert torch.equal(found.sums, eager.row_statistics(grad, logits, 4).sums)


def test_sums_without_a_look_are_not_numbers():
    grad, logits = ref.gradients(*ref.make_logits(0, 4, 3, spread=1, margins=(0, 2)))
    kind = eager.row_statistics(grad, logits, 4).loss_kind
    found = by_library(grad, logits, 4, kind, look=False)
    assert all(math.isnan(named(found)[name]) for name in LOOK_SUMS)
    assert found.loss_kind is kind
    assert not any(math.isnan(named(found)[name]) for name in MASKS)


def test_nothing_is_kept_of_the_tensors():
    grad, logits = ref.gradients(*ref.make_logits(0, 4, 3, spread=1, margins=(0, 2)))
    count = len([x for x in gc.get_objects() if type(x) is Tensor and x.shape == (4, 3)])
    for _ in range(3):
        native_rows.row_statistics(grad, logits, 4)
    assert len([x for x in gc.get_objects() if type(x) is Tensor and x.shape == (4, 3)]) == count
