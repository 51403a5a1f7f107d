"""Ordinary trainings on rows: clicks, grades, wrong labels, order of the data, optimizers, other networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import Draw, of_output, standardised, trained
from tests.benchmarks.detection.suites.held_out_3.shared import generator_of
from tests.benchmarks.detection.training import LogitChange, full_batch

# --- clicks ----------------------------------------------------------------------------------------------


class Clicks(nn.Module):
    """Products of pairs of embeddings, a perceptron of all of them, a number for each (Guo et al. 2017)."""

    def __init__(self, sizes: tuple[int, ...], width: int = 8) -> None:
        super().__init__()
        starts = torch.tensor((0, *sizes[:-1])).cumsum(0)
        self.register_buffer("starts", starts)
        self.embedding = nn.Embedding(sum(sizes), width)
        self.alone = nn.Embedding(sum(sizes), 1)
        nn.init.normal_(self.embedding.weight, std=0.1)
        nn.init.zeros_(self.alone.weight)
        self.deep = nn.Sequential(
            nn.Linear(len(sizes) * width, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1)
        )

    def forward(self, kinds: Tensor) -> Tensor:
        found = self.embedding(kinds + self.starts)
        pairs = 0.5 * (found.sum(1).square() - found.square().sum(1)).sum(-1, keepdim=True)
        return pairs + self.alone(kinds + self.starts).sum(1) + self.deep(found.flatten(1))


def binary(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z.squeeze(1), y)


def clicks(
    seed: int, arm: LogitChange, *, batch: int = 64, drift: float = 0.0, **how: Any
) -> CheckedTraining:
    """Who clicks on what, of a stream that is read once. ``drift``: tastes turn by so much every 1,000 steps.

    Where tastes drift, no loss of a fixed part is recorded.
    """
    torch.manual_seed(seed)
    sizes = (60, 30, 10, 5)
    old, new = ([torch.randn(size, 3) for size in sizes] for _ in range(2))

    def rows(count: int, number: int) -> tuple[Tensor, Tensor]:
        generator = generator_of(seed, number)
        kinds = torch.stack([torch.randint(0, size, (count,), generator=generator) for size in sizes], 1)
        turn = torch.tensor(drift * number / 1000)
        taste = [turn.cos() * a[kinds[:, k]] + turn.sin() * b[kinds[:, k]] for k, (a, b) in
                 enumerate(zip(old, new, strict=True))]  # fmt: skip
        worth = (taste[0] * taste[1]).sum(1) + (taste[2] * taste[3]).sum(1) - 1.0
        return kinds, torch.bernoulli(worth.sigmoid(), generator=generator)

    draw: Draw = lambda step: [rows(batch, step)]  # noqa: E731
    part = None if drift else rows(512, 0)
    return trained(Clicks(sizes), of_output(binary), draw, arm, part=part, **how)


# --- made-up tables --------------------------------------------------------------------------------------


def earth_movers(z: Tensor, y: Tensor) -> Tensor:
    """Squares between cumulated probabilities (Hou et al. 2017): far off costs more than near."""
    wanted = (y[:, None] <= torch.arange(z.shape[1])).to(z.dtype)
    return (z.softmax(1).cumsum(1) - wanted).square().sum(1).mean()


def doubting(z: Tensor, y: Tensor) -> Tensor:
    """Squares under a Dirichlet distribution, and its variance (Sensoy et al. 2018)."""
    evidence = F.softplus(z) + 1
    whole = evidence.sum(1, keepdim=True)
    odds = evidence / whole
    spread = odds * (1 - odds) / (whole + 1)
    return ((F.one_hot(y, z.shape[1]) - odds).square() + spread).sum(1).mean()


def bounded(z: Tensor, y: Tensor, power: float = 0.7) -> Tensor:
    """(1 − p^q) / q, which wrong labels cannot make large (Zhang and Sabuncu 2018)."""
    odds = z.softmax(1).gather(1, y[:, None])
    return ((1 - odds.clamp_min(1e-7).pow(power)) / power).mean()


def lopsided_labels(z: Tensor, y: Tensor) -> Tensor:
    """Labels that are missing count less the surer they are (Ridnik et al. 2021)."""
    odds = (z.sigmoid() - 0.05).clamp_min(0)
    absent = odds.square() * torch.log1p(-odds.clamp_max(1 - 1e-6))
    return -(y * F.logsigmoid(z) + (1 - y) * absent).sum(1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "earth_movers": earth_movers, "doubting": doubting, "bounded": bounded,
    "lopsided_labels": lopsided_labels, "cross_entropy": F.cross_entropy,
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), "squares": F.mse_loss,
}  # fmt: skip


def _bumpy(inputs: int, outputs: int, width: int = 48) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.RMSNorm(width), nn.SiLU(), nn.Linear(width, width), nn.RMSNorm(width),
        nn.SiLU(), nn.Linear(width, outputs),
    )  # fmt: skip


def made(task: str, rows: int = 2000) -> tuple[Tensor, Tensor, int]:
    """(numbers, target, outputs) of "grades", "noisy" classes, "labels" that are mostly absent, "amounts"."""
    x = torch.randn(rows, 10)
    score = x[:, 0] * x[:, 1] + x[:, 2].sin() + 0.5 * x[:, 3].abs()
    if task == "grades":
        noisy = score + 0.3 * torch.randn(rows)
        return x, torch.bucketize(noisy, torch.tensor([-1.0, -0.3, 0.3, 0.8, 1.4])), 6
    if task == "labels":
        wanted = x @ torch.randn(10, 24) + 0.5 * torch.randn(rows, 24)
        return x, (wanted > wanted.quantile(torch.linspace(0.75, 0.99, 24), 0).diagonal()).float(), 24
    if task == "noisy":
        y = (x @ torch.randn(10, 6)).argmax(1)
        return x, torch.where(torch.rand(rows) < 0.3, torch.randint(0, 6, (rows,)), y), 6
    if task == "amounts":
        return x, torch.stack([score, score.square().clamp_max(4), x[:, 4].exp().clamp_max(4)], 1), 3
    raise ValueError(f"task {task!r}")


def table(
    seed: int, arm: LogitChange, *, task: str, loss: str, batch: int = 32, **how: Any
) -> CheckedTraining:
    torch.manual_seed(seed)
    x, y, outputs = made(task)
    draw = epochs(x, y, size=batch, seed=seed)
    return trained(_bumpy(10, outputs), of_output(LOSSES[loss]), draw, arm, part=part_of(x, y), **how)


def worst_group(
    seed: int, arm: LogitChange, *, batch: int = 64, step_size: float = 0.01, **how: Any
) -> CheckedTraining:
    """Groups with a high loss weigh more and more (Sagawa et al. 2020); a column misleads most rows."""
    torch.manual_seed(seed)
    x = torch.randn(2400, 8)
    y = (x[:, 0] + 0.3 * torch.randn(2400) > 0).long()
    agree = torch.rand(2400) < 0.9
    x[:, 7] = 2.0 * (2 * torch.where(agree, y, 1 - y) - 1) + 0.3 * torch.randn(2400)
    group = 2 * y + agree.long()
    weight = torch.full((4,), 0.25)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        rows, target, its = given
        each = F.cross_entropy(training.arm(training.model(rows)), target, reduction="none")
        counts = torch.bincount(its, minlength=4)
        means = torch.zeros(4).index_add(0, its, each) / counts.clamp_min(1)
        with torch.no_grad():
            weight.mul_((step_size * means).exp()).div_(weight.sum())
        return (weight * means).sum()

    model = nn.Sequential(nn.Linear(8, 32), nn.Tanhshrink(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    draw, plain = epochs(x, y, group, size=batch, seed=seed), of_output(lambda z, y, _: F.cross_entropy(z, y))
    return trained(model, loss, draw, arm, part=part_of(x, y, group), part_loss=plain, **how)


def exercises(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    """Three measures of twenty people from their exercises (scikit-learn's linnerud), all at each step."""
    from sklearn import datasets

    torch.manual_seed(seed)
    found = datasets.load_linnerud()
    x, y = (standardised(torch.tensor(part, dtype=torch.float32)) for part in (found.data, found.target))
    model = nn.Sequential(nn.Linear(3, 24), nn.Softsign(), nn.Linear(24, 24), nn.Softsign(), nn.Linear(24, 3))
    return trained(model, of_output(F.mse_loss), full_batch(x, y), arm, **how)


# --- digits: the order of the data, noise, optimizers ------------------------------------------------------


def _digits(seed: int, rows: int = 1500) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return data.digits(rows, seed=seed)


def _network(name: str) -> nn.Module:
    if name == "no_bias":
        return nn.Sequential(
            nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False), nn.ReLU(),
            nn.Linear(64, 10, bias=False),
        )  # fmt: skip
    if name == "gated":
        return nn.Sequential(
            nn.Linear(64, 96), nn.GLU(), nn.Dropout(0.2), nn.Linear(48, 96), nn.GLU(), nn.Linear(48, 10)
        )
    return _bumpy(64, 10)


def half_sorted(x: Tensor, y: Tensor, *, size: int, share: float) -> Draw:
    """Batches in the order of the classes, over and over; ``1 − share`` of each is drawn from all rows."""
    order = y.argsort(stable=True)
    own = round(share * size)
    count = len(x) // own

    def draw(step: int) -> Any:
        start = (step - 1) % count * own
        others = torch.randint(0, len(x), (size - own,), generator=generator_of(0, step))
        chosen = torch.cat([order[start : start + own], others])
        return [(x[chosen], y[chosen])]

    return draw


def class_by_class(x: Tensor, y: Tensor, *, size: int, every: int) -> Draw:
    """Two more classes every so many steps; rows of all classes so far."""

    def draw(step: int) -> Any:
        known = min(2 + 2 * ((step - 1) // every), 10)
        # A new pair of classes is blended in: at first few of its rows are drawn.
        share = min((step - 1) % every / (0.6 * every), 1.0) if known > 2 and step <= 5 * every else 1.0
        weight = (y < known).float() * torch.where(y >= known - 2, share + 0.02, 1.0)
        chosen = weight.multinomial(size, generator=generator_of(0, step))
        return [(x[chosen], y[chosen])]

    return draw


def larger_batches(x: Tensor, y: Tensor, *, size: int, every: int) -> Draw:
    """Twice as many rows a step every so many steps, in the place of a lower rate (Smith et al. 2018)."""

    def draw(step: int) -> Any:
        count = size * 2 ** min((step - 1) // every, 4)
        chosen = torch.randint(0, len(x), (count,), generator=generator_of(0, step))
        return [(x[chosen], y[chosen])]

    return draw


ORDERS: dict[str, Callable[..., Draw]] = {
    "half_sorted": half_sorted, "class_by_class": class_by_class, "larger_batches": larger_batches,
}  # fmt: skip


def drawn(
    seed: int,
    arm: LogitChange,
    *,
    net: str = "bumpy",
    order: tuple[str, dict[str, Any]] | None = None,
    batch: int = 32,
    loss: str = "cross_entropy",
    noise: float = 0.0,
    **how: Any,
) -> CheckedTraining:
    """Digits in an ``order``. ``noise``: clip gradients at 1 and add so much to each (private training)."""
    x, y = _digits(seed)
    draw = epochs(x, y, size=batch, seed=seed) if order is None else ORDERS[order[0]](x, y, **order[1])

    def blur(model: nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for parameter in model.parameters():
            parameter.grad += noise * torch.randn_like(parameter)

    if noise:
        how["before_update"] = blur
    return trained(_network(net), of_output(LOSSES[loss]), draw, arm, part=part_of(x, y), **how)


def one_hot_squares(z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, F.one_hot(y, z.shape[1]).to(z.dtype))


def at_the_edge(seed: int, arm: LogitChange, *, batch: int | None = None, **how: Any) -> CheckedTraining:
    """Digits by squared error at a high rate: all of 300 rows at each step, or ``batch`` of them."""
    x, y = _digits(seed, 300)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    draw = full_batch(x, y) if batch is None else epochs(x, y, size=batch, seed=seed)
    part = None if batch is None else part_of(x, y)
    return trained(model, of_output(one_hot_squares), draw, arm, part=part, **how)
