"""Measure one optimizer step, as named 0-d tensors on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nfi_monitor.capture.update import Update
from nfi_monitor.measure import (
    curvature,
    declared,
    displacement,
    global_means,
    logit_scale,
    row_match,
    second_moment,
    weight_norm,
    zero_sum,
)
from nfi_monitor.measure.memory import Memory
from nfi_monitor.measure.views import StepView


def step_statistics(
    update: Update,
    features: Tensor | None,
    feature_mean: Tensor | None,
    previous: Memory | None,
    step: int,
) -> tuple[dict[str, Tensor], Memory | None]:
    """Measure what one optimizer step did.

    Args:
        update: the tensors around the step.
        features: [n, d] features of some rows of the same step, or None.
        feature_mean: μ_G [d] of the same step, or None.
        previous: the last measured step; used only if it is the step before this one.
        step: the number of this optimizer step.

    Returns:
        Quantities by name as scalar tensors, and the memory of this step for the comparison with the next.
    """
    sample = update.sample
    consecutive = previous is not None and previous.step == step - 1
    known = update.with_moments()
    comparable = previous if previous is not None and previous.precedes(known, step) else None
    same_coordinates = comparable if known.sample is sample else None
    view = StepView(update, update.after - update.before, features, feature_mean, same_coordinates)
    values: dict[str, Tensor] = {
        "gradient_norm": weight_norm.norm(update.grad, sample.weights),
        "update_rms": weight_norm.norm(view.moved, sample.weights) / sample.total**0.5,
        "weight_norm": weight_norm.norm(update.after, sample.weights),
        "relative_update": displacement.relative_update(view.moved, update.after, sample),
    }
    if update.gradients_left:
        values["predicted_reduction"] = weight_norm.predicted_reduction(
            update.grad, view.moved, sample.weights
        )
    memory, preconditioner = None, known.preconditioner
    if known.exp_avg_sq is not None:
        root = second_moment.root(known.exp_avg_sq, known.correction)
        values |= _of_second_moment(known, root)
        preconditioner = root + known.eps if preconditioner is None else preconditioner
    if known.gradients_left:
        if comparable is not None:
            values |= of_two_steps(known, comparable)
        rows = row_match.row_sketch_of(features)
        layout = known.sample.layout
        memory = Memory(step, known.before, known.grad, preconditioner, feature_mean, layout, rows)
        if consecutive and rows is not None and previous is not None and previous.rows is not None:
            values["row_match"] = row_match.row_match(rows, previous.rows)
    previous_mean = previous.feature_mean if previous is not None and consecutive else None
    values |= head_statistics(update, features, feature_mean, previous_mean)
    values |= declared.step_values(view)
    if update.found_inf is not None:
        values[SKIPPED] = update.found_inf.reshape(())
    return values, memory


def head_statistics(
    update: Update, features: Tensor | None, feature_mean: Tensor | None, previous_mean: Tensor | None
) -> dict[str, Tensor]:
    """Measure the head around the step, as scalar tensors by name.

    ``features`` [n, d] or None, ``feature_mean`` μ_G [d] or None, ``previous_mean`` μ_G of the step before,
    or None.
    """
    values: dict[str, Tensor] = {}
    if update.head_weight_update is not None and features is not None and len(features):
        moved = update.head_weight_update
        values["logit_displacement"], values["logit_displacement_rms"] = displacement.logit_displacement(
            moved, update.head_bias_update, features.to(moved.dtype)
        )
    if update.head_weight is not None:
        values["head_weight_norm"] = torch.linalg.vector_norm(
            update.head_weight, dtype=zero_sum.accumulation_dtype(update.head_weight.dtype)
        )
    return values | mean_statistics(update.head_weight, feature_mean, previous_mean)


def _of_second_moment(update: Update, root: Tensor) -> dict[str, Tensor]:
    """Measure all quantities that are computed from ``root``, sqrt(v̂) [C]."""
    sample, eps = update.sample, update.eps
    per_tensor = second_moment.rms_t(update.grad, root, eps, sample)
    values = {"rms_t_max": per_tensor.amax()}
    median = values["sqrt_exp_avg_sq_median"] = second_moment.median(root)
    values["sqrt_exp_avg_sq_mean"] = weight_norm.stratified_sum(root, sample.weights) / sample.total
    if update.head_position is not None:
        span = slice(*sample.spans[update.head_position])
        eps = update.eps[span] if isinstance(update.eps, Tensor) else update.eps
        values["rms_t_head"] = per_tensor[update.head_position]
        median = values["head_sqrt_exp_avg_sq_median"] = second_moment.median(root[span])
        values["head_sqrt_exp_avg_sq_mean"] = root[span].mean()
    floor = eps.mean() if isinstance(eps, Tensor) else eps
    values["effective_learning_rate"] = second_moment.effective_learning_rate(update.lr, median, floor)
    return values


def of_two_steps(update: Update, previous: Memory) -> dict[str, Tensor]:
    """Compare a step with the one before, at the same coordinates. Returns scalar tensors by name."""
    weights = update.sample.weights
    values = {"gradient_alignment": curvature.gradient_alignment(update.grad, previous.grad, weights)}
    if previous.preconditioner is not None:
        values["secant_curvature"] = curvature.secant_curvature(
            update.before - previous.before,
            update.grad - previous.grad,
            previous.preconditioner,
            update.lr if update.lrs is None else update.lrs,
            weights,
        )
    return values


def mean_statistics(
    head_weight: Tensor | None, feature_mean: Tensor | None, previous_mean: Tensor | None
) -> dict[str, Tensor]:
    """Measure W_G and μ_G, as scalar tensors by name.

    ``head_weight`` [K, d] or None, ``feature_mean`` μ_G [d] or None, ``previous_mean`` μ_G of the step
    before, or None.
    """
    values: dict[str, Tensor] = {}
    classifier_mean = None
    if head_weight is not None:
        several = head_weight.shape[0] > 1
        classifier_mean = global_means.classifier_mean(head_weight) if several else None
        shape = head_weight.shape[1:]
        if (
            feature_mean is not None
            and previous_mean is not None
            and previous_mean.shape == feature_mean.shape == shape
        ):
            values["feature_displacement"] = displacement.feature_displacement(
                head_weight, classifier_mean, feature_mean - previous_mean
            )
    return values | norms_of_means(classifier_mean, feature_mean)


def norms_of_means(classifier_mean: Tensor | None, feature_mean: Tensor | None) -> dict[str, Tensor]:
    """Measure W_G [d] and μ_G [d] alone, as scalar tensors by name; None: not known."""
    values: dict[str, Tensor] = {}
    if classifier_mean is not None:
        values["classifier_mean_norm"] = torch.linalg.vector_norm(classifier_mean)
    if feature_mean is not None:
        values["feature_mean_norm"] = torch.linalg.vector_norm(feature_mean)
    if classifier_mean is not None and feature_mean is not None and len(feature_mean) == len(classifier_mean):
        values["mean_alignment"] = global_means.cosine(
            classifier_mean, feature_mean.to(classifier_mean.dtype)
        )
    return values


SKIPPED = "_found_inf"
"""No quantity: > 0 marks a step that the fused optimizer skipped because of a gradient scaler."""


def with_non_finite(values: dict[str, float]) -> dict[str, float]:
    """Return ``values``, cosines clamped to [−1, 1], with "non_finite_gradients" if gradients were read.

    Displacements are in nats of the loss, also where its logits are multiples of the head's.
    """
    values = logit_scale.in_nats(values)
    if "gradient_norm" not in values:
        return values
    values = {**values, "non_finite_gradients": float(not math.isfinite(values["gradient_norm"]))}
    for name in ("mean_alignment", "gradient_alignment", "row_match"):
        if name in values:
            values[name] = max(min(values[name], 1.0), -1.0)  # in this order NaN stays NaN
    return values
