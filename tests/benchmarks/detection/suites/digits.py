"""Ordinary trainings of multilayer perceptrons on scikit-learn's digits, tables and texts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data, losses
from tests.benchmarks.detection.suites import checked
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of, scheduled
from tests.benchmarks.detection.training import LogitChange, LossOf

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "nadam": torch.optim.NAdam,
    "rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD,
}  # fmt: skip


def optimizer(
    model: nn.Module,
    *,
    kind: str = "adamw",
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    decay: float = 0.01,
) -> torch.optim.Optimizer:
    """AdamW as PyTorch makes it, unless something is changed."""
    keywords: dict[str, Any] = {"lr": lr, "weight_decay": decay}
    if kind == "sgd":
        keywords |= {"momentum": 0.9}
    elif kind != "rmsprop":
        keywords |= {"betas": betas}
    return _OPTIMIZERS[kind](model.parameters(), **keywords)


def perceptron(
    inputs: int,
    width: int,
    depth: int,
    outputs: int,
    *,
    dropout: float = 0.0,
    act: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    sizes = [inputs, *[width] * depth]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), act(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


# --- losses ----------------------------------------------------------------------------------------


def multi_margin(training: Any, batch: Any, monitor: Any) -> Tensor:
    """The multi-class hinge."""
    inputs, target = batch
    return F.multi_margin_loss(training.arm(training.model(inputs)), target)


def soft_targets(training: Any, batch: Any, monitor: Any) -> Tensor:
    """Cross-entropy against probabilities: mixup."""
    inputs, target = batch
    return F.cross_entropy(training.arm(training.model(inputs)), target)


def stablemax(training: Any, batch: Any, monitor: Any) -> Tensor:
    """Prieto et al. 2025, computed in float64: s(x) = x + 1 for x ≥ 0, else 1/(1 − x)."""
    inputs, target = batch
    z = training.arm(training.model(inputs)).double()
    score = torch.where(z >= 0, z + 1, 1 / (1 - z.clamp_max(0)))
    return -(score / score.sum(-1, keepdim=True)).log().gather(1, target[:, None]).mean()


def scaled(divisor: float, smoothing: float) -> LossOf:
    """Logits divided after the head, as muP and airbench do."""

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        inputs, target = batch
        z = training.arm(training.model(inputs)) / divisor
        return F.cross_entropy(z, target, label_smoothing=smoothing)

    return loss


def many_labels(training: Any, batch: Any, monitor: Any) -> Tensor:
    """One binary cross-entropy a label."""
    inputs, target = batch
    return F.binary_cross_entropy_with_logits(training.arm(training.model(inputs)), target)


_OWN: dict[str, Callable[..., Any]] = {"scaled": scaled}
_OWN_PLAIN: dict[str, LossOf] = {"multi_margin": multi_margin, "stablemax": stablemax}


def loss_named(name: tuple[Any, ...]) -> LossOf:
    if name[0] in _OWN:
        return _OWN[name[0]](*name[1:])  # type: ignore[no-any-return]
    return _OWN_PLAIN.get(name[0]) or losses.named(name)


# --- digits ----------------------------------------------------------------------------------------


def schedule_named(name: tuple[Any, ...] | None) -> checked.Schedule | None:
    return None if name is None else getattr(checked, name[0])(*name[1:])  # type: ignore[no-any-return]


def digits(
    seed: int,
    arm: LogitChange,
    *,
    rows: int = 1200,
    width: int = 64,
    depth: int = 2,
    dropout: float = 0.0,
    batch: int = 32,
    loss: tuple[Any, ...] = ("cross_entropy",),
    schedule: tuple[Any, ...] | None = None,
    clip: float | None = None,
    noise: float = 0.0,
    augment: bool = False,
    pacing: int = 0,
    imbalance: bool = False,
    mixup: float = 0.0,
    **how: Any,
) -> CheckedTraining:
    """Digits by a perceptron.

    ``noise``: share of labels drawn at random. ``augment``: shifts by a pixel and noise. ``pacing``: easy
    digits first, all of them after so many steps. ``imbalance``: class k has e^(−k/2) of its rows. ``mixup``:
    Beta's parameter. ``how`` goes to the optimizer.
    """
    torch.manual_seed(seed)
    x, y = data.digits(rows, seed=seed)
    generator = torch.Generator().manual_seed(seed + 7)
    if noise:
        wrong = torch.rand(len(y), generator=generator) < noise
        y = torch.where(wrong, torch.randint(0, 10, (len(y),), generator=generator), y)
    if imbalance:
        keep = torch.rand(len(y), generator=generator) < torch.exp(-y / 2.0)
        x, y = x[keep], y[keep]
    model = perceptron(64, width, depth, 10, dropout=dropout)
    step = optimizer(model, **how)
    draw = epochs(x, y, size=batch, seed=seed)
    if augment:
        draw = augmented(draw, seed)
    if pacing:
        draw = paced(x, y, size=batch, seed=seed, full=pacing)
    part: tuple[Tensor, ...] = part_of(x, y)
    chosen = loss_named(loss)
    if mixup:
        draw, chosen = mixed(draw, seed, mixup), soft_targets
        part = (part[0], F.one_hot(part[1], 10).float())
    return CheckedTraining(
        model,
        step,
        chosen,
        draw,
        scheduled(step, schedule_named(schedule)),
        arm,
        part=part,
        before_update=None if clip is None else checked.clipped(clip),
    )


Draw = Callable[[int], Any]


def augmented(draw: Draw, seed: int) -> Draw:
    """Shift each batch by up to a pixel and add noise."""

    def shifted(step: int) -> Any:
        generator = torch.Generator().manual_seed(7_919 * (seed + 1) + step)
        down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
        batches = []
        for inputs, target in draw(step):
            images = inputs.reshape(-1, 8, 8).roll((down, right), (1, 2)).reshape(inputs.shape)
            batches.append((images + 0.1 * torch.randn(inputs.shape, generator=generator), target))
        return batches

    return shifted


def paced(x: Tensor, y: Tensor, *, size: int, seed: int, full: int) -> Draw:
    """A curriculum: rows near their class's mean first, a growing share of them."""
    means = torch.stack([x[y == k].mean(0) for k in range(10)])
    easy = (x - means[y]).norm(dim=1).argsort()
    x, y = x[easy], y[easy]

    def draw(step: int) -> Any:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        share = min(0.3 + 0.7 * step / full, 1.0)
        rows = torch.randint(0, max(int(share * len(y)), size), (size,), generator=generator)
        return [(x[rows], y[rows])]

    return draw


def mixed(draw: Draw, seed: int, alpha: float) -> Draw:
    """Mixup (Zhang et al. 2018)."""

    def blend(step: int) -> Any:
        generator = torch.Generator().manual_seed(104_729 * (seed + 1) + step)
        share = float(torch.rand((), generator=generator)) ** (1 / alpha)
        batches = []
        for inputs, target in draw(step):
            order = torch.randperm(len(target), generator=generator)
            soft = F.one_hot(target, 10).float()
            batches.append(
                (share * inputs + (1 - share) * inputs[order], share * soft + (1 - share) * soft[order])
            )
        return batches

    return blend


def distilled(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    """A small student learns soft targets of a teacher that was trained before."""
    torch.manual_seed(seed)
    x, y = data.digits(1200, seed=seed)
    teacher = perceptron(64, 128, 2, 10)
    before = torch.optim.AdamW(teacher.parameters())
    draw = epochs(x, y, size=64, seed=seed)
    for number in range(1, 400):
        inputs, target = draw(number)[0]
        F.cross_entropy(teacher(inputs), target).backward()
        before.step()
        before.zero_grad()
    with torch.no_grad():
        soft = (teacher(x) / 2.0).softmax(-1)
    model = perceptron(64, 32, 2, 10)
    step = optimizer(model, **how)
    batches = epochs(x, soft, size=32, seed=seed)
    return CheckedTraining(model, step, soft_targets, batches, None, arm, part=part_of(x, soft))


def continued(seed: int, arm: LogitChange, *, before: int = 2000, **how: Any) -> CheckedTraining:
    """Digits 0–4 first, without a monitor; then a new head and lower rate learn 5–9 on the same trunk."""
    torch.manual_seed(seed)
    x, y = data.digits(None, seed=seed)
    low = y < 5
    model = perceptron(64, 96, 2, 5)
    first = torch.optim.AdamW(model.parameters())
    draw = epochs(x[low], y[low], size=32, seed=seed)
    for number in range(1, before):
        inputs, target = draw(number)[0]
        F.cross_entropy(model(inputs), target).backward()
        first.step()
        first.zero_grad()
    model[-1] = nn.Linear(96, 5)
    step = optimizer(model, **how)
    rows, labels = x[~low], y[~low] - 5
    batches = epochs(rows, labels, size=32, seed=seed + 1)
    return CheckedTraining(model, step, losses.cross_entropy, batches, None, arm, part=part_of(rows, labels))


# --- several labels, texts ---------------------------------------------------------------------------


def labelled_blobs(
    seed: int, arm: LogitChange, *, rows: int = 150, batch: int | None = None, labels: int = 20, **how: Any
) -> CheckedTraining:
    """Multi-label classification of noisy linear labels."""
    torch.manual_seed(seed)
    x = torch.randn(rows, 30)
    y = ((x @ torch.randn(30, labels) + 2 * torch.randn(rows, labels)) > 0).float()
    model = perceptron(30, 96, 2, labels, act=nn.ELU)
    step = optimizer(model, **how)
    whole: Draw = lambda number: [(x, y)]  # noqa: E731
    draw = whole if batch is None else epochs(x, y, size=batch, seed=seed)
    return CheckedTraining(
        model, step, many_labels, draw, None, arm, part=None if batch is None else part_of(x, y)
    )


class BagOfBytes(nn.Module):
    """Pairs of neighbouring bytes → mean embedding → perceptron."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        self.pairs = nn.EmbeddingBag(4096, width, mode="mean")
        self.rest = perceptron(width, 64, 1, classes, dropout=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rest(self.pairs((tokens[:, :-1] * 31 + tokens[:, 1:]) % 4096))


def text_topics(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    """Which of eight parts of the reference manual a window of 48 bytes is from."""
    torch.manual_seed(seed)
    stream = data.text()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - 49, (2000,), generator=generator)
    x, y = stream[starts[:, None] + torch.arange(48)], starts * 8 // len(stream)
    model = BagOfBytes(8)
    step = optimizer(model, **how)
    return CheckedTraining(
        model, step, losses.cross_entropy, epochs(x, y, size=32, seed=seed), None, arm, part=part_of(x, y)
    )
