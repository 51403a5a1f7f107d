"""The builders: each returns a ready :class:`Training` for a seed and an arm; keywords are its variations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.benchmarks.detection import data, losses, models
from tests.benchmarks.detection.training import LogitChange, Training, full_batch, minibatches

WARM_UP = 10


def adam(
    model: nn.Module, lr: float, beta2: float, *, weight_decay: float = 0.0, eps: float = 1e-8
) -> torch.optim.Optimizer:
    """Adam, or AdamW where there is decay."""
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
    return kind(model.parameters(), lr=lr, betas=(0.9, beta2), eps=eps, weight_decay=weight_decay)


def warm_up(
    optimizer: torch.optim.Optimizer, steps: int = WARM_UP, restart: int | None = None
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up; with ``restart``, a cosine that starts anew every so many steps."""

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(steps, 1))
        if restart is None:
            return rise
        return rise * 0.5 * (1.0 + torch.cos(torch.tensor(torch.pi * (step % restart) / restart)).item())

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# --- modular arithmetic --------------------------------------------------------------------------


def modular_mlp(
    seed: int,
    arm: LogitChange,
    *,
    p: int,
    operation: str = "/",
    width: int = 128,
    depth: int = 3,
    beta2: float = 0.95,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    batch: int | None = None,
    norm: bool = False,
    loss: losses.LossName = ("cross_entropy",),
    warm: int = WARM_UP,
    probe: bool = False,
    kick: tuple[int, int, float] | None = None,
) -> Training:
    """An MLP learns a∘b mod p. ``kick`` is (first step, steps, factor on the learning rate)."""
    torch.manual_seed(seed)
    pairs, y = data.modular(p, operation, seed=seed)
    x = data.one_hot_pairs(pairs, p)
    model = models.mlp(2 * p, width, depth, p, norm=norm)
    optimizer = adam(model, lr, beta2, weight_decay=weight_decay, eps=eps)
    return Training(
        model,
        optimizer,
        losses.named(loss),
        full_batch(x, y) if batch is None else minibatches(x, y, size=batch, seed=seed),
        scheduler=None if kick else warm_up(optimizer, warm),
        arm=arm,
        disturb=None if kick is None else learning_rate_kick(lr, *kick),
        watch={"probe": (x[:64], y[:64])} if probe else {},
    )


def learning_rate_kick(lr: float, first: int, steps: int, factor: float) -> Any:
    """The learning rate is multiplied by ``factor`` for some steps, as by a broken schedule."""

    def disturb(training: Training, number: int) -> None:
        kicked = first <= number < first + steps
        for group in training.optimizer.param_groups:
            group["lr"] = lr * (factor if kicked else 1.0)

    return disturb


def modular_transformer(
    seed: int,
    arm: LogitChange,
    *,
    p: int,
    width: int = 64,
    layers: int = 2,
    norm: bool = False,
    operation: str = "/",
    beta2: float = 0.95,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    probe: bool = False,
) -> Training:
    """Tokens [a, ∘, b, =] → a∘b mod p at the last position."""
    torch.manual_seed(seed)
    pairs, y = data.modular(p, operation, seed=seed)
    sign, equals = torch.full((len(y),), p), torch.full((len(y),), p + 1)
    tokens = torch.stack([pairs[:, 0], sign, pairs[:, 1], equals], dim=1)
    model = models.Transformer(p + 2, 4, p, width=width, layers=layers, heads=4, norm=norm)
    optimizer = adam(model, lr, beta2, weight_decay=weight_decay)
    return Training(
        model,
        optimizer,
        losses.cross_entropy,
        full_batch(tokens, y),
        scheduler=warm_up(optimizer),
        arm=arm,
        watch={"probe": (tokens[:64], y[:64])} if probe else {},
    )


# --- k-sparse parity -----------------------------------------------------------------------------


def sparse_parity(
    seed: int,
    arm: LogitChange,
    *,
    hinge: bool,
    bits: int = 40,
    relevant: int = 3,
    width: int = 128,
    rows: int = 1000,
    beta2: float = 0.999,
    lr: float = 1e-2,
    weight_decay: float = 1e-2,
) -> Training:
    """W. Wu's setting (2024): one hidden layer, AdamW."""
    torch.manual_seed(seed)
    x, y = data.parity(rows, bits, relevant, seed=seed)
    model = models.mlp(bits, width, 1, 1 if hinge else 2)
    optimizer = adam(model, lr, beta2, weight_decay=weight_decay)
    loss = losses.hinge if hinge else losses.cross_entropy
    return Training(model, optimizer, loss, full_batch(x, y), arm=arm)


# --- digits --------------------------------------------------------------------------------------


def digits_mlp(
    seed: int,
    arm: LogitChange,
    *,
    rows: int | None = 200,
    width: int = 128,
    depth: int = 3,
    beta2: float = 0.95,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    batch: int | None = None,
    accumulate: int = 1,
    restart: int | None = None,
    loss: losses.LossName = ("cross_entropy",),
    bad_batches: tuple[int, ...] = (),
) -> Training:
    """8×8 digits. At the steps ``bad_batches`` inputs are 30 times too large and labels shuffled."""
    torch.manual_seed(seed)
    x, y = data.digits(rows, seed=seed)
    model = models.mlp(64, width, depth, 10)
    optimizer = adam(model, lr, beta2, weight_decay=weight_decay)
    good = (
        full_batch(x, y) if batch is None else minibatches(x, y, size=batch, seed=seed, accumulate=accumulate)
    )

    def draw(step: int) -> Any:
        if step not in bad_batches:
            return good(step)
        return [(30.0 * inputs, target.roll(1, 0)) for inputs, target in good(step)]

    return Training(
        model, optimizer, losses.named(loss), draw, scheduler=warm_up(optimizer, restart=restart), arm=arm
    )


def digits_distilled(seed: int, arm: LogitChange, *, teacher_steps: int = 200) -> Training:
    """A student learns a trained teacher's soft targets by KL."""
    teacher = digits_mlp(seed + 1000, LogitChange(), rows=None, batch=128)
    _train_before(teacher, teacher_steps)
    torch.manual_seed(seed)
    x, _ = data.digits(None, seed=seed)
    with torch.no_grad():
        soft = teacher.model(x) / 2.0
    model = models.mlp(64, 64, 2, 10)
    optimizer = adam(model, 1e-3, 0.95)
    return Training(
        model, optimizer, losses.distilled, minibatches(x, soft, size=64, seed=seed), warm_up(optimizer), arm
    )


def digits_fine_tuned(seed: int, arm: LogitChange, *, before: int = 400) -> Training:
    """Trained on the digits 0–4 before the monitor comes; then a new head learns 5–9 on the same trunk."""
    torch.manual_seed(seed)
    x, y = data.digits(None, seed=seed)
    low = y < 5
    model = models.mlp(64, 128, 2, 5)
    start = Training(
        model, adam(model, 1e-3, 0.95), losses.cross_entropy, minibatches(x[low], y[low], size=64, seed=seed)
    )
    _train_before(start, before)
    model[-1] = nn.Linear(128, 5)
    optimizer = adam(model, 3e-4, 0.95)
    batches = minibatches(x[~low], y[~low] - 5, size=64, seed=seed + 1)
    return Training(model, optimizer, losses.cross_entropy, batches, warm_up(optimizer), arm)


def digits_two_heads(seed: int, arm: LogitChange) -> Training:
    torch.manual_seed(seed)
    x, y = data.digits(None, seed=seed)
    model = models.TwoHeads(64, 64, 10)
    optimizer = adam(model, 1e-3, 0.95)
    return Training(
        model,
        optimizer,
        losses.two_headed,
        minibatches(x, y, size=64, seed=seed),
        warm_up(optimizer),
        arm,
        watch={"head": "label"},
    )


def digits_contrastive(seed: int, arm: LogitChange, *, batch: int = 64) -> Training:
    """Upper and lower half of a digit are two views of it; the logits are a matrix of similarities."""
    torch.manual_seed(seed)
    x, _ = data.digits(None, seed=seed)
    model = models.TwoTowers(32, 64)
    optimizer = adam(model, 1e-3, 0.95)
    return Training(
        model,
        optimizer,
        losses.contrastive,
        minibatches(x[:, :32], x[:, 32:], size=batch, seed=seed),
        warm_up(optimizer),
        arm,
        watch={"head": False},
    )


def digit_vgg(
    seed: int, arm: LogitChange, *, rows: int = 200, divide: int = 8, norm: bool = False, beta2: float = 0.95
) -> Training:
    torch.manual_seed(seed)
    x, y = data.digit_images(rows, size=32, channels=3, seed=seed)
    model = models.vgg11(10, divide=divide, norm=norm)
    optimizer = adam(model, 1e-3, beta2)
    return Training(model, optimizer, losses.cross_entropy, full_batch(x, y), warm_up(optimizer), arm)


def digit_vit(
    seed: int, arm: LogitChange, *, rows: int = 200, beta2: float = 0.95, probe: bool = False
) -> Training:
    torch.manual_seed(seed)
    x, y = data.digit_images(rows, size=32, channels=3, seed=seed)
    model = models.ViT(10, size=32, patch=8, width=48, layers=3, heads=4)
    optimizer = adam(model, 1e-3, beta2)
    return Training(
        model,
        optimizer,
        losses.cross_entropy,
        full_batch(x, y),
        warm_up(optimizer),
        arm,
        watch={"probe": (x[:32], y[:32])} if probe else {},
    )


def digit_resnet(
    seed: int, arm: LogitChange, *, width: int = 8, batch: int = 64, beta2: float = 0.95
) -> Training:
    torch.manual_seed(seed)
    x, y = data.digit_images(None, size=8, channels=1, seed=seed)
    model = models.resnet(10, width=width)
    optimizer = adam(model, 1e-3, beta2)
    batches = minibatches(x, y, size=batch, seed=seed)
    return Training(model, optimizer, losses.cross_entropy, batches, warm_up(optimizer), arm)


# --- text ----------------------------------------------------------------------------------------


def tiny_gpt(
    seed: int,
    arm: LogitChange,
    *,
    windows: int = 2000,
    length: int = 32,
    batch: int = 16,
    width: int = 64,
    layers: int = 2,
    beta2: float = 0.95,
    weight_decay: float = 0.1,
    lr: float = 1e-3,
) -> Training:
    """A byte-level language model on Python's own reference manual."""
    torch.manual_seed(seed)
    x, y = data.text_windows(windows, length, seed=seed)
    model = models.Transformer(
        128, length, 128, width=width, layers=layers, heads=4, norm=True, all_positions=True
    )
    optimizer = adam(model, lr, beta2, weight_decay=weight_decay)
    batches = minibatches(x, y, size=batch, seed=seed)
    return Training(model, optimizer, losses.cross_entropy, batches, warm_up(optimizer), arm)


# --- instability that is neither rounding nor forgetting ------------------------------------------


def smoothed_digits(
    seed: int, arm: LogitChange, *, lr: float, beta2: float = 0.95, smoothing: float = 0.1
) -> Training:
    """Full batch, label smoothing (the curvature does not vanish), a high learning rate."""
    training = digits_mlp(seed, arm, rows=200, lr=lr, beta2=beta2, loss=("smoothed", smoothing))
    training.scheduler = None
    return training


def _train_before(training: Training, steps: int) -> None:
    """What happened before the monitor was attached."""
    for step in range(1, steps + 1):
        for inputs, target in training.micro_batches(step):
            F.cross_entropy(training.model(inputs), target).backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
