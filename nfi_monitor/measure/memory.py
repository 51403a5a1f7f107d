"""Keep the numbers of the last measured step, for the comparison with the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nfi_monitor.capture.tensor_text import from_text, to_text
from nfi_monitor.capture.update import Update
from nfi_monitor.schema import decode

_TENSORS = ("before", "feature_mean", "grad", "preconditioner", "rows")


class Memory:
    """The numbers of the last measured step that the next one is compared with.

    ``preconditioner`` is None where it is not known: then there is no curvature.  ``layout`` is that of the
    coordinate sample; None if an earlier version saved the state.  ``rows`` is the sketch of some rows
    (:func:`nfi_monitor.measure.row_match.row_sketch`), or None.
    """

    __slots__ = (*_TENSORS, "layout", "step")

    def __init__(
        self,
        step: int,
        before: Tensor,
        grad: Tensor,
        preconditioner: Tensor | None,
        feature_mean: Tensor | None,
        layout: tuple[tuple[int, int], ...] | None,
        rows: Tensor | None = None,
    ) -> None:
        self.step = step
        self.layout = layout
        self.before = before
        self.grad = grad
        self.preconditioner = preconditioner
        self.feature_mean = feature_mean
        self.rows = rows

    def precedes(self, update: Update, step: int) -> bool:
        """Return whether this is the step before ``step``, at the same coordinates as ``update``.

        Sizes alone do not show this: layers of one size may be trained in turn.
        """
        return (
            self.step == step - 1
            and self.grad.shape == update.grad.shape
            and self.layout in (None, update.sample.layout)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain types that keep every bit. Reads from the device: not for a hot path."""
        layout = None if self.layout is None else [[*of] for of in self.layout]
        return {"step": self.step, "layout": layout} | {
            name: None if (tensor := getattr(self, name)) is None else to_text(tensor) for name in _TENSORS
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> Memory:
        """Return the memory of :meth:`state_dict`. Raises ValueError, or another error, for a wrong state."""
        saved_tensors = {name: state.get(name) for name in _TENSORS}  # version 0.1 kept no rows
        tensors = {
            name: None if text is None else from_text(text, device) for name, text in saved_tensors.items()
        }
        vectors = [tensors[name] for name in ("before", "grad", "preconditioner")]
        if None in vectors[:2] or len({len(vector) for vector in vectors if vector is not None}) != 1:
            raise ValueError("last_step: vectors are missing, or of different lengths")
        layout = decode(tuple[tuple[int, int], ...] | None, state.get("layout"))
        return cls(decode(int, state["step"]), **tensors, layout=layout)  # type: ignore[arg-type]
