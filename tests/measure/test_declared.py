"""Functions are found by the path that a declaration gives, and see whole rows only where there are any."""

from __future__ import annotations

import pytest
import torch

from nfi_monitor.measure import declared, margins
from nfi_monitor.measure.rows import LossKind, row_view
from nfi_monitor.measure.views import RowView
from nfi_monitor.quantities import PerRow

GRAD, LOGITS = torch.tensor([[-0.5, 0.5], [0.25, -0.25]]), torch.zeros(2, 2)


def view(classes: tuple[torch.Tensor, torch.Tensor] | None) -> RowView:
    some = torch.tensor(1e-7)
    rows, _ = row_view(
        (GRAD.sum(-1), GRAD.abs().sum(-1)),
        margins.top_logits(LOGITS),
        torch.tensor([0, 1]),
        torch.zeros(2),
        GRAD.amin(-1),
        2,
        LossKind(some, some, some, some),
        classes=classes,
    )
    return rows


def half_of_the_gradient(rows: RowView) -> torch.Tensor:
    return rows.grad.double().amax(-1) / 2


def test_values_come_in_the_dtype_of_the_sums() -> None:
    path = f"{__name__}:half_of_the_gradient"
    (values,) = declared.row_values(view((GRAD, LOGITS)), {"half": PerRow(path, over="live")})
    assert values.dtype is torch.float32 and values.tolist() == [0.25, 0.125]


def test_rows_whose_classes_are_on_several_ranks_have_no_gradient_and_no_logits() -> None:
    rows = view(None)
    assert rows.live.all() and rows.loss.tolist() == pytest.approx([torch.log(torch.tensor(2.0)).item()] * 2)
    with pytest.raises(ValueError, match="from_shards=False"):
        _ = rows.grad
    with pytest.raises(ValueError, match="from_shards=False"):
        _ = rows.logits


@pytest.mark.parametrize("path", ["nfi_monitor.measure.nowhere:loss", "nfi_monitor.measure.margins:nothing"])
def test_a_path_without_a_function_is_an_error(path: str) -> None:
    with pytest.raises((ImportError, AttributeError)):
        declared.function(path)
