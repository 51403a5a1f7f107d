"""``zero_sum_cross_entropy`` against longdouble references and against ``F.cross_entropy`` in float64."""

from __future__ import annotations

import gc
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nfi_monitor.remedies import ZeroSumCrossEntropyLoss, zero_sum_cross_entropy
from tests.remedies.exact_loss import ULP, WAYS, exact, row, way

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@given(
    margin=st.floats(-100, 100, width=32),
    classes=st.sampled_from([2, 3, 10, 1000, 50_257]),
    ties=st.sampled_from([1, 2, 50]),
    shift=st.sampled_from([0.0, 30.0, -1000.0]),
    seed=st.integers(0, 2**16),
    batched=st.booleans(),
    native=st.sampled_from(WAYS),
)
def test_loss_and_gradient_of_float32_logits_are_exact_to_the_conditioning_of_exp(
    margin: float, classes: int, ties: int, shift: float, seed: int, batched: bool, native: bool
) -> None:
    """A row alone takes the long way, a small batch the short one."""
    logits = row(margin, classes, min(ties, classes - 1), torch.Generator().manual_seed(seed)) + shift
    margin = float(logits[0].double() - logits[1:].double().max())  # what the shift has left of it
    loss, gradient = exact(logits, 0)
    logits.requires_grad_()
    with way(native):
        found = (
            zero_sum_cross_entropy(logits.unsqueeze(0), torch.tensor([0]))
            if batched
            else zero_sum_cross_entropy(logits, torch.tensor(0))
        )
    found.backward()
    assert found.dtype is torch.float32 and logits.grad is not None
    if loss > torch.finfo(torch.float32).smallest_normal:
        # Terms below the smallest normal number are off by half of the smallest subnormal, each.
        assert abs(found.item() - loss) <= (abs(margin) + 8) * ULP * loss + classes * 2.0**-150
    said = logits.grad.double().numpy()
    normal = np.abs(gradient) > torch.finfo(torch.float32).smallest_normal
    spread = float(logits.detach().max() - logits.detach().min())
    # Two differences are rounded where the target is not the largest: the entry's own and the margin.
    bound = (spread + max(-margin, 0.0) + 8) * ULP
    # The target's entry may be a sum of subnormal terms, like the loss.
    assert np.all(np.abs(said - gradient)[normal] <= bound * np.abs(gradient)[normal] + classes * 2.0**-150)


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    margin=st.floats(-20, 100),
    classes=st.sampled_from([2, 10, 1000, 50_257]),
    ties=st.sampled_from([1, 9, 999]),
    seed=st.integers(0, 2**16),
)
def test_a_rows_gradient_sums_to_zero_in_the_inputs_own_precision(
    dtype: torch.dtype, margin: float, classes: int, ties: int, seed: int
) -> None:
    logits = row(margin, classes, min(ties, classes - 1), torch.Generator().manual_seed(seed)).to(dtype)
    logits = logits.unsqueeze(0).requires_grad_()
    zero_sum_cross_entropy(logits, torch.tensor([0])).backward()
    assert logits.grad is not None
    g = logits.grad.double()
    largest = float(g.abs().max())
    smallest = torch.finfo(dtype).smallest_normal
    if dtype is torch.float16:
        # Its subnormals are kept, and each entry may be off by half of the smallest.
        assert abs(float(g.sum())) <= 4 * 2 * EPS[dtype] * largest + classes * 2.0**-25
    elif largest > smallest / EPS[dtype]:
        # An entry below the smallest normal number may be flushed; they add up to nothing here.
        assert abs(float(g.sum())) <= 4 * 2 * EPS[dtype] * largest + classes * smallest


# --- beside torch -----------------------------------------------------------------------------------------


def test_the_correct_class_keeps_its_gradient_where_torch_loses_it() -> None:
    logits = torch.tensor([[30.0, 0.0, 0.0]])
    for loss, absorbed in ((F.cross_entropy, True), (zero_sum_cross_entropy, False)):
        watched = logits.clone().requires_grad_()
        value = loss(watched, torch.tensor([0]))
        value.backward()
        assert watched.grad is not None
        assert (watched.grad[0, 0] == 0) == absorbed == (value.item() == 0)
        assert watched.grad[0, 1] > 0


# --- the options of F.cross_entropy ------------------------------------------------------------------

SHAPES = {"one row": (7,), "rows": (5, 7), "images": (2, 7, 3, 4)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
def test_every_option_means_what_it_means_in_torch(
    shape: tuple[int, ...], reduction: str, weighted: bool, smoothing: float, kind: str
) -> None:
    """In float64, where nothing of this absorbs."""
    torch.manual_seed(0)
    logits = torch.randn(shape, dtype=torch.float64) * 3
    axis = 0 if len(shape) == 1 else 1
    target = torch.randint(0, 7, shape[:axis] + shape[axis + 1 :])
    if kind == "probabilities":
        target = torch.randn(shape, dtype=torch.float64).softmax(axis)
    elif kind == "ignored" and target.dim():
        target.view(-1)[::3] = -100
    weight = torch.rand(7, dtype=torch.float64) + 0.5 if weighted else None
    options: dict[str, Any] = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    results = []
    for loss in (F.cross_entropy, zero_sum_cross_entropy):
        watched = logits.clone().requires_grad_()
        value = loss(watched, target, **options)
        (
            value * torch.linspace(1, 2, value.numel(), dtype=torch.float64).reshape(value.shape)
        ).sum().backward()
        results.append((value.detach(), watched.grad))
    (value, grad), (ours, our_grad) = results
    assert ours.shape == value.shape and ours.dtype == value.dtype
    torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(our_grad, grad, rtol=1e-10, atol=1e-12)


def test_an_ignored_row_counts_nothing_even_if_it_holds_nan() -> None:
    logits = torch.tensor([[1.0, 2.0], [math.nan, math.inf]])
    torch.testing.assert_close(
        zero_sum_cross_entropy(logits, torch.tensor([1, -100])),
        zero_sum_cross_entropy(logits[:1], torch.tensor([1])),
    )


def test_without_a_row_that_counts_the_mean_is_nan_and_the_sum_is_zero_as_in_torch() -> None:
    for rows in (0, 2):
        logits, target = torch.zeros(rows, 3), torch.full((rows,), -100)
        for reduction in ("mean", "sum"):
            torch.testing.assert_close(
                zero_sum_cross_entropy(logits, target, reduction=reduction),
                F.cross_entropy(logits, target, reduction=reduction),
                equal_nan=True,
            )


def test_masked_classes_get_no_gradient_and_a_masked_target_an_infinite_loss() -> None:
    logits = torch.tensor([[2.0, -math.inf, 1.0]], requires_grad=True)
    zero_sum_cross_entropy(logits, torch.tensor([0])).backward()
    assert logits.grad is not None and logits.grad[0, 1] == 0 and torch.isfinite(logits.grad).all()
    assert zero_sum_cross_entropy(logits, torch.tensor([1])).item() == math.inf
    soft = torch.tensor([[0.5, 0.0, 0.5]])
    assert torch.isfinite(zero_sum_cross_entropy(logits, soft))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_gradient_is_the_losses_own(smoothing: float, reduction: str) -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 4
    target, weight = torch.tensor([0, 5, -100, 2]), torch.rand(6, dtype=torch.float64) + 0.5

    def loss(z: Tensor) -> Tensor:
        return zero_sum_cross_entropy(z, target, weight, reduction=reduction, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    soft = torch.rand(4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: zero_sum_cross_entropy(z, soft, weight), logits)


# --- autograd, compile, memory -------------------------------------------------------------------------


def test_a_second_backward_pass_finds_the_same_gradient() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    loss = zero_sum_cross_entropy(logits, torch.tensor([0, 1, 2]))
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(3 * loss, logits)
    torch.testing.assert_close(second, 3 * kept)
    assert torch.equal(first, kept)


def test_a_second_derivative_is_refused_with_a_reason() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    loss = zero_sum_cross_entropy(logits, torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match=r"no second derivative .*F.cross_entropy\(logits.double"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_a_gradient_scaler_loses_no_small_gradient_of_float16_logits() -> None:
    logits = torch.tensor([[14.0, 0.0]], dtype=torch.float16, requires_grad=True)
    (65536.0 * zero_sum_cross_entropy(logits, torch.tensor([0]), reduction="none")).sum().backward()
    assert logits.grad is not None and logits.grad.dtype is torch.float16
    torch.testing.assert_close(logits.grad[0, 1].item(), 65536 * math.exp(-14), rtol=2e-3, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_compiles_without_a_graph_break_to_the_same_numbers(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(4, 6), torch.tensor([0, 5, -100, 2])

    def loss(z: Tensor) -> Tensor:
        return zero_sum_cross_entropy(z, target, label_smoothing=smoothing)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        watched = logits.clone().requires_grad_()
        value = function(watched)
        value.backward()
        results.append((value.detach(), watched.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(("loss", "tensors"), [(zero_sum_cross_entropy, 1), (F.cross_entropy, 3)])
def test_one_tensor_of_the_logits_size_is_made_where_torch_makes_three(loss: Any, tensors: int) -> None:
    logits = torch.randn(64, 5000, requires_grad=True)
    size = logits.numel() * logits.element_size()
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss(logits, torch.zeros(64, dtype=torch.int64)).backward()
    made = [event.self_cpu_memory_usage for event in profile.events()]
    assert sum(bytes_made for bytes_made in made if bytes_made >= size) == tensors * size


# --- the module and bad input -----------------------------------------------------------------------------


def test_the_module_is_the_function() -> None:
    logits, target, weight = torch.randn(4, 3), torch.tensor([0, 1, 2, 7]), torch.rand(3)
    module = ZeroSumCrossEntropyLoss(weight, ignore_index=7, reduction="sum", label_smoothing=0.1)
    assert module(logits, target) == zero_sum_cross_entropy(logits, target, weight, 7, "sum", 0.1)
    assert "weight" in module.state_dict() and "label_smoothing=0.1" in repr(module)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda z, t: zero_sum_cross_entropy(z, t, reduction="avg"),
            ValueError,
            "none, mean, sum, got 'avg'",
        ),
        (lambda z, t: ZeroSumCrossEntropyLoss(reduction="avg"), ValueError, "none, mean, sum, got 'avg'"),
        (lambda z, t: zero_sum_cross_entropy(z, t, label_smoothing=2), ValueError, r"\[0, 1\], got 2"),
        (lambda z, t: zero_sum_cross_entropy(z.long(), t), TypeError, "floating point, got torch.int64"),
        (lambda z, t: zero_sum_cross_entropy(z, t[:1]), ValueError, r"shape \(2,\), got \(1,\)"),
        (lambda z, t: zero_sum_cross_entropy(z, t.int()), TypeError, "int64, got torch.int32"),
        (lambda z, t: zero_sum_cross_entropy(z, z[:1]), ValueError, r"\(2, 3\), got \(1, 3\)"),
        (lambda z, t: zero_sum_cross_entropy(z, t, torch.ones(2)), ValueError, r"shape \(3,\), got \(2,\)"),
        (lambda z, t: zero_sum_cross_entropy(z[0, 0], t), ValueError, "class axis"),
    ],
)
def test_what_torch_refuses_is_refused_with_what_was_given(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3), torch.tensor([0, 1]))


def test_a_traced_loss_is_computed_and_no_constant() -> None:
    logits, target = torch.randn(8, 5), torch.randint(5, (8,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: it sees shapes become numbers
        traced = torch.jit.trace(lambda z: zero_sum_cross_entropy(z, target), (logits,))
    torch.testing.assert_close(traced(3.0 * logits), F.cross_entropy(3.0 * logits, target))


def second_pass(rows: int) -> Tensor:
    """The gradient of a second backward pass, that of the first having been changed in place."""
    logits = torch.randn(rows, 5, requires_grad=True) * 1.0
    loss = zero_sum_cross_entropy(logits, torch.randint(5, (rows,)))
    torch.autograd.grad(loss, logits, retain_graph=True)[0].mul_(2.0)
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("rows", [8, 4_096])
def test_a_gradient_that_is_changed_in_place_never_changes_the_next_one(rows: int) -> None:
    """No second [N, K]: what is handed out is what is kept, and autograd says so."""
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second_pass(rows)
