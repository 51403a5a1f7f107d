"""The mean cross-entropy of a few rows, in one call of the C library and in NumPy, against exact numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nfi_monitor.native import library
from nfi_monitor.remedies import few_rows, zero_sum_cross_entropy
from tests.remedies.exact_loss import ULP, WAYS, exact, row, way


@pytest.fixture(params=WAYS, ids=lambda native: "library" if native else "numpy")
def each_way(request: pytest.FixtureRequest) -> Iterator[None]:
    with way(request.param):
        yield


def value_and_gradient(logits: Tensor, target: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor, bool]:
    """Of ``factor`` times the mean loss; and whether it went the short way."""
    logits = logits.detach().requires_grad_()
    loss = zero_sum_cross_entropy(logits, target)
    (factor * loss).backward()
    assert logits.grad is not None and loss.grad_fn is not None
    return loss.detach(), logits.grad, loss.grad_fn.name() == "_KnownBackward"


@given(
    rows=st.integers(1, 1024),
    classes=st.integers(2, 32),
    spread=st.floats(0, 120),
    ties=st.booleans(),
    masked=st.booleans(),
    factor=st.sampled_from([1.0, 65536.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
    native=st.sampled_from(WAYS),
)
def test_the_short_way_is_the_long_way(
    rows: int, classes: int, spread: float, ties: bool, masked: bool, factor: float, dtype: torch.dtype,
    seed: int, native: bool,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=dtype)
    target = torch.randint(0, classes, (rows, 1), generator=generator)
    if ties:
        logits.round_()
    # Margins to ± spread, those of float32's overflow among them.
    margins = spread * (2.0 * torch.rand(rows, 1, generator=generator, dtype=dtype) - 1.0)
    logits.scatter_add_(1, target, margins)
    if masked:
        logits[torch.rand(logits.shape, generator=generator) < 0.3] = -math.inf
        logits.scatter_(1, target, margins)
    target = target.squeeze(1)
    with way(native):
        loss, gradient, short = value_and_gradient(logits, target, factor)
    with mock.patch.object(few_rows, "SMALL", 0):
        long_loss, long_gradient, _ = value_and_gradient(logits, target, factor)
    assert short is (logits.numel() <= few_rows.SMALL)
    eps = torch.finfo(dtype).eps
    assert loss.dtype is dtype and gradient.dtype is dtype
    # Of differences up to twice the spread both have rounded, of exp, and of sums.
    torch.testing.assert_close(loss, long_loss, rtol=(4 * spread + 40) * eps, atol=1e-44)
    torch.testing.assert_close(gradient, long_gradient, rtol=(4 * spread + 40) * eps, atol=1e-36 * factor)
    largest = gradient.abs().amax(1)
    normal = largest > torch.finfo(dtype).smallest_normal / eps
    assert torch.all(gradient.double().sum(1).abs()[normal] <= 4 * eps * largest[normal])


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("margin", [-87.0, -88.7, -100.0, -705.0, -710.0, -1e4])
def test_a_target_far_below_the_others_overflows_nowhere(margin: float, native: bool) -> None:
    """A row's own sum, or that times the number of rows."""
    logits = torch.zeros(300, 4)
    logits[7, 0] = margin
    target = torch.zeros(300, dtype=torch.int64)
    with way(native):
        loss, gradient, short = value_and_gradient(logits, target)
    assert short is (native or margin > -700.0)
    exact = logits.double().requires_grad_()
    known = F.cross_entropy(exact, target)
    known.backward()
    assert exact.grad is not None
    assert loss.item() == pytest.approx(known.item(), rel=1e-7 if short else 1e-6)
    torch.testing.assert_close(gradient, exact.grad.float(), rtol=1e-6, atol=1e-12)


def is_exact(logits: Tensor, target: int) -> None:
    """Loss and gradient of a row that goes the short way are off by 2 ulp at most."""
    loss, gradient = exact(logits, target)
    found, given, short = value_and_gradient(logits.unsqueeze(0), torch.tensor([target]))
    assert short
    assert abs(found.item() - loss) <= 2 * ULP * loss + 2.0**-150
    wrong = np.abs(given[0].double().numpy() - gradient)
    assert np.all(wrong <= 2 * ULP * np.abs(gradient) + 2.0**-150)


MARGINS = (-100.0, -3.0, 0.5, 13.8, 13.9, 16.0, 33.0, 70.0, 87.0, 99.0)


@pytest.mark.parametrize("level", [None, 0, 1, 2])
@pytest.mark.parametrize("classes", [2, 10, 97])
def test_the_short_way_is_exact_with_each_instruction_set(level: int | None, classes: int) -> None:
    """In NumPy (None), float32 was off by 1.09 times the bound with AVX-512: ten classes, margin 70."""
    with way(level is not None), library.at_level(level or 0) as available:
        if level is not None and not available:
            pytest.skip("not on this processor, or no C library")
        for margin in MARGINS:
            is_exact(row(margin, classes, 1, torch.Generator().manual_seed(classes)), 0)


@pytest.mark.parametrize("native", WAYS)
def test_the_mean_of_rows_is_exact_whatever_their_losses(native: bool) -> None:
    """The library takes one logarithm of several rows, of small losses and of large ones."""
    for margins in (MARGINS, [20.0] * 200, [14.0] * 200, [-30.0] * 200, [-90.0] * 200, [-150.0, 90.0] * 9):
        logits = torch.stack([row(m, 10, 1, torch.Generator().manual_seed(7)) for m in margins])
        known = math.fsum(exact(each, 0)[0] for each in logits) / len(logits)
        with way(native):
            found, _, short = value_and_gradient(logits, torch.zeros(len(logits), dtype=torch.int64))
        assert short and abs(found.item() - known) <= 2 * ULP * known


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        (torch.tensor([[math.nan, 1.0]]), torch.tensor([0])),
        (torch.tensor([[-math.inf, 1.0]]), torch.tensor([0])),
        (torch.tensor([[math.inf, 1.0]]), torch.tensor([0])),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, -100])),
        (torch.randn(3, 4).t(), torch.tensor([0, 1, 2, 0])),
        (torch.randn(2, 3).bfloat16(), torch.tensor([0, 1])),
        (torch.randn(3), torch.tensor(0)),
        (torch.randn(2, 3, 4), torch.randint(0, 3, (2, 4))),
        (torch.randn(2, 3), torch.randn(2, 3).softmax(1)),
    ],
)
@pytest.mark.usefixtures("each_way")
def test_what_the_short_way_cannot_do_it_leaves_to_the_long_one(logits: Tensor, target: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, gradient, short = value_and_gradient(logits, target)
    assert not short
    wide = logits.double().requires_grad_()
    exact = F.cross_entropy(wide, target.double() if target.is_floating_point() else target)
    exact.backward()
    assert wide.grad is not None
    torch.testing.assert_close(loss.double(), exact.detach(), equal_nan=True, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), wide.grad, equal_nan=True, rtol=5e-3, atol=1e-6)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("index", [-1, 3, 2**62])
def test_an_index_of_no_class_is_an_error_and_never_another_rows_logit(index: int) -> None:
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        zero_sum_cross_entropy(torch.zeros(2, 3), torch.tensor([index, 0]))


@pytest.mark.usefixtures("each_way")
def test_numpys_settings_and_the_callers_neither_change_the_short_way_nor_are_changed() -> None:
    logits, target = torch.tensor([[200.0, 0.0], [0.0, 1e-30]]), torch.tensor([0, 1])
    plain = zero_sum_cross_entropy(logits, target)
    with np.errstate(all="raise"):
        assert zero_sum_cross_entropy(logits, target) == plain
        assert set(np.geterr().values()) == {"raise"}


@pytest.mark.usefixtures("each_way")
def test_tensors_without_memory_of_their_own_are_left_to_the_long_way() -> None:
    logits, target = torch.randn(4, 3, 5), torch.tensor([0, 1, 2])

    def loss(z: Tensor, y: Tensor) -> Tensor:
        assert few_rows.mean_of_few_rows(z, y) is None
        return F.cross_entropy(z, y)

    torch.func.vmap(loss, in_dims=(0, None))(logits, target)
    torch.func.vmap(loss, in_dims=(None, 0))(logits[0], torch.stack([target, target.flip(0)]))
    torch.func.functionalize(loss)(logits[0], target)
    for odd in (torch._neg_view(logits[0]), logits[0].to_sparse(), torch._efficientzerotensor((3, 5))):
        assert few_rows.mean_of_few_rows(odd, target) is None


@pytest.mark.usefixtures("each_way")
def test_the_short_way_keeps_its_gradient_out_of_reach_and_its_inputs_as_they_were() -> None:
    logits, target = torch.randn(8, 10, requires_grad=True), torch.arange(8)
    before = logits.detach().clone()
    loss = zero_sum_cross_entropy(logits, target)
    loss.backward(retain_graph=True)
    assert logits.grad is not None
    once = logits.grad.clone()
    loss.backward(retain_graph=True)  # adds into what the first pass has left
    loss.backward()
    torch.testing.assert_close(logits.grad, 3 * once)
    assert torch.equal(logits.detach(), before) and torch.equal(target, torch.arange(8))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.usefixtures("each_way")
def test_without_a_gradient_wanted_the_short_way_has_the_same_value() -> None:
    logits, target = torch.randn(8, 10), torch.arange(8)
    plain = zero_sum_cross_entropy(logits, target)
    assert not plain.requires_grad
    with torch.inference_mode():
        assert zero_sum_cross_entropy(logits, target) == plain
    logits.requires_grad_()
    with torch.no_grad():
        assert zero_sum_cross_entropy(logits, target) == plain
    assert zero_sum_cross_entropy(logits, target) == plain


@pytest.mark.usefixtures("each_way")
def test_tracers_and_forward_mode_never_see_the_short_ways_constant() -> None:
    from torch._subclasses import FakeTensorMode
    from torch.autograd import forward_ad
    from torch.fx.experimental.proxy_tensor import make_fx

    target = torch.tensor([0, 1])
    traced = make_fx(lambda z: zero_sum_cross_entropy(z, target))(torch.zeros(2, 3))
    logits = torch.randn(2, 3)
    torch.testing.assert_close(traced(logits), zero_sum_cross_entropy(logits, target))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert zero_sum_cross_entropy(torch.zeros(2, 3), target).shape == ()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        zero_sum_cross_entropy(forward_ad.make_dual(logits, logits), target)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda z: zero_sum_cross_entropy(z, target))(logits)
