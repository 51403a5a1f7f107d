"""Margins, residual mass and row loss against mpmath, down to where float32 ends and beyond."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfi_monitor.measure import margins
from tests.measure import reference as ref

FAST = settings(deadline=None, derandomize=True, max_examples=40)
SMALLEST = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}


def relative(dtype: torch.dtype, z: torch.Tensor) -> float:
    """ε and the loss are exponentials of a difference of logits, so an ulp of the logits is a relative error.

    Four roundings of numbers up to |z|, and the error of the sum of K exponentials in lanes.
    """
    largest = z[z.isfinite()].abs().max().item()
    return ref.UNIT[dtype] * (8 + 4 * largest + z.shape[-1] / 32)


def check(z: torch.Tensor, y: torch.Tensor) -> None:
    top = margins.top_logits(z)
    own = z.gather(-1, y[:, None])[:, 0]
    loss = margins.row_loss(top, own)
    epsilon = margins.residual_mass(loss)
    margin = margins.margin(top, y, own)
    for row, target in enumerate(y.tolist()):
        others = [x for k, x in enumerate(z[row].double().tolist()) if k != target]
        true_epsilon, true_loss = ref.softmax_truth(own[row].item(), others)
        rel, smallest = relative(z.dtype, z[row]), 2 * SMALLEST[z.dtype]
        # exp() of CPU vector units may flush what is below the smallest normal number.
        absolute = smallest if true_loss > torch.finfo(z.dtype).tiny else torch.finfo(z.dtype).tiny
        assert loss[row].item() == pytest.approx(true_loss, rel=rel, abs=absolute)
        assert epsilon[row].item() == pytest.approx(true_epsilon, rel=rel, abs=absolute)
        assert margin[row].item() == pytest.approx(own[row].item() - max(others), rel=ref.UNIT[z.dtype])


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([2, 3, 10, 60]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    margin=st.floats(-120, 120),
    spread=st.sampled_from([0.0, 0.5, 4.0]),
    shift=st.sampled_from([0.0, -7.0, 300.0, -2000.0]),
)
def test_loss_residual_mass_and_margin_equal_mpmath(seed, classes, dtype, margin, spread, shift):
    z, y = ref.make_logits(seed, 3, classes, spread=spread, margins=(margin, margin + 3), shift=shift)
    check(z.to(dtype), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [-120.0, 0.0, 3.0, 16.7, 60.0, 86.0, 88.0, 95.0, 110.0, 120.0])
def test_loss_and_residual_mass_hold_through_the_float32_underflow(dtype, margin):
    for classes in (2, 50):
        z, y = ref.make_logits(0, 2, classes, spread=0, margins=(margin, margin))
        check(z.to(dtype), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_residual_mass_are_right_at_vocabulary_size(dtype):
    for spread, margin in ((0.0, 0.0), (0.0, 26.0), (3.0, -4.0), (3.0, 12.0), (0.0, 60.0)):
        z, y = ref.make_logits(5, 1, 50_257, spread=spread, margins=(margin, margin))
        check(z.to(dtype), y)


def test_float64_margins_of_hundreds_of_nats_keep_their_residual_mass():
    z = torch.tensor([[600.0, 0.0, 0.0]], dtype=torch.float64)
    check(z, torch.tensor([0]))
    assert margins.row_loss(margins.top_logits(z), z[:, 0]).item() > 0


def test_masked_classes_do_not_count():
    for dtype in (torch.float32, torch.float64):
        z = torch.randn(4, 9, dtype=dtype) * 5
        z[:, 3:] = -math.inf
        check(z, torch.tensor([0, 1, 2, 0]))


def test_tied_leaders_have_margin_zero_whichever_is_the_label():
    z = torch.tensor([[4.0, 4.0, 1.0], [4.0, 4.0, 1.0]])
    y = torch.tensor([0, 1])
    top = margins.top_logits(z)
    assert margins.margin(top, y, z.gather(-1, y[:, None])[:, 0]).tolist() == [0.0, 0.0]
    check(z, y)


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    pair=st.sampled_from(ref.PAIRS),
    margin=st.sampled_from([-20.0, -1.0, 0.0, 3.0, 9.0, 17.0, 40.0]),
    loss=st.sampled_from([ref.cross_entropy, ref.class_weights, ref.by_hand]),
)
def test_the_target_is_found_without_labels_when_labels_are_hard(seed, pair, margin, loss):
    z, y = ref.make_logits(seed, 10, 7, spread=1, margins=(margin, margin + 3))
    grad, logits = ref.gradients(z, y, pair, loss, ref.loss_scale(pair, 10))
    lowest, argmin = grad.min(-1)
    winner = logits.double().argmax(-1)
    of_winner = grad.gather(-1, winner[:, None])[:, 0]
    found = margins.target_class(lowest, argmin, of_winner, winner, torch.zeros(()))
    assert torch.equal(found, y)


def test_a_penalty_on_the_logits_does_not_make_another_class_the_target():
    """Absorbed rows have only the penalty's gradient; a misclassified row with a small weight has its own."""
    torch.manual_seed(0)
    z = torch.randn(30, 7)
    y = z.argmax(-1)
    z[torch.arange(30), y] += 40.0
    z[:3] = torch.randn(3, 7)
    y[:3] = (z[:3].argmax(-1) + 1) % 7
    weight = torch.ones(30)
    weight[0] = 0.02
    z.requires_grad_()
    loss = (weight * torch.nn.functional.cross_entropy(z, y, reduction="none")).mean()
    for penalty in (0.0, 1e-9, 1e-6, 1e-5):
        (grad,) = torch.autograd.grad(loss + penalty * z.square().mean(), z, retain_graph=True)
        lowest, argmin = grad.min(-1)
        winner = z.argmax(-1)
        of_winner = grad.gather(-1, winner[:, None])[:, 0]
        for scale in (0.0, 1 / 30):
            found = margins.target_class(lowest, argmin, of_winner, winner, torch.tensor(scale))
            assert torch.equal(found, y), (penalty, scale)
