"""The gradient at the logits tells whether a cross-entropy of these logits is trained."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nfi_monitor import Monitor
from nfi_monitor.measure.cross_entropy_fit import LIGHTER, TURNED, mismatch
from nfi_monitor.measure.rows import finish, row_statistics
from nfi_monitor.measure.shift_invariance import UNSURE
from tests.runs import batch, mlp

ROWS, CLASSES = 256, 5
Loss = Callable[[Tensor, Tensor], Tensor]


def scene(classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(ROWS, classes, generator=generator) * 1.5
    return logits, torch.randint(classes, (ROWS,), generator=generator)


def numbers(seed: int = 5) -> Tensor:
    return torch.randn(ROWS, generator=torch.Generator().manual_seed(seed))


def log_chance(logits: Tensor, target: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)


def gradient(loss: Loss, logits: Tensor, target: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(logits, target), logits)[0]


def found(
    loss: Loss,
    classes: int = CLASSES,
    dtype: torch.dtype = torch.float32,
    name: str = "mismatch_fraction",
) -> float:
    logits, target = scene(classes)
    logits = logits.to(dtype)
    statistics = row_statistics(gradient(loss, logits, target), logits, ROWS)
    values = finish(statistics.sums.tolist(), statistics.maxima.tolist(), single_output=False)
    return values.get(name, 0.0)


CROSS_ENTROPIES: dict[str, Loss] = {
    "mean": F.cross_entropy,
    "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "accumulated": lambda z, y: F.cross_entropy(z, y) / 16,
    "loss scaling": lambda z, y: 65536 * F.cross_entropy(z, y),
    "tiny": lambda z, y: 1e-25 * F.cross_entropy(z, y),
    "class weights": lambda z, y: F.cross_entropy(z, y, weight=torch.linspace(0.1, 9, z.shape[-1])),
    "some rows ignored": lambda z, y: F.cross_entropy(z, torch.where(torch.arange(ROWS) % 3 == 0, -100, y)),
    "z-loss": lambda z, y: F.cross_entropy(z, y) + 1e-4 * z.logsumexp(-1).square().mean(),
    "in bfloat16": lambda z, y: F.cross_entropy(z.bfloat16(), y),
}
OTHERS: dict[str, Loss] = {
    "policy gradient": lambda z, y: -(numbers() * log_chance(z, y)).mean(),
    "returns": lambda z, y: -((numbers().exp()) * log_chance(z, y)).mean(),
    "PPO with entropy": lambda z, y: (
        -(numbers() * (log_chance(z, y) - log_chance(z, y).detach()).exp()).mean()
        - 0.01 * torch.distributions.Categorical(logits=z).entropy().mean()
    ),
    "preferences": lambda z, y: (
        -F.logsigmoid(log_chance(z, y)[: ROWS // 2] - log_chance(z, y)[ROWS // 2 :]).mean()
    ),
    "focal": lambda z, y: -((1 - log_chance(z, y).exp()).square() * log_chance(z, y)).mean(),
    "label smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "mixup": lambda z, y: 0.6 * F.cross_entropy(z, y) + 0.4 * F.cross_entropy(z, y.flip(0)),
    "row weights": lambda z, y: -(torch.linspace(0.1, 2, ROWS) * log_chance(z, y)).mean(),
    "absolute error": lambda z, y: (1 - log_chance(z, y).exp()).mean(),
    "squares": lambda z, y: F.mse_loss(z, F.one_hot(y, z.shape[-1]).float()),
    "one versus rest": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, z.shape[-1]).float()),
    "capped": lambda z, y: F.cross_entropy(2 * torch.tanh(z / 2), y),
    "over the other axis": lambda z, y: F.cross_entropy(z.T, y[: z.shape[-1]]),
}


@pytest.mark.parametrize("classes", [2, 3, 40])
@pytest.mark.parametrize("loss", CROSS_ENTROPIES.values(), ids=CROSS_ENTROPIES.keys())
def test_a_cross_entropy_with_any_factor_fits(loss: Loss, classes: int) -> None:
    assert found(loss, classes) == 0.0
    assert (found(loss, classes, name="uneven_fraction") > 0) is (loss is CROSS_ENTROPIES["class weights"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cross_entropy_fits_in_other_precisions(dtype: torch.dtype) -> None:
    for classes in (2, 40):
        assert found(F.cross_entropy, classes, dtype) == 0.0
        assert found(lambda z, y: F.cross_entropy(z, y) * 1e-4, classes, dtype) == 0.0


@pytest.mark.parametrize("loss", OTHERS.values(), ids=OTHERS.keys())
def test_other_losses_do_not_fit(loss: Loss) -> None:
    assert found(loss) > 0.1
    if loss is not OTHERS["label smoothing"]:
        assert found(loss, 2) > 0.1


@pytest.mark.parametrize("name", ["mean", "class weights", "policy gradient", "mixup", "row weights"])
def test_the_share_is_that_of_the_reference(name: str) -> None:
    """``mismatch_fraction`` and ``uneven_fraction`` row by row in float64.

    By the angle to p − y, and by the weight among the rows of the class and among all."""
    logits, target = scene()
    grad = gradient((CROSS_ENTROPIES | OTHERS)[name], logits, target)
    guessed = grad.argmin(-1)
    rows = []
    for z, g, r in zip(logits.double().numpy(), grad.double().numpy(), guessed.tolist(), strict=True):
        p = np.exp(z - z.max())
        p /= p.sum()
        expected = p - np.eye(CLASSES)[r]
        cosine = g @ expected / np.linalg.norm(g) / np.linalg.norm(expected)
        weight = g @ expected / (expected @ expected)
        fits = cosine > math.sqrt(1 - TURNED**2)
        rows.append((1 - p[r], fits, weight, r))
    tells = [row for row in rows if row[0] > UNSURE]
    heaviest = {
        r: max((w for _, fits, w, k in tells if k == r and fits), default=0.0) for r in range(CLASSES)
    }
    wrong = [not fits or weight < LIGHTER * heaviest[r] for _, fits, weight, r in tells]
    residual = torch.tensor([row[0] for row in rows])
    live = torch.ones(ROWS, dtype=torch.bool)
    nothing = torch.zeros(())
    share, uneven = mismatch(grad, logits, guessed, residual, live, -80.0, (nothing, nothing))
    assert float(share) == pytest.approx(sum(wrong) / len(tells), abs=1e-6)
    most = max(heaviest.values())
    lighter = [not bad and row[2] < LIGHTER * most for bad, row in zip(wrong, tells, strict=True)]
    assert float(uneven) == pytest.approx(sum(lighter) / len(tells), abs=1e-6)


def test_rows_that_do_not_tell_change_nothing() -> None:
    logits, target = scene()
    grad = gradient(OTHERS["mixup"], logits, target)
    known, sure = (torch.tensor(0.25), torch.tensor(0.5)), torch.full((ROWS,), 0.01)
    live = torch.ones(ROWS, dtype=torch.bool)
    assert mismatch(grad, logits, target, sure, live, -80.0, known) == known
    assert mismatch(grad, logits, target, 50 * sure, ~live, -80.0, known) == known
    assert mismatch(grad * 1e-38, logits, target, 50 * sure, live, -87.0, known) == known


def trained(loss_of: Loss, *, report: bool = False) -> Monitor:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = batch(rows=ROWS)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(8):
            loss = loss_of(model(inputs), targets)
            if report:
                monitor.observe_loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return monitor


@pytest.mark.parametrize("name", ["policy gradient", "returns", "preferences", "mixup", "row weights"])
def test_a_loss_at_the_head_that_is_not_trained_is_not_judged_and_a_note_says_so(name: str) -> None:
    monitor = trained(OTHERS[name])
    (note,) = [note for note in monitor.notes if note.code == "not_cross_entropy"]
    assert "monitor.observe_loss(loss)" in note.message
    assert monitor._loop.detector.spike.baseline.readings == 0
    reported = trained(OTHERS[name], report=True)
    assert "not_cross_entropy" not in [note.code for note in reported.notes]


@pytest.mark.parametrize("name", ["mean", "sum", "accumulated", "class weights"])
def test_the_loss_at_the_head_of_a_cross_entropy_is_judged(name: str) -> None:
    monitor = trained(CROSS_ENTROPIES[name])
    codes = [note.code for note in monitor.notes]
    assert "not_cross_entropy" not in codes and ("rows_weighted" in codes) is (name == "class weights")
    assert "mismatch_fraction" not in monitor.history or not len(monitor.history["mismatch_fraction"][0])
    assert monitor._loop.detector.spike.baseline.readings == 8


@pytest.mark.parametrize("observed", [True, False])
def test_rows_of_preferences_have_no_absorption_and_a_note_says_so(observed: bool) -> None:
    x, y = batch()
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = Monitor(model, optimizer, console=False, every=1)
    for _ in range(12):
        z = model(x)
        loss = -F.logsigmoid(log_chance(z, y) - log_chance(z, (y + 1) % z.shape[-1])).mean()
        loss.backward()
        if observed:
            monitor.observe_loss(loss)
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    assert "live_fraction" in monitor.history
    assert not {"absorbed_fraction", "partially_absorbed_fraction"} & set(monitor.history)
    code = "absorption_left_out" if observed else "not_cross_entropy"
    assert code in [note.code for note in monitor.notes]


def test_no_share_of_partially_absorbed_rows_is_negative() -> None:
    logits, target = scene()
    other = (target + 1) % CLASSES
    grad = torch.zeros_like(logits).scatter(1, target[:, None], 1.0).scatter(1, other[:, None], -1.0)
    grad[:40] = gradient(F.cross_entropy, logits, target)[:40]
    statistics = row_statistics(grad, logits, ROWS)
    values = finish(statistics.sums.tolist(), statistics.maxima.tolist(), single_output=False)
    assert values.get("partially_absorbed_fraction", 0.0) >= 0
