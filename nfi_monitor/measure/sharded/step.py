"""Measure a step of a model whose tensors are cut over ranks: partial sums of each rank, and their result.

Each rank measures its own shard (FSDP2, HSDP, tensor parallel).  Sums over coordinates, over tensors and over
the classes of the head are added.  The largest and the smallest value are kept apart.  If several ranks hold
the same part of a tensor, it counts with the share 1/replicas on each.  This module does not communicate.

Two things cannot be computed from one exchange.  They are close to what one process measures:

* A median over coordinates is the average of the ranks' medians, weighted by their coordinates.
* The logit displacement needs rows and classes together, and a rank has only some of both.  It is measured at
  feature rows that the last exchange made known to all ranks (``probe rows``).  The same holds for Δμ_G in
  the feature displacement.  If all ranks have the same rows (tensor parallel), both are those of the step
  itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nfi_monitor.capture import devices
from nfi_monitor.capture.update import Update
from nfi_monitor.measure import second_moment
from nfi_monitor.measure.memory import Memory
from nfi_monitor.measure.zero_sum import accumulation_dtype

STEP_SUMS = (
    "gradient", "moved", "along", "reached", "weight", "coordinates", "moment_coordinates", "roots",
    "medians", "eps", "head_coordinates", "head_roots", "head_medians", "head_eps",
    "compared", "curved", "step_change", "step_metric", "gradient_now", "gradient_both", "gradient_before",
)  # fmt: skip
"""Sums over coordinates; medians and ε_A are weighted by their number of coordinates."""
TENSOR_SUMS = ("ratio", "sampled", "moved", "weight")
"""Sums over the coordinates of each tensor: Σ g²/max(v̂, ε_A²), their number, Σ Δw², Σ w²."""
HEAD_RANKS = ("weight_ranks", "grad_ranks", "bias_ranks", "update_ranks", "moved_ranks")
"""Number of ranks that measured the head's weight, its gradient, the bias's gradient, the update, and the
effect of Δμ_G. A quantity is absent if fewer than all ranks have measured it.
"""
HEAD_SUMS = (*HEAD_RANKS, "squares", "absolute", "bias_signed", "bias_absolute", "moved", "classes")
"""``HEAD_RANKS``, and sums over the classes of a rank; ``classes``: those sampled for the displacement."""


class StepParts(NamedTuple):
    """float64: ``sums`` [len(STEP_SUMS)], ``tensors`` [len(TENSOR_SUMS), T]."""

    sums: Tensor
    tensors: Tensor


def step_parts(
    update: Update,
    positions: Sequence[int],
    shares: Sequence[float],
    tensors: int,
    previous: Memory | None,
    step: int,
) -> tuple[StepParts, Memory | None]:
    """Measure this rank's part of one optimizer step.

    ``positions``: which of the model's ``tensors`` each tensor of the sample is.  ``shares``: for each of
    them, 1 over the number of ranks that hold the same part of it.
    """
    sample = update.sample
    device = update.grad.device
    share = devices.send(shares, device, torch.float64)[sample.segments]
    rate = share if sample.weights is None else share * sample.weights
    grad, after = update.grad.double(), update.after.double()
    moved = after - update.before.double()
    filled: dict[str, Tensor] = {
        "gradient": torch.dot(rate, grad * grad),
        "moved": torch.dot(rate, moved * moved),
        "along": torch.dot(rate, grad * moved),
        "reached": rate.sum() * update.gradients_left,
        "weight": torch.dot(rate, after * after),
        "coordinates": rate.sum(),
    }
    rows = [torch.zeros_like(grad), share, share * moved * moved, share * after * after]
    known, memory = update.with_moments(), None
    end, divided_by = len(known.grad), known.preconditioner
    if known.exp_avg_sq is not None:
        root = second_moment.root(known.exp_avg_sq.double(), known.correction)
        eps = devices.send(known.eps, device, torch.float64).expand(end)
        ratio = known.grad.double() / root.clamp_min(known.eps)
        rows[0][:end] = share[:end] * ratio * ratio
        filled |= _of_roots("", root, eps, rate[:end])
        if known.head_position is not None:
            span = slice(*sample.spans[known.head_position])
            filled |= _of_roots("head_", root[span], eps[span], rate[span])
        divided_by = root + known.eps if divided_by is None else divided_by
    if known.gradients_left:
        if previous is not None and previous.precedes(known, step):
            filled |= _of_two_steps(known, previous, rate[:end])
        memory = Memory(step, known.before, known.grad, divided_by, None, known.sample.layout)
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    where = devices.send(list(positions), device)[sample.segments]
    summed = torch.zeros(len(TENSOR_SUMS), tensors, dtype=torch.float64, device=device)
    summed.index_add_(1, where, torch.stack(rows))
    return StepParts(torch.stack([filled.get(name, nothing) for name in STEP_SUMS]), summed), memory


def _of_two_steps(update: Update, previous: Memory, rate: Tensor) -> dict[str, Tensor]:
    """Return the sums over coordinates that compare a step with the one before. ``rate``: [C]."""
    grad, earlier = update.grad.double(), previous.grad.double()
    values = {
        "compared": rate.sum(),
        "gradient_now": torch.dot(rate, grad * grad),
        "gradient_both": torch.dot(rate, grad * earlier),
        "gradient_before": torch.dot(rate, earlier * earlier),
    }
    if previous.preconditioner is None:
        return values
    stepped = (update.before - previous.before).double()
    scaled = previous.preconditioner * stepped
    if update.lrs is not None:  # later, the sums are multiplied by the head's rate
        rates = update.lrs.double()
        still = rates == 0
        stepped = stepped.masked_fill(still, 0.0)
        scaled = (scaled * (update.lr / rates)).masked_fill(still, 0.0)
    return values | {
        "curved": rate.sum(),
        "step_change": torch.dot(rate * stepped, grad - earlier),
        "step_metric": torch.dot(rate * stepped, scaled),
    }


def _of_roots(of: str, root: Tensor, eps: Tensor, rate: Tensor) -> dict[str, Tensor]:
    weight = rate.sum()
    return {
        f"{of or 'moment_'}coordinates": weight,
        f"{of}roots": torch.dot(rate, root),
        f"{of}medians": second_moment.median(root) * weight,
        f"{of}eps": torch.dot(rate, eps),
    }


def finish_step(
    sums: Tensor, tensors: Tensor, matrices: Sequence[bool], head: int | None, lr: float
) -> dict[str, float]:
    """Turn sums over all ranks into quantities by name.

    ``matrices`` [T]: which tensors have two dimensions or more.  ``head``: which of them the head's weight
    is.
    """
    s = dict(zip(STEP_SUMS, sums.tolist(), strict=True))
    if not s["coordinates"] > 0:
        return {}
    values = {
        "gradient_norm": math.sqrt(s["gradient"]) if s["gradient"] >= 0 else math.nan,
        "update_rms": _root(s["moved"] / s["coordinates"]),
        "weight_norm": _root(s["weight"]),
    }
    if s["reached"] >= s["coordinates"]:
        values["predicted_reduction"] = -s["along"]
    moved, weight = tensors[2:]
    relative = (moved / weight.clamp_min(1e-30)).sqrt()[torch.tensor(list(matrices))]
    if len(relative):
        values["relative_update"] = float(relative.amax())
    return values | _of_moments(s, tensors, head, lr) | _of_compared(s, lr)


def _of_moments(s: Mapping[str, float], tensors: Tensor, head: int | None, lr: float) -> dict[str, float]:
    """Return what is known of the second moment; nothing if no rank has one."""
    if not s["moment_coordinates"] > 0:
        return {}
    ratio, sampled = tensors[:2]
    values: dict[str, float] = {}
    rms = (ratio / sampled).sqrt()[sampled > 0]
    values["rms_t_max"] = float(rms.amax())
    values["sqrt_exp_avg_sq_median"] = s["medians"] / s["moment_coordinates"]
    values["sqrt_exp_avg_sq_mean"] = s["roots"] / s["moment_coordinates"]
    median, eps = values["sqrt_exp_avg_sq_median"], s["eps"] / s["moment_coordinates"]
    if head is not None and s["head_coordinates"] > 0:
        values["rms_t_head"] = _root(float(ratio[head] / sampled[head]))
        median = values["head_sqrt_exp_avg_sq_median"] = s["head_medians"] / s["head_coordinates"]
        values["head_sqrt_exp_avg_sq_mean"] = s["head_roots"] / s["head_coordinates"]
        eps = s["head_eps"] / s["head_coordinates"]
    if math.isfinite(lr) and median + eps > 0:
        values["effective_learning_rate"] = lr / (median + eps)
    return values


def _of_compared(s: Mapping[str, float], lr: float) -> dict[str, float]:
    """Return what two neighbouring steps show."""
    values: dict[str, float] = {}
    if s["curved"] > 0:
        metric = s["step_metric"]
        values["secant_curvature"] = lr * s["step_change"] / metric if metric else math.nan
    if s["compared"] > 0:
        norms = _root(s["gradient_now"]) * _root(s["gradient_before"])
        values["gradient_alignment"] = s["gradient_both"] / max(norms, 1e-37)
    return values


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan


class HeadParts(NamedTuple):
    """The head, over the classes of one rank, float64.

    ``sums`` [len(HEAD_SUMS)].  ``classifier`` Σ_k W_k [d].  ``columns`` Σ_k ∂L/∂W_k over sampled columns [c].
    ``displaced`` Σ_k x and Σ_k x² [2, m] of x_k = ΔW_k·h + Δb_k at m probe rows.  ``extremes`` max and −min
    over the classes [2, m + 1] of x; the last column is that of W_k·Δμ_G.
    """

    sums: Tensor
    classifier: Tensor
    columns: Tensor
    displaced: Tensor
    extremes: Tensor


def head_parts(
    update: Update,
    share: float,
    widths: tuple[int, int, int],
    probe_rows: Tensor | None,
    moved_mean: Tensor | None,
) -> HeadParts:
    """Measure this rank's part of the head.

    ``share``: 1 over the number of ranks that hold the same classes.  ``widths``: (d, c, m).  ``probe_rows``
    [≤ m, d] features and ``moved_mean`` Δμ_G [d], each the same on all ranks, or None.
    """
    d, c, m = widths
    device = update.grad.device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    sums = dict.fromkeys(HEAD_SUMS, zeros())
    one = torch.ones((), dtype=torch.float64, device=device)
    classifier, columns, displaced = zeros(d), zeros(c), zeros(2, m)
    extremes = torch.full((2, m + 1), -torch.inf, dtype=torch.float64, device=device)
    if update.head_weight is not None:
        # Not in float64: a float64 copy of a large head would be the largest tensor of all.
        weight, dtype = update.head_weight, accumulation_dtype(update.head_weight.dtype)
        sums["weight_ranks"] = one
        sums["squares"] = torch.linalg.vector_norm(weight, dtype=dtype).double().square() * share
        classifier = weight.sum(0, dtype=dtype).double() * share
        if moved_mean is not None:
            sums["moved_ranks"] = one
            logits = (weight @ devices.send(moved_mean, weight.device, weight.dtype)).double()
            sums["moved"] = logits.sum() * share
            if len(weight):
                extremes[:, m] = torch.stack([logits.amax(), (-logits).amax()])
    if update.head_weight_grad is not None:
        grad = update.head_weight_grad
        sums["grad_ranks"] = one
        columns = columns + torch.nn.functional.pad(
            grad.sum(0, dtype=torch.float64) * share, (0, c - grad.shape[1])
        )
        sums["absolute"] = grad.abs().sum(dtype=torch.float64) * share
    if update.head_bias_grad is not None:
        sums["bias_ranks"] = one
        sums["bias_signed"] = update.head_bias_grad.sum(dtype=torch.float64) * share
        sums["bias_absolute"] = update.head_bias_grad.abs().sum(dtype=torch.float64) * share
    if update.head_weight_update is not None and probe_rows is not None:
        moved = update.head_weight_update.double() @ devices.send(probe_rows, device, torch.float64).mT
        if update.head_bias_update is not None:
            moved = moved + update.head_bias_update.double().unsqueeze(-1)
        n = moved.shape[1]
        displaced[:, :n] = torch.stack([moved.sum(0), moved.square().sum(0)]) * share
        sums["update_ranks"], sums["classes"] = one, one * len(moved) * share
        if len(moved):
            extremes[:, :n] = torch.stack([moved.amax(0), (-moved).amax(0)])
    return HeadParts(
        torch.stack([sums[name] for name in HEAD_SUMS]), classifier, columns, displaced, extremes
    )


def finish_head(
    parts: HeadParts,
    outputs: int,
    world: int,
    feature_mean: Tensor | None,
    rows: int,
    *,
    moved: bool,
    tied: bool,
) -> dict[str, float]:
    """Turn sums over all ranks (``extremes``: the largest) into quantities by name.

    ``outputs`` K.  ``rows``: number of probe rows that were known.  ``moved``: whether Δμ_G was known.  A
    quantity is absent unless all ``world`` ranks have measured it: a part of the classes has no meaning.
    """
    s = dict(zip(HEAD_SUMS, parts.sums.tolist(), strict=True))
    values: dict[str, float] = {}
    several = outputs > 1
    m = parts.displaced.shape[1]
    if s["weight_ranks"] == world:
        values["head_weight_norm"] = _root(s["squares"])
        if several:
            mean = parts.classifier / outputs
            values["classifier_mean_norm"] = float(torch.linalg.vector_norm(mean))
            if feature_mean is not None:
                norms = torch.linalg.vector_norm(mean) * torch.linalg.vector_norm(feature_mean)
                values["mean_alignment"] = float(torch.dot(mean, feature_mean.to(mean)) / norms)
        if moved and s["moved_ranks"] == world:
            centre = s["moved"] / outputs if several else 0.0
            largest, smallest = parts.extremes[:, m].tolist()
            values["feature_displacement"] = max(largest - centre, smallest + centre)
    if several and not tied:
        if s["grad_ranks"] == world and s["absolute"] > 0:
            signed = float(parts.columns.abs().sum())
            values["zero_sum_violation_weight"] = min(signed / s["absolute"], 1.0)
        if s["bias_ranks"] == world and s["bias_absolute"] > 0:
            values["zero_sum_violation_bias"] = min(abs(s["bias_signed"]) / s["bias_absolute"], 1.0)
    classes = s["classes"]
    if rows and s["update_ranks"] == world and classes > 0:
        sums, squares = parts.displaced[0, :rows], parts.displaced[1, :rows]
        centres = sums / classes if several else torch.zeros_like(sums)
        most = torch.maximum(parts.extremes[0, :rows] - centres, parts.extremes[1, :rows] + centres)
        values["logit_displacement"] = float(most.amax())
        spread = (squares - classes * centres.square()).clamp_min(0.0).sum() / (classes * rows)
        values["logit_displacement_rms"] = float(spread.sqrt())
    return values
