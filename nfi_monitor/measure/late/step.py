"""Measure one optimizer step: sums over coordinates on the device, the quantities on the host, later.

The results are those of :func:`nfi_monitor.measure.step.step_statistics`, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nfi_monitor.capture.sampling import Bins, CoordinateSample
from nfi_monitor.capture.update import Update
from nfi_monitor.measure import declared, displacement, row_match, second_moment, zero_sum
from nfi_monitor.measure import step as eager
from nfi_monitor.measure.late.packing import Late
from nfi_monitor.measure.memory import Memory
from nfi_monitor.measure.views import StepView

Arrived = Mapping[str, Tensor]
"""Tensors by name, on the host."""
_HERE = {
    "zero_sum_violation_weight": "nfi_monitor.measure.zero_sum:violation_of_head_weight",
    "zero_sum_violation_bias": "nfi_monitor.measure.zero_sum:violation_of_head_bias",
}
"""Declared functions whose sums are made here."""


def late_step(
    update: Update,
    features: Tensor | None,
    feature_mean: Tensor | None,
    previous: Memory | None,
    step: int,
) -> tuple[Late[dict[str, float]], Memory | None]:
    """Reduce one optimizer step. The arguments are those of :func:`nfi_monitor.measure.step.step_statistics`.

    Returns the numbers to send to the host, and the memory of this step for the comparison with the next.
    """
    known = update.with_moments()
    before = previous if previous is not None and previous.step == step - 1 else None
    comparable = before if before is not None and before.precedes(known, step) else None
    if not known.gradients_left:
        comparable = None
    old_mean = None if before is None else before.feature_mean
    moved = _Moved.of(update, known, comparable, feature_mean, old_mean)
    parts: dict[str, Tensor] = {}
    finishers: list[Callable[[Arrived], dict[str, float]]] = []
    memory, root, preconditioner = None, None, known.preconditioner
    if known.exp_avg_sq is not None:
        root = second_moment.root(known.exp_avg_sq, known.correction)
        preconditioner = root + known.eps if preconditioner is None else preconditioner
        finishers.append(_take_medians(parts, known, root))
    finishers.append(_add_up(parts, update, known, moved, root, comparable))
    if known.gradients_left:
        rows = row_match.row_sketch_of(features)
        memory = Memory(
            step, known.before, known.grad, preconditioner, feature_mean, known.sample.layout, rows
        )
        if rows is not None and before is not None and before.rows is not None:
            parts |= {"rows": rows, "old_rows": before.rows}
            finishers.append(lambda on: {"row_match": float(row_match.row_match(on["rows"], on["old_rows"]))})
    finishers.append(_around_head(parts, update, features, feature_mean, moved.mean))
    finishers.append(_declared(parts, update, features, feature_mean, moved, comparable))

    def finish(arrived: Arrived) -> dict[str, float]:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return {name: value for make in finishers for name, value in make(arrived).items()}

    return Late("optimizer", parts, finish), memory


class _Moved(NamedTuple):
    """Differences, made in one launch: of weights; since the step before, of weights, gradients and μ_G."""

    weights: Tensor
    stepped: Tensor | None
    gradient: Tensor | None
    mean: Tensor | None

    @classmethod
    def of(
        cls,
        update: Update,
        known: Update,
        previous: Memory | None,
        mean: Tensor | None,
        old_mean: Tensor | None,
    ) -> _Moved:
        pairs = [(update.after, update.before)]
        if previous is not None:
            pairs += [(known.before, previous.before), (known.grad, previous.grad)]
        means = mean is not None and old_mean is not None and mean.shape == old_mean.shape
        if means and mean is not None and old_mean is not None:
            pairs.append((mean, old_mean))
        found = torch._foreach_sub([new for new, _ in pairs], [old for _, old in pairs])
        stepped, gradient = (found[1], found[2]) if previous is not None else (None, None)
        return cls(found[0], stepped, gradient, found[-1] if means else None)


def _add_up(
    parts: dict[str, Tensor],
    update: Update,
    known: Update,
    moved: _Moved,
    root: Tensor | None,
    previous: Memory | None,
) -> Callable[[Arrived], dict[str, float]]:
    """Add up products over the coordinates of all tensors. ``root``: sqrt(v̂) of those that have one, [M]."""
    pairs = {
        "gradient": (update.grad, update.grad),
        "moved": (moved.weights, moved.weights),
        "weight": (update.after, update.after),
        "along": (update.grad, moved.weights),
    }
    of_moments = _pairs_of_moments(known, moved, root, previous)
    if known is update:
        of_moments.pop("gradient_now", None)  # it is "gradient"
    every = {**pairs, **of_moments}
    left, right = ([pair[side] for pair in every.values()] for side in (0, 1))
    products = dict(zip(every, torch._foreach_mul(left, right), strict=True))
    apart = {} if known is update else {name: products.pop(name) for name in of_moments}
    if root is not None:
        (products if known is update else apart)["root"] = root
    bins: dict[str, tuple[Bins, CoordinateSample, list[str]]] = {}
    for name, rows, sample in (("sums", products, update.sample), ("moment_sums", apart, known.sample)):
        if rows:
            parts[name], of = sample.in_bins(torch.stack(list(rows.values())))
            bins[name] = of, sample, list(rows)
    if isinstance(update.lr, Tensor):
        parts["lr"] = update.lr
    lr = math.nan if isinstance(update.lr, Tensor) else update.lr
    own_rates, head = known.lrs is not None, known.head_position
    whole, leading, gradients_left = update.sample, known.sample, update.gradients_left

    def finish(on: Arrived) -> dict[str, float]:
        found: dict[str, Any] = {}
        total: dict[str, Any] = {}
        for name, (of, sample, names) in bins.items():
            sums = of.per_tensor(on[name])
            found |= zip(names, sums, strict=True)
            total |= zip(names, sums @ np.array(sample.rates), strict=True)
        total.setdefault("gradient_now", total["gradient"])
        rate = 1.0 if own_rates else float(on["lr"]) if "lr" in on else lr
        values = _finish_sums(found, total, whole, leading, rate, head)
        return values | ({"predicted_reduction": -float(total["along"])} if gradients_left else {})

    return finish


def _pairs_of_moments(
    known: Update, moved: _Moved, root: Tensor | None, previous: Memory | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors of what is added up for the second moment, and to compare two steps."""
    of_moments: dict[str, tuple[Tensor, Tensor]] = {}
    if root is not None:
        ratio = known.grad / root.clamp_min(known.eps)
        of_moments["ratio"] = (ratio, ratio)
    if previous is not None and moved.stepped is not None and moved.gradient is not None:
        if previous.preconditioner is not None:
            stepped, scaled = moved.stepped, previous.preconditioner * moved.stepped
            if known.lrs is not None:
                still = known.lrs == 0
                stepped = stepped.masked_fill(still, 0.0)
                scaled = (scaled / known.lrs).masked_fill(still, 0.0)
            of_moments |= {"step_change": (stepped, moved.gradient), "step_metric": (stepped, scaled)}
        of_moments |= {
            "gradient_now": (known.grad, known.grad),
            "gradient_both": (known.grad, previous.grad),
            "gradient_before": (previous.grad, previous.grad),
        }
    return of_moments


def _finish_sums(
    found: dict[str, Any],
    total: dict[str, Any],
    sample: CoordinateSample,
    known: CoordinateSample,
    lr: float,
    head: int | None,
) -> dict[str, float]:
    """Turn sums into quantities. ``found``: for each tensor, [T] or those with a second moment; ``total``."""
    ratios = np.sqrt(found["moved"] / np.maximum(found["weight"], 1e-30))
    values = {
        "gradient_norm": np.sqrt(total["gradient"]),
        "update_rms": np.sqrt(total["moved"] / sample.total),
        "weight_norm": np.sqrt(total["weight"]),
        "relative_update": np.where(sample.are_matrices, ratios, 0.0).max(),
    }
    if "root" in found:
        sizes = np.array([end - start for start, end in known.spans])
        rms = np.sqrt(found["ratio"] / sizes)
        values["rms_t_max"] = rms.max()
        values["sqrt_exp_avg_sq_mean"] = total["root"] / known.total
        if head is not None:
            values["rms_t_head"] = rms[head]
            values["head_sqrt_exp_avg_sq_mean"] = found["root"][head] / sizes[head]
    if "step_change" in found:
        values["secant_curvature"] = lr * total["step_change"] / total["step_metric"]
    if "gradient_both" in found:
        norms = np.sqrt(total["gradient_now"]) * np.sqrt(total["gradient_before"])
        values["gradient_alignment"] = total["gradient_both"] / np.maximum(norms, 1e-37)
    return {name: float(value) for name, value in values.items()}


def _take_medians(
    parts: dict[str, Tensor], known: Update, root: Tensor
) -> Callable[[Arrived], dict[str, float]]:
    """Send a few entries of sqrt(v̂) [M], whose median the host finds."""
    parts["roots"], eps = second_moment.few(root), known.eps
    if known.head_position is not None:
        span = slice(*known.sample.spans[known.head_position])
        parts["head_roots"] = second_moment.few(root[span])
        eps = eps[span] if isinstance(eps, Tensor) else eps
    if isinstance(eps, Tensor):
        parts["eps"] = eps.mean()
    lr, floor = known.lr, 0.0 if isinstance(eps, Tensor) else eps

    def finish(on: Arrived) -> dict[str, float]:
        median = on["roots"].median()
        values = {"sqrt_exp_avg_sq_median": median}
        if "head_roots" in on:
            median = values["head_sqrt_exp_avg_sq_median"] = on["head_roots"].median()
        values["effective_learning_rate"] = second_moment.effective_learning_rate(
            on.get("lr", lr), median, on.get("eps", floor)
        )
        return {name: float(value) for name, value in values.items()}

    return finish


def _around_head(
    parts: dict[str, Tensor],
    update: Update,
    features: Tensor | None,
    mean: Tensor | None,
    moved_mean: Tensor | None,
) -> Callable[[Arrived], dict[str, float]]:
    """Reduce the head around the step: what :func:`nfi_monitor.measure.step.head_statistics` measures."""
    weight, moved = update.head_weight, update.head_weight_update
    if moved is not None and features is not None and len(features):
        parts |= displacement.logit_moments(moved, update.head_bias_update, features.to(moved.dtype))
    if weight is not None:
        dtype = zero_sum.accumulation_dtype(weight.dtype)
        parts["head_norm"] = torch.linalg.vector_norm(weight, dtype=dtype)
        if len(weight) > 1:
            parts["classifier_mean"] = weight.mean(0, dtype=dtype)
        if moved_mean is not None and len(moved_mean) == weight.shape[1]:
            by_features = (weight @ moved_mean.to(weight.dtype)).to(dtype)
            parts |= dict(zip(("lowest_moved", "highest_moved"), by_features.aminmax(), strict=True))
            parts["moved_mean"] = moved_mean
    if mean is not None:
        parts["feature_mean"] = mean
    several = moved is not None and len(moved) > 1

    def finish(on: Arrived) -> dict[str, float]:
        values: dict[str, Tensor] = {}
        if "logit_variances" in on:
            values |= displacement.of_logit_moments(on, several=several)
        if "head_norm" in on:
            values["head_weight_norm"] = on["head_norm"]
        if "moved_mean" in on:
            shift: Tensor | float = 0.0
            if "classifier_mean" in on:
                shift = on["classifier_mean"] @ on["moved_mean"].to(on["classifier_mean"].dtype)
            values["feature_displacement"] = torch.maximum(
                on["highest_moved"] - shift, shift - on["lowest_moved"]
            )
        values |= eager.norms_of_means(on.get("classifier_mean"), on.get("feature_mean"))
        return {name: float(value) for name, value in values.items()}

    return finish


def _declared(
    parts: dict[str, Tensor],
    update: Update,
    features: Tensor | None,
    mean: Tensor | None,
    moved: _Moved,
    previous: Memory | None,
) -> Callable[[Arrived], dict[str, float]]:
    """Reduce the head's gradients; call functions that are declared elsewhere as they are."""
    others: dict[str, str] = {}
    for name, path in declared.OF_STEP.items():
        if _HERE.get(name) != path:
            others[name] = path
        elif name == "zero_sum_violation_weight" and update.head_weight_grad is not None:
            dtype = zero_sum.accumulation_dtype(update.head_weight_grad.dtype)
            parts["signed"] = update.head_weight_grad.sum(0, dtype=dtype)
            parts["absolute"] = torch.linalg.vector_norm(update.head_weight_grad, 1, dtype=dtype)
        elif name == "zero_sum_violation_bias" and update.head_bias_grad is not None:
            parts["bias"] = update.head_bias_grad
    if others:
        view = StepView(update, moved.weights, features, mean, previous)
        parts |= {f"declared {name}": value for name, value in declared.step_values(view, others).items()}
    if update.found_inf is not None:
        parts[f"declared {eager.SKIPPED}"] = update.found_inf

    def finish(on: Arrived) -> dict[str, float]:
        values = {
            name.removeprefix("declared "): value
            for name, value in on.items()
            if name.startswith("declared ")
        }
        if "signed" in on:
            signed = on["signed"].abs().sum()
            values["zero_sum_violation_weight"] = zero_sum.row_violation(signed, on["absolute"])
        if "bias" in on:
            values["zero_sum_violation_bias"] = zero_sum.bias_violation(on["bias"])
        return {name: float(value) for name, value in values.items()}

    return finish
