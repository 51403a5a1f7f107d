"""The factor between the head's logits and those of the loss, from the gradient alone."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nfi_monitor.capture.head_probe import Rows
from nfi_monitor.engine.step_reader import StepReader
from nfi_monitor.measure.accumulator import RowAccumulator
from nfi_monitor.measure.step import with_non_finite
from tests.measure import reference as ref
from tests.measure.measured import quantities

pytestmark = pytest.mark.usefixtures("both_ways")


def at_head(
    z: Tensor, y: Tensor, scale: float, dtype: torch.dtype = torch.float32, loss: ref.Loss = F.cross_entropy
) -> tuple[Tensor, Tensor]:
    """Return the gradient at the head's logits ``z`` and these, where the loss is of ``scale``·z."""
    z = z.to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(loss(z.float() * scale, y), z)
    return grad, z.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1 / 50, 1 / 9, 0.25, 10.0, 30.0, 100.0])
@pytest.mark.parametrize("loss", [F.cross_entropy, ref.class_weights, ref.focal])
@pytest.mark.parametrize("classes", [3, 4, 10, 97])
def test_the_factor_after_the_head_is_recovered(classes, loss, scale, dtype) -> None:
    if classes == 3 and scale > 1:
        pytest.skip("two points always lie on a line")
    z, y = ref.make_logits(3, 24, classes, spread=1, margins=(-1, 3))
    found = quantities(*at_head(z / scale, y, scale, dtype, loss))
    assert found["logit_scale"] == pytest.approx(scale, rel=1e-2 if dtype is torch.bfloat16 else 1e-4)
    true = quantities(*at_head(z, y, 1.0, torch.float64, loss))
    for name in (
        "margin_median",
        "margin_min",
        "head_loss",
        "residual_mass",
        "max_probability",
        "mean_logit",
    ):
        assert found[name] == pytest.approx(true[name], rel=0.03, abs=0.03), name
    assert "logit_scale" not in true


@pytest.mark.parametrize("pair", ref.PAIRS, ids=str)
@pytest.mark.parametrize(
    "loss", [ref.cross_entropy, ref.label_smoothing, ref.class_weights, ref.focal, ref.soft_targets]
)
@pytest.mark.parametrize("margin", [-20.0, 0.0, 3.0, 6.0, 9.0, 25.0])
def test_logits_that_are_not_multiplied_have_no_factor(margin, loss, pair) -> None:
    for spread, classes in itertools.product((0.0, 0.1, 1.0, 4.0), (2, 3, 4, 10, 97)):
        z, y = ref.make_logits(7, 24, classes, spread=spread, margins=(margin, margin + 2))
        grad, logits = ref.gradients(z, y, pair, loss, ref.loss_scale(pair, 24))
        assert "logit_scale" not in quantities(grad, logits), (spread, classes)


def test_displacements_are_multiplied_with_the_factor() -> None:
    values = {"logit_displacement": 2.0, "feature_displacement": 4.0, "weight_norm": 1.0, "logit_scale": 0.25}
    assert with_non_finite(values) == {**values, "logit_displacement": 0.5, "feature_displacement": 1.0}


def test_the_factor_goes_on_after_a_resume() -> None:
    z, y = ref.make_logits(3, 24, 10, spread=1, margins=(-1, 3))
    rows = RowAccumulator()
    rows.add(Rows(*at_head(z * 9, y, 1 / 9), None, 24))
    saved = StepReader(None, rows, None, set(), print).state_dict(1)  # type: ignore[arg-type]
    again = RowAccumulator()
    reader = StepReader(None, again, None, lambda part: False, print)  # type: ignore[arg-type]
    reader.apply_state(reader.read_state(saved, torch.device("cpu")))
    assert float(again.loss_kind.slope) == float(rows.loss_kind.slope) == pytest.approx(1 / 9, rel=1e-4)
    del saved["logit_scale"]  # a state of an earlier version
    reader = StepReader(None, again, None, lambda part: False, print)  # type: ignore[arg-type]
    reader.apply_state(reader.read_state(saved, torch.device("cpu")))
    assert float(again.loss_kind.slope) == 1.0
