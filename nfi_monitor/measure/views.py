"""Define the arguments of declared functions: the rows of one backward pass, or one optimizer step.

:mod:`nfi_monitor.measure.rows` and :mod:`nfi_monitor.measure.step` fill a view once and hand it to every
function that a declaration in :mod:`nfi_monitor.quantities` names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from nfi_monitor.capture.update import Update
    from nfi_monitor.measure.memory import Memory


class TopLogits(NamedTuple):
    """Per row, all [N]: the largest logit, its class (int64), the second largest, and the log of the rest."""

    largest: Tensor
    winner: Tensor
    runner_up: Tensor
    log_rest: Tensor
    """ln Σ_{k≠m} e^{z_k − z_m}; with a single competitor, the negative margin."""


@dataclass(frozen=True)
class RowView:
    """The sampled rows of one backward pass, N rows and K classes, on their device.

    Numbers per row, [N] each, float64 if the gradient or the logits are, else float32; ``target`` is int64,
    ``live`` and ``counts`` are bool.  NaN and Inf may stand in rows that do not count.  In rows that count,
    −Inf in ``logits`` is a masked class (:func:`nfi_monitor.measure.shift_invariance.unmasked` leaves it
    out).

    ``grad`` and ``logits`` have the run's own dtype: convert them to ``absolute.dtype`` before arithmetic.
    Squares overflow in float16, and a mean in bfloat16 has three digits.
    """

    top: TopLogits
    """The largest logit, its class, the second largest, ln of the rest over the largest."""
    target: Tensor
    """The correct class, found without labels (:func:`nfi_monitor.measure.margins.target_class`)."""
    target_logit: Tensor
    signed: Tensor
    """Σ_k g_k."""
    absolute: Tensor
    """Σ_k |g_k|."""
    violation: Tensor
    """|Σ_k g_k| / Σ_k |g_k|."""
    loss: Tensor
    """−ln p_r in nats."""
    residual: Tensor
    """ε = Σ_{k≠r} p_k."""
    margin: Tensor
    """z_r − max_{k≠r} z_k in nats."""
    live: Tensor
    """Rows with a gradient, all of whose numbers are finite."""
    counts: Tensor
    """Live rows, and rows whose whole gradient underflowed."""
    classes: tuple[Tensor, Tensor] | None
    """``grad`` and ``logits``; None where the classes of a row are on several ranks."""

    @property
    def grad(self) -> Tensor:
        """∂L/∂z [N, K] in the run's own dtype. Raises ValueError where the classes are on several ranks."""
        return self._whole()[0]

    @property
    def logits(self) -> Tensor:
        """z [N, K] in the run's own dtype. Raises ValueError where the classes are on several ranks."""
        return self._whole()[1]

    def _whole(self) -> tuple[Tensor, Tensor]:
        if self.classes is None:
            raise ValueError("No rank holds all classes of these rows: declare from_shards=False.")
        return self.classes


@dataclass(frozen=True)
class StepView:
    """One optimizer step, on the head's device; [C] over the sampled coordinates."""

    update: Update
    moved: Tensor
    """``update.after`` − ``update.before``, [C]."""
    features: Tensor | None
    """[n, d] features of some rows of the step."""
    feature_mean: Tensor | None
    """μ_G [d] of the step."""
    previous: Memory | None
    """The step before, at the same coordinates; None where it was not measured.

    Its gradient is the one that the optimizer stepped by: ``update.stepped_by``, if there is one.
    """
