"""All quantities of one optimizer step, as named 0-d tensors on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nfi_monitor.capture.tensor_text import from_text, to_text
from nfi_monitor.capture.update import Update
from nfi_monitor.measure import curvature, displacement, global_means, second_moment, weight_norm, zero_sum

_TENSORS = ("before", "feature_mean", "grad", "preconditioner")


class Memory:
    """The part of the last measured step that the next one is compared with.

    ``layout``: the sample's; None in what an earlier version has saved.
    """

    __slots__ = (*_TENSORS, "layout", "step")

    def __init__(
        self,
        step: int,
        before: Tensor,
        grad: Tensor,
        preconditioner: Tensor,
        feature_mean: Tensor | None,
        layout: tuple[tuple[int, int], ...] | None,
    ) -> None:
        self.step = step
        self.layout = layout
        self.before = before
        self.grad = grad
        self.preconditioner = preconditioner
        self.feature_mean = feature_mean

    def precedes(self, update: Update, step: int) -> bool:
        """Whether this is the step before, at the same coordinates: layers of one size may take turns."""
        return (
            self.step == step - 1
            and self.grad.shape == update.grad.shape
            and self.layout in (None, update.sample.layout)
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain types, every bit kept. Reads the tensors from their device: not for a hot path."""
        layout = None if self.layout is None else [[*of] for of in self.layout]
        return {"step": self.step, "layout": layout} | {
            name: None if (tensor := getattr(self, name)) is None else to_text(tensor) for name in _TENSORS
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> Memory:
        tensors = {name: None if state[name] is None else from_text(state[name], device) for name in _TENSORS}
        saved = state.get("layout")
        layout = None if saved is None else tuple((int(place), int(stride)) for place, stride in saved)
        return cls(int(state["step"]), **tensors, layout=layout)  # type: ignore[arg-type]


def step_statistics(
    update: Update,
    features: Tensor | None,
    feature_mean: Tensor | None,
    previous: Memory | None,
    step: int,
) -> tuple[dict[str, Tensor], Memory | None]:
    """Measure what one step did.

    Args:
        update: the tensors around the step.
        features: [n, d] features of some rows of the same step, or None.
        feature_mean: μ_G [d] of the same step, or None.
        previous: memory of the last measured step; used only if it is the step before this one.
        step: this optimizer step.

    Returns:
        Quantities by name as scalar tensors, and the memory for the next step.
    """
    values: dict[str, Tensor] = {}
    sample, grad = update.sample, update.grad
    moved = update.after - update.before
    values["gradient_norm"] = weight_norm.norm(grad, sample.weights)
    values["update_rms"] = weight_norm.norm(moved, sample.weights) / sample.total**0.5
    values["weight_norm"] = weight_norm.norm(update.after, sample.weights)
    values["relative_update"] = displacement.relative_update(moved, update.after, sample)

    memory = None
    if update.exp_avg_sq is not None:
        root = second_moment.root(update.exp_avg_sq, update.correction)
        per_tensor = second_moment.rms_t(grad, root, update.eps, sample)
        values["rms_t_max"] = per_tensor.amax()
        median = values["sqrt_exp_avg_sq_median"] = second_moment.median(root)
        values["sqrt_exp_avg_sq_mean"] = weight_norm.stratified_sum(root, sample.weights) / sample.total
        eps = update.eps
        if update.head_position is not None:
            span = slice(*sample.spans[update.head_position])
            eps = update.eps[span] if isinstance(update.eps, Tensor) else update.eps
            values["rms_t_head"] = per_tensor[update.head_position]
            median = values["head_sqrt_exp_avg_sq_median"] = second_moment.median(root[span])
            values["head_sqrt_exp_avg_sq_mean"] = root[span].mean()
        floor = eps.mean() if isinstance(eps, Tensor) else eps
        values["effective_learning_rate"] = second_moment.effective_learning_rate(update.lr, median, floor)
        preconditioner = root + update.eps
        if previous is not None and previous.precedes(update, step):
            values["secant_curvature"] = curvature.secant_curvature(
                update.before - previous.before,
                grad - previous.grad,
                previous.preconditioner,
                update.lr if update.lrs is None else update.lrs,
                sample.weights,
            )
            values["gradient_alignment"] = curvature.gradient_alignment(grad, previous.grad, sample.weights)
        memory = Memory(step, update.before, grad, preconditioner, feature_mean, sample.layout)

    if update.head_weight_update is not None and features is not None and len(features):
        weight_update = update.head_weight_update
        values["logit_displacement"], values["logit_displacement_rms"] = displacement.logit_displacement(
            weight_update, update.head_bias_update, features.to(weight_update.dtype)
        )
    if update.head_weight is not None:
        values["head_weight_norm"] = torch.linalg.vector_norm(
            update.head_weight, dtype=zero_sum.accumulation_dtype(update.head_weight.dtype)
        )
    consecutive = previous is not None and previous.step == step - 1
    values |= mean_statistics(
        update.head_weight,
        feature_mean,
        previous.feature_mean if previous is not None and consecutive else None,
    )
    if update.head_weight_grad is not None:
        values["zero_sum_violation_weight"] = zero_sum.weight_violation(update.head_weight_grad)
    if update.head_bias_grad is not None:
        values["zero_sum_violation_bias"] = zero_sum.bias_violation(update.head_bias_grad)
    if update.found_inf is not None:
        values[SKIPPED] = update.found_inf.reshape(())
    return values, memory


def mean_statistics(
    head_weight: Tensor | None, feature_mean: Tensor | None, previous_mean: Tensor | None
) -> dict[str, Tensor]:
    """The quantities of W_G and μ_G. ``head_weight`` [K, d] or None, ``feature_mean`` μ_G [d] or None,
    ``previous_mean`` that of the step before, or None."""
    values: dict[str, Tensor] = {}
    if head_weight is not None:
        several = head_weight.shape[0] > 1
        classifier_mean = global_means.classifier_mean(head_weight) if several else None
        if classifier_mean is not None:
            values["classifier_mean_norm"] = torch.linalg.vector_norm(classifier_mean)
        if feature_mean is not None and len(feature_mean) == head_weight.shape[1]:
            if classifier_mean is not None:
                values["mean_alignment"] = global_means.cosine(
                    classifier_mean, feature_mean.to(classifier_mean.dtype)
                )
            if previous_mean is not None:
                values["feature_displacement"] = displacement.feature_displacement(
                    head_weight, classifier_mean, feature_mean - previous_mean
                )
    if feature_mean is not None:
        values["feature_mean_norm"] = torch.linalg.vector_norm(feature_mean)
    return values


SKIPPED = "_found_inf"
"""Not a quantity: > 0 marks a step that a gradient scaler made the fused optimizer skip."""


def with_non_finite(values: dict[str, float]) -> dict[str, float]:
    """``values``, cosines without their rounding and, where gradients were read, whether they were finite."""
    if "gradient_norm" not in values:
        return values
    values = {**values, "non_finite_gradients": float(not math.isfinite(values["gradient_norm"]))}
    for name in ("mean_alignment", "gradient_alignment"):
        if name in values:
            values[name] = max(min(values[name], 1.0), -1.0)  # in this order NaN stays NaN
    return values
