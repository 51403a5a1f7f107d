"""Every measured quantity once more, from its definition, with labels, in float64 or mpmath.

Nothing here imports from ``nfi_monitor``.  Slow on purpose: loops instead of tricks, so that a mistake
in a trick cannot be made twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Unit roundoff: half the distance between 1 and the next number."""

# (dtype of the logits, dtype the loss is computed in)
PAIRS = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)


def effective(pair: tuple[torch.dtype, torch.dtype]) -> torch.dtype:
    """The coarser of the two: what the gradient's rounding looks like."""
    return max(pair, key=lambda dtype: UNIT[dtype])


# --- losses ----------------------------------------------------------------------------------------

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


def label_smoothing(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, label_smoothing=0.1)


def class_weights(z: Tensor, y: Tensor) -> Tensor:
    weight = torch.linspace(0.25, 4.0, z.shape[-1], dtype=z.dtype)
    return F.cross_entropy(z, y, weight=weight)


def focal(z: Tensor, y: Tensor) -> Tensor:
    log_p = F.log_softmax(z, -1).gather(-1, y[:, None])[:, 0]
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def distillation(z: Tensor, y: Tensor) -> Tensor:
    """KL to a teacher that is sure of the label, temperature 2."""
    teacher = torch.zeros(z.shape, dtype=torch.float64)
    teacher.scatter_(-1, y[:, None], 3.0)
    teacher += torch.linspace(0, 1, z.shape[-1], dtype=torch.float64)
    return F.kl_div(F.log_softmax(z / 2, -1), (teacher / 2).softmax(-1).to(z.dtype), reduction="batchmean")


def soft_targets(z: Tensor, y: Tensor) -> Tensor:
    """Mixup: 80% label, 20% the next class."""
    target = torch.zeros(z.shape, dtype=torch.float64)
    target.scatter_add_(-1, y[:, None], torch.full((len(y), 1), 0.8, dtype=torch.float64))
    target.scatter_add_(-1, (y[:, None] + 1) % z.shape[-1], torch.full((len(y), 1), 0.2, dtype=torch.float64))
    return F.cross_entropy(z, target.to(z.dtype))


def by_hand(z: Tensor, y: Tensor) -> Tensor:
    """What people write when they do not know F.cross_entropy."""
    return (z.logsumexp(-1) - z.gather(-1, y[:, None])[:, 0]).mean()


def z_loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + 1e-3 * z.logsumexp(-1).square().mean()


def squared_error(z: Tensor, y: Tensor) -> Tensor:
    return (z - F.one_hot(y, z.shape[-1]).to(z.dtype)).square().mean()


def one_against_rest(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, F.one_hot(y, z.shape[-1]).to(z.dtype))


def soft_capped(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(30 * torch.tanh(z / 30), y)


SHIFT_INVARIANT = (
    cross_entropy, label_smoothing, class_weights, focal, distillation, soft_targets, by_hand,
)  # fmt: skip
NOT_SHIFT_INVARIANT = (z_loss, squared_error, one_against_rest, soft_capped)


def gradients(
    logits: Tensor,
    targets: Tensor,
    pair: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    loss: Loss = cross_entropy,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Real ∂L/∂z from autograd, and the logits, both in the logits' dtype."""
    z = logits.detach().to(pair[0]).requires_grad_()
    (loss(z.to(pair[1]), targets) * scale).backward()
    assert z.grad is not None
    return z.grad, z.detach()


def loss_scale(pair: tuple[torch.dtype, torch.dtype], rows: int) -> float:
    """What a gradient scaler is there for: float16 gradients of a mean over rows far above the underflow."""
    return 256.0 * rows if torch.float16 in pair else 1.0


# --- inputs ----------------------------------------------------------------------------------------


def make_logits(
    seed: int, rows: int, classes: int, *, spread: float, margins: tuple[float, float], shift: float = 0.0
) -> tuple[Tensor, Tensor]:
    """float64 logits whose label leads by a margin drawn from ``margins`` (negative: misclassified).

    ``spread`` 0 ties all competitors.
    """
    random = np.random.default_rng(seed)
    z = random.standard_normal((rows, classes)) * spread
    y = random.integers(classes, size=rows)
    z[np.arange(rows), y] = -np.inf
    z[np.arange(rows), y] = z.max(-1) + random.uniform(*margins, size=rows)
    return torch.from_numpy(z + shift), torch.from_numpy(y)


# --- rows ------------------------------------------------------------------------------------------


@dataclass
class RowTruth:
    """What is true of one row, from its gradient, its logits and its label."""

    kind: str  # live | underflowed | ignored | non_finite
    absorbed: bool
    signed: float
    absolute: float
    residual: float
    loss: float
    margin: float
    max_probability: float
    mean_logit: float
    negatives: int = 0

    @property
    def violation(self) -> float:
        return min(abs(self.signed) / self.absolute, 1.0) if self.absolute else 0.0

    @property
    def counts(self) -> bool:
        return self.kind in ("live", "underflowed")


def row_truth(grad: Tensor, logits: Tensor, target: int) -> RowTruth:
    """``grad`` and ``logits`` [K] of one row: mpmath for few classes, math.fsum for many."""
    g, z = grad.double().tolist(), logits.double().tolist()
    if not all(map(math.isfinite, g)) or any(math.isnan(x) or x == math.inf for x in z):
        return RowTruth("non_finite", False, *[math.nan] * 7)
    silent = all(x == 0 for x in g)
    # Softmax statistics of a row without a label are never asked for.
    r = target if target != IGNORED else max(range(len(z)), key=z.__getitem__)
    others = [x for k, x in enumerate(z) if k != r]
    residual, loss = softmax_truth(z[r], others)
    return RowTruth(
        kind="live" if not silent else ("ignored" if target == IGNORED else "underflowed"),
        absorbed=not silent and g[r] == 0,
        signed=math.fsum(g),
        absolute=math.fsum(map(abs, g)),
        residual=residual,
        loss=loss,
        margin=z[r] - max(others),
        max_probability=max_probability(z),
        mean_logit=math.fsum(z) / len(z),
        negatives=sum(x < 0 for x in g),
    )


def softmax_truth(own: float, others: list[float]) -> tuple[float, float]:
    """(ε, −ln p_r): the residual mass and the loss."""
    if len(others) <= 64:
        with mpmath.workdps(80):
            rest = mpmath.fsum(mpmath.exp(mpmath.mpf(x) - mpmath.mpf(own)) for x in others)
            return float(rest / (1 + rest)), float(mpmath.log1p(rest))
    top = max(max(others), own)
    rest, mine = math.fsum(math.exp(x - top) for x in others), math.exp(own - top)
    if mine == 0:
        return 1.0, top - own + math.log(rest)
    return rest / (rest + mine), math.log1p(rest / mine)


def max_probability(z: list[float]) -> float:
    top = max(z)
    return 1.0 / math.fsum(math.exp(x - top) for x in z)


def lower_median(values: list[float]) -> float:
    """The smaller of the two middle ones, as torch.median has it."""
    return sorted(values)[(len(values) - 1) // 2]


def batch_truth(truths: list[RowTruth]) -> dict[str, float]:
    """The quantities by name, from the rows' truths. A quantity that no row shows is left out."""
    live = [row for row in truths if row.kind == "live"]
    counted = [row for row in truths if row.counts]
    values = {
        "live_fraction": len(live) / len(truths),
        "ignored_fraction": sum(row.kind == "ignored" for row in truths) / len(truths),
        "non_finite_rows": float(sum(row.kind == "non_finite" for row in truths)),
    }
    if counted:
        values["underflowed_fraction"] = (len(counted) - len(live)) / len(counted)
        values["head_loss"] = _mean(row.loss for row in counted)
        values["max_probability"] = _mean(row.max_probability for row in counted)
        values["mean_logit"] = _mean(row.mean_logit for row in counted)
        values["margin_median"] = lower_median([row.margin for row in counted])
        values["margin_min"] = min(row.margin for row in counted)
    if live:
        values["zero_sum_violation"] = _mean(row.violation for row in live)
        values["zero_sum_violation_max"] = max(row.violation for row in live)
        absolute = math.fsum(row.absolute for row in live)
        values["zero_sum_violation_batch"] = abs(math.fsum(row.signed for row in live)) / absolute
        values["absorbed_fraction"] = _mean(row.absorbed for row in live)
        values["residual_mass"] = _mean(row.residual for row in live)
        values["soft_target_fraction"] = _mean(row.negatives > 1 for row in live)
    return values


def above_the_floor(truths: list[RowTruth], dtype: torch.dtype, classes: int) -> dict[str, float]:
    """The quantities that tell rounding from absorption, for a loss in ``dtype``; some row has to be live.

    The floor: half an ulp of ln K + 2, times what that is in ulps of the next power of two below, plus 1.5
    roundings of a gradient, plus what adding K exponentials in lanes of 16 bytes loses.
    """
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    lanes = 16 // (8 if wide is torch.float64 else 4)
    ulp_of_log = 2.0 ** math.floor(math.log2(math.log(max(classes, 2)) + 2))
    floor = 2 * UNIT[dtype] * (1.5 + 0.5 * ulp_of_log) + UNIT[wide] * classes / (8 * lanes)
    live = [row for row in truths if row.kind == "live"]
    return {
        "floor": floor,
        "zero_sum_violation_share": _mean(row.violation > floor for row in live),
        "partially_absorbed_fraction": _mean(row.violation > floor and not row.absorbed for row in live),
    }


def _mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


# --- the optimizer ---------------------------------------------------------------------------------


class Adam64:
    """Adam with decoupled weight decay from the papers' formulas, float64, one flat vector."""

    def __init__(self, lr: float, betas: tuple[float, float], eps: float, decay: float) -> None:
        self.lr, (self.beta1, self.beta2), self.eps, self.decay = lr, betas, eps, decay
        self.exp_avg = self.exp_avg_sq = 0.0
        self.taken = 0

    def step(self, weights: np.ndarray, grad: np.ndarray) -> np.ndarray:
        self.taken += 1
        self.exp_avg = self.beta1 * self.exp_avg + (1 - self.beta1) * grad
        self.exp_avg_sq = self.beta2 * self.exp_avg_sq + (1 - self.beta2) * grad**2
        m = self.exp_avg / (1 - self.beta1**self.taken)
        return weights - self.lr * self.decay * weights - self.lr * m / (self.root() + self.eps)

    def root(self) -> np.ndarray:
        """sqrt(v̂)"""
        return np.sqrt(self.exp_avg_sq / (1 - self.beta2**self.taken))


def logit_displacement(
    weight_update: Tensor, bias_update: Tensor | None, features: Tensor
) -> tuple[float, float]:
    """(max, rms) of the displacement of the logits, the rows' common shift taken out. Plain loops."""
    dw, h = weight_update.double().tolist(), features.double().tolist()
    db = [0.0] * len(dw) if bias_update is None else bias_update.double().tolist()
    moved = []
    for row in h:
        change = [math.fsum(w * x for w, x in zip(weights, row, strict=True)) + b
                  for weights, b in zip(dw, db, strict=True)]  # fmt: skip
        common = math.fsum(change) / len(change)
        moved += [abs(x - common) for x in change]
    return max(moved), math.sqrt(math.fsum(x * x for x in moved) / len(moved))


def row_match(features: np.ndarray, before: np.ndarray) -> float:
    """Correlation of the same rows' features in two steps, along four fixed directions, in float64."""
    directions = np.array(
        [[math.cos((i + 1) * j * 2.399963) for j in (1, 2, 3, 4)] for i in range(features.shape[1])]
    )
    one, two = (rows @ directions for rows in (features, before))
    one, two = one - one.mean(0), two - two.mean(0)
    return float((one * two).sum() / math.sqrt((one**2).sum() * (two**2).sum()))
