"""Rounding or meaning: which losses break the zero-sum by design."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfi_monitor.capture.head_probe import Rows
from nfi_monitor.measure.accumulator import RowAccumulator
from nfi_monitor.measure.native_rows import row_statistics
from nfi_monitor.measure.rows import SUMS, finish, shown_precision
from tests.measure import reference as ref
from tests.measure.measured import quantities

pytestmark = pytest.mark.usefixtures("both_ways")

FAST = settings(deadline=None, derandomize=True, max_examples=60)


def unexplained_share(grad: torch.Tensor, logits: torch.Tensor) -> float:
    return quantities(grad, logits).get("unexplained_violation_fraction", 0.0)


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([2, 3, 10, 97, 1000]),
    pair=st.sampled_from(ref.PAIRS),
    loss=st.sampled_from([ref.cross_entropy, ref.class_weights, ref.focal]),
    margin=st.sampled_from([-20.0, -2.0, 0.0, 1.0, 3.0, 6.0, 9.0, 13.0, 15.0, 17.0, 25.0, 60.0, 118.0]),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
)
def test_losses_with_hard_labels_are_never_called_shift_dependent(seed, classes, pair, loss, margin, spread):
    z, y = ref.make_logits(seed, 12, classes, spread=spread, margins=(margin, margin + 2))
    grad, logits = ref.gradients(z, y, pair, loss, ref.loss_scale(pair, 12))
    assert unexplained_share(grad, logits) == 0


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([2, 3, 10, 97]),
    pair=st.sampled_from(ref.PAIRS),
    loss=st.sampled_from([ref.label_smoothing, ref.distillation, ref.soft_targets]),
    margin=st.sampled_from([-20.0, -2.0, 0.0, 9.0, 13.0, 15.0, 17.0, 25.0, 60.0, 118.0]),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
)
def test_losses_with_soft_targets_are_never_called_shift_dependent(seed, classes, pair, loss, margin, spread):
    """Once unsure rows have shown the scale of the gradients: a student that sits exactly on its teacher from
    the first step on shows nothing but rounding, and cannot be told from one that obeys no zero-sum."""
    z, y = ref.make_logits(seed, 12, classes, spread=spread, margins=(margin, margin + 2))
    scale = ref.loss_scale(pair, 12)
    grad, logits = ref.gradients(z, y, pair, loss, scale)
    known = shown_precision(grad)._replace(scale=torch.tensor(scale / 12))
    sums = row_statistics(grad, logits, 12, known).sums
    assert sums[SUMS.index("unexplained")] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [10, 100])
def test_label_smoothing_near_its_optimum_is_not_called_shift_dependent(dtype, classes):
    """Logits within 1e-3 of where the gradient vanishes: rounding is large beside what is left of it, and ε
    stays at the smoothing.  The scale of the gradients is known from rows that are not there yet."""
    smooth = 0.1
    best = math.log((1 - smooth + smooth / classes) / (smooth / classes))
    z = 1e-3 * torch.randn(64, classes, dtype=torch.float64)
    z[:, 0] += best
    z[:4, 0] = 0.0  # these have still to be learned
    y = torch.zeros(64, dtype=torch.long)
    grad, logits = ref.gradients(z, y, (dtype, dtype), ref.label_smoothing)
    assert unexplained_share(grad, logits) == 0
    accumulator = RowAccumulator()
    for step in range(1, 4):  # ... or were, a few steps ago
        accumulator.clear(step)
        accumulator.add(Rows(grad, logits, None, 64))
        grad, logits = ref.gradients(z[4:].repeat(16, 1)[:64], y, (dtype, dtype), ref.label_smoothing)
    found = finish(accumulator.sums.tolist(), accumulator.maxima.tolist(), single_output=False)
    assert found["unexplained_violation_fraction"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [-2000.0, 500.0])
def test_logsumexp_by_hand_at_large_logits_is_not_called_shift_dependent(dtype, shift):
    for margin in (0.0, 4.0, 8.0, 10.0, 14.0, 18.0):
        for classes in (2, 10, 300):
            z, y = ref.make_logits(1, 16, classes, spread=1, margins=(margin, margin + 2), shift=shift)
            grad, logits = ref.gradients(z, y, (dtype, dtype), ref.by_hand)
            assert unexplained_share(grad, logits) == 0


@pytest.mark.parametrize("pair", ref.PAIRS, ids=str)
@pytest.mark.parametrize("margin", [0.0, 2.0, 6.0, 12.0, 16.0, 26.0])
def test_tied_logits_at_vocabulary_size_are_not_called_shift_dependent(pair, margin):
    """log-sum-exp adds 50,257 equal terms one after the other: its error grows with K."""
    z, y = ref.make_logits(0, 3, 50_257, spread=0, margins=(margin, margin + 1))
    grad, logits = ref.gradients(z, y, pair, scale=ref.loss_scale(pair, 3))
    assert unexplained_share(grad, logits) == 0


def test_a_float32_loss_on_float64_logits_is_not_called_shift_dependent():
    z, y = ref.make_logits(0, 16, 10, spread=1, margins=(-2, 14))
    assert unexplained_share(*ref.gradients(z, y, (torch.float64, torch.float32))) == 0


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([3, 10, 97]),
    pair=st.sampled_from([(torch.float32, torch.float32), (torch.float64, torch.float64),
                          (torch.float32, torch.float64)]),
    loss=st.sampled_from(ref.NOT_SHIFT_INVARIANT),
)  # fmt: skip
def test_losses_that_depend_on_the_common_shift_are_recognised(seed, classes, pair, loss):
    """Unsure rows (margins −4 … 3) of logits around 2: rounding could not do this."""
    z, y = ref.make_logits(seed, 32, classes, spread=1, margins=(-4, 3), shift=2.0)
    assert unexplained_share(*ref.gradients(z, y, pair, loss)) > 0.75


@pytest.mark.parametrize("loss", ref.NOT_SHIFT_INVARIANT)
def test_a_violation_by_design_is_recognised_in_float32_up_to_margins_of_6(loss):
    z, y = ref.make_logits(0, 64, 10, spread=1, margins=(5, 6), shift=2.0)
    assert unexplained_share(*ref.gradients(z, y, loss=loss)) > 0.75


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_in_bfloat16_a_gross_violation_is_recognised(pair):
    """One-vs-rest on unsure rows; z-loss and squared errors drown in 2⁻⁸."""
    z, y = ref.make_logits(0, 64, 10, spread=1, margins=(-4, 3))
    assert unexplained_share(*ref.gradients(z, y, pair, ref.one_against_rest)) > 0.5


@pytest.mark.parametrize("temperature", [1.0, 20.0, 50.0])
def test_only_logits_that_are_scaled_after_the_head_contradict_their_gradient(temperature):
    first, y = ref.make_logits(4, 24, 8, spread=1, margins=(0, 3))
    known = row_statistics(*scaled(first, y, temperature), 24).loss_kind  # unsure rows show the scale
    later = row_statistics(*scaled(20 * first, y, temperature), 24, known)
    share = later.sums[SUMS.index("contradicted")] / later.sums[SUMS.index("live")]
    assert share > 0.5 if temperature > 1 else share == 0


def scaled(z, y, temperature):
    logits = z.clone().requires_grad_()
    torch.nn.functional.cross_entropy(logits / temperature, y).backward()
    return logits.grad, z
