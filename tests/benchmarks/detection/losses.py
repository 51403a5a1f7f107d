"""The losses of the proving ground: cross-entropy, and what breaks or bends its zero-sum on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nfi_monitor import Monitor
from tests.benchmarks.detection.training import LossOf, Training

OfLogits = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, K], target [N]) → loss."""


def of_logits(function: OfLogits) -> LossOf:
    """A loss that sees nothing but the logits and the target of a micro-batch ``(input, target)``."""

    def loss(training: Training, batch: Any, monitor: Monitor) -> Tensor:
        inputs, target = batch
        return function(training.arm(training.model(inputs)), target.flatten())

    return loss


LossName = tuple[Any, ...]
"""("z_loss", 1e-3): a function of this module and its arguments; can be hashed and sent to a worker."""


def named(loss: LossName) -> LossOf:
    function, *arguments = loss
    found = globals()[function]
    loss_of: LossOf = found(*arguments) if arguments else found
    return loss_of


cross_entropy = of_logits(F.cross_entropy)


def smoothed(amount: float) -> LossOf:
    """Label smoothing."""
    return of_logits(lambda z, y: F.cross_entropy(z, y, label_smoothing=amount))


def z_loss(amount: float) -> LossOf:
    """Cross-entropy + amount · mean (log Z)²: Σ_k g_k = 2 · amount · log Z by design."""
    return of_logits(lambda z, y: F.cross_entropy(z, y) + amount * z.logsumexp(-1).square().mean())


def logit_l2(amount: float) -> LossOf:
    """Cross-entropy + amount · mean z²."""
    return of_logits(lambda z, y: F.cross_entropy(z, y) + amount * z.square().mean())


def soft_capped(cap: float) -> LossOf:
    """Logits c·tanh(z/c) after the head: the head's own rows need not sum to zero."""
    return of_logits(lambda z, y: F.cross_entropy(cap * torch.tanh(z / cap), y))


def focal(gamma: float) -> LossOf:
    """(1 − p_r)^γ · cross-entropy, 1 − p_r computed without cancellation."""

    def function(z: Tensor, y: Tensor) -> Tensor:
        nll = F.cross_entropy(z, y, reduction="none")
        return (torch.clamp_min(-torch.expm1(-nll), 1e-30).pow(gamma) * nll).mean()

    return of_logits(function)


def class_weighted(lowest: float, highest: float) -> LossOf:
    """Weights of the classes from ``lowest`` to ``highest``."""

    def function(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, weight=torch.linspace(lowest, highest, z.shape[-1], dtype=z.dtype))

    return of_logits(function)


def hinge(training: Training, batch: Any, monitor: Monitor) -> Tensor:
    """max(0, 1 − y·ŷ) with y = ±1 and one output column; exactly 0, gradient and all, past the margin."""
    inputs, label = batch
    output = training.arm(training.model(inputs)).squeeze(1)
    return F.relu(1 - (2 * label - 1) * output).mean()


def distilled(training: Training, batch: Any, monitor: Monitor) -> Tensor:
    """KL to a teacher's soft targets; a micro-batch is (input, teacher's logits)."""
    inputs, teacher = batch
    student = F.log_softmax(training.arm(training.model(inputs)), -1)
    return F.kl_div(
        student, F.log_softmax(teacher.to(student.dtype), -1), reduction="batchmean", log_target=True
    )


def two_headed(training: Training, batch: Any, monitor: Monitor) -> Tensor:
    """The label's cross-entropy + half of the parity's."""
    inputs, label = batch
    logits, parity = training.model(inputs)
    return F.cross_entropy(training.arm(logits), label) + 0.5 * F.cross_entropy(parity, label % 2)


def contrastive(training: Training, batch: Any, monitor: Monitor) -> Tensor:
    """CLIP's symmetric loss over a matrix of similarities, which is tapped: no module outputs it."""
    left, right = batch
    logits = training.arm(monitor.tap(training.model(left, right)))
    own = torch.arange(len(left))
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
