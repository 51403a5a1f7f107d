"""Call the functions that the declarations in :mod:`nfi_monitor.quantities` name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from torch import Tensor

from nfi_monitor.measure.views import RowView, StepView
from nfi_monitor.quantities import READING_ORDER, PerRow

Over = Literal["live", "counted"]


def of_rows(over: Over) -> dict[str, PerRow]:
    """Return the per-row declarations whose mean is over these rows, by name."""
    return {q.name: q.per_row for q in READING_ORDER if q.per_row is not None and q.per_row.over == over}


OVER_LIVE, OVER_COUNTED = of_rows("live"), of_rows("counted")
OF_STEP = {q.name: q.per_step for q in READING_ORDER if q.per_step}


@cache
def function(path: str) -> Callable[[Any], Any]:
    """Import the function at ``"module:function"``. Raises ImportError or AttributeError if there is none."""
    module, _, name = path.partition(":")
    found: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
    return found


def row_values(rows: RowView, declared: dict[str, PerRow]) -> list[Tensor]:
    """Evaluate each declaration on whole rows → tensors [N] in the dtype of the view's sums."""
    dtype = rows.absolute.dtype
    values = (function(of.function)(rows) for of in declared.values())
    return [value if value.dtype is dtype else value.to(dtype) for value in values]


def step_values(step: StepView, of: dict[str, str] = OF_STEP) -> dict[str, Tensor]:
    """Evaluate per-step declarations → scalar tensors by name, without what cannot be measured."""
    values = {name: function(path)(step) for name, path in of.items()}
    return {name: value for name, value in values.items() if value is not None}
