"""Ordinary trainings on rows: categories, ranks, mixed pictures, few labels, pruning, averages of weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import of_output, trained
from tests.benchmarks.detection.suites.held_out_2.shared import generator_of
from tests.benchmarks.detection.training import LogitChange

# --- tables ----------------------------------------------------------------------------------------------


class Categories(nn.Module):
    """An embedding for each column of categories, numbers beside them (Guo and Berkhahn 2016)."""

    def __init__(self, sizes: tuple[int, ...], numbers: int, outputs: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, min(size // 2 + 1, 8)) for size in sizes)
        width = sum(min(size // 2 + 1, 8) for size in sizes) + numbers
        self.inner = nn.Sequential(
            nn.BatchNorm1d(width), nn.Linear(width, 48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 24),
            nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(24, outputs)

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        kinds, numbers = given
        columns = [embedding(kinds[:, k]) for k, embedding in enumerate(self.embeddings)]
        return self.head(self.inner(torch.cat([*columns, numbers], 1)))


def log_cosh(z: Tensor, y: Tensor) -> Tensor:
    far = (z - y).abs()
    return (far + F.softplus(-2 * far) - math.log(2)).mean()


def ranks(z: Tensor, y: Tensor) -> Tensor:
    """One score and a threshold below each rank but the lowest (Cao et al. 2020)."""
    higher = (y[:, None] > torch.arange(z.shape[1])).to(z.dtype)
    return F.binary_cross_entropy_with_logits(z, higher)


class Thresholds(nn.Module):
    """The same score minus a threshold for each rank."""

    def __init__(self, inner: nn.Module, count: int) -> None:
        super().__init__()
        self.inner, self.levels = inner, nn.Parameter(torch.linspace(-1, 1, count))

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        return self.inner(given) - self.levels


def shops(seed: int, arm: LogitChange, *, task: str, batch: int = 64, **how: Any) -> CheckedTraining:
    """Made-up sales. ``task``: "sold" or not, the "amount", or one of five "ranks" of the amount."""
    torch.manual_seed(seed)
    sizes, rows = (40, 12, 7, 3), 3000
    kinds = torch.stack([torch.randint(0, size, (rows,)) for size in sizes], 1)
    numbers = torch.randn(rows, 4)
    worth = sum(torch.randn(size)[kinds[:, k]] for k, size in enumerate(sizes))
    amount = worth + numbers[:, 0] * (kinds[:, 3] - 1) + numbers[:, 1].relu() + 0.5 * torch.randn(rows)
    if task == "sold":
        model: nn.Module = Categories(sizes, 4, 1)
        loss: Callable[..., Tensor] = lambda z, y: F.binary_cross_entropy_with_logits(z.squeeze(1), y)  # noqa: E731
        target = (amount > 0.5).float()
    elif task == "amount":
        model, loss, target = Categories(sizes, 4, 1), log_cosh, amount[:, None]
    else:
        model, loss = Thresholds(Categories(sizes, 4, 1), 4), ranks
        target = torch.bucketize(amount, amount.quantile(torch.tensor([0.2, 0.4, 0.6, 0.8])))
    plain = epochs(kinds, numbers, target, size=batch, seed=seed)

    def draw(step: int) -> Any:
        ((some, their, wanted),) = plain(step)
        return [((some, their), wanted)]

    part = ((kinds[:256], numbers[:256]), target[:256])
    watch = {} if task != "ranks" else {"head": "inner.head"}
    return trained(model, of_output(loss), draw, arm, part=part, watch=watch, **how)


# --- digits ----------------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """A perceptron whose last layer is a product of the code, no module's output."""

    def __init__(self, width: int = 64, dropout: float = 0.3) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU(),
            nn.Dropout(dropout),
        )  # fmt: skip
        self.w = nn.Parameter(torch.randn(width, 10) * width**-0.5)
        self.b = nn.Parameter(torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self.w + self.b


class Dropping(nn.Module):
    """Residual convolutions, each left out now and then (Huang et al. 2016); whole channels drop out."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(3, width) for _ in range(2))
        self.dropout = nn.Dropout2d(0.1)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.reshape(-1, 1, 8, 8))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            if not self.training or float(torch.rand(())) < 0.9:
                x = x + self.dropout(layer(F.relu(norm(x))))
        return self.fc(F.relu(x).mean((2, 3)))


def _rows(seed: int, rows: int = 1500) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return data.digits(rows, seed=seed)


def by_hand(
    seed: int, arm: LogitChange, *, batch: int = 32, low: bool = False, **how: Any
) -> CheckedTraining:
    """``low``: the forward pass runs under autocast in bfloat16; the loss in float32."""
    x, y = _rows(seed)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            z = training.arm(training.model(given[0]))
        return F.cross_entropy(z.float(), given[1])

    return trained(ByHand(), loss, epochs(x, y, size=batch, seed=seed), arm, part=part_of(x, y), **how)


def pasted(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """CutMix (Yun et al. 2019): a rectangle of another picture, and its share of the target."""
    x, y = _rows(seed)
    plain = epochs(x, y, size=batch, seed=seed)

    def draw(step: int) -> Any:
        ((rows, target),), generator = plain(step), generator_of(seed, step)
        other = torch.randperm(len(rows), generator=generator)
        high, wide = torch.randint(1, 6, (2,), generator=generator).tolist()
        top, left = torch.randint(0, 3, (2,), generator=generator).tolist()
        shown = rows.reshape(-1, 8, 8).clone()
        shown[:, top : top + high, left : left + wide] = shown[other, top : top + high, left : left + wide]
        return [(shown.flatten(1), target, target[other], high * wide / 64)]

    def loss(z: Tensor, target: Tensor, other: Tensor, share: float) -> Tensor:
        return (1 - share) * F.cross_entropy(z, target) + share * F.cross_entropy(z, other)

    return trained(Dropping(), of_output(loss), draw, arm, part=(*part_of(x, y), y[:256], 0.0), **how)


def few_labels(seed: int, arm: LogitChange, *, labelled: int = 150, **how: Any) -> CheckedTraining:
    """Sure answers of the network itself are labels of other rows, seen with noise (Sohn et al. 2020)."""
    x, y = _rows(seed)
    known, others = epochs(x[:labelled], y[:labelled], size=16, seed=seed), epochs(x, size=48, seed=seed + 1)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Hardswish(), nn.Linear(64, 64), nn.Hardswish(),
        nn.Linear(64, 10),
    )  # fmt: skip

    def draw(step: int) -> Any:
        (rows,) = others(step)[0]
        noise = 0.3 * torch.randn(rows.shape, generator=generator_of(seed, step))
        return [(*known(step)[0], rows, rows + noise)]

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        rows, target, plain, noisy = given
        z = training.model(torch.cat([rows, plain, noisy]))
        own, sure, asked = z.split([len(rows), len(plain), len(noisy)])
        odds, label = sure.detach().softmax(-1).max(-1)
        each = F.cross_entropy(asked, label, reduction="none") * (odds > 0.95)
        return F.cross_entropy(own, target) + each.mean()

    part_loss = of_output(F.cross_entropy)
    part = (x[:labelled], y[:labelled])
    return trained(model, loss, draw, arm, part=part, part_loss=part_loss, **how)


def pruned(
    seed: int, arm: LogitChange, *, every: int = 200, last: int = 3000, goal: float = 0.9, **how: Any
) -> CheckedTraining:
    """The smallest weights are set to zero, more of them every 200 steps (Zhu and Gupta 2018)."""
    x, y = _rows(seed)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    matrices = [model[0].weight, model[2].weight]
    masks = [torch.ones_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def prune(training: Any, number: int) -> None:
        if number % every == 0 and number <= last:
            share = goal * (1 - (1 - number / last) ** 3)
            for matrix, mask in zip(matrices, masks, strict=True):
                mask.copy_(matrix.abs() > matrix.abs().quantile(share))
        for matrix, mask in zip(matrices, masks, strict=True):
            matrix.mul_(mask)

    draw = epochs(x, y, size=32, seed=seed)
    loss = of_output(F.cross_entropy)
    return trained(model, loss, draw, arm, part=part_of(x, y), after_update=prune, **how)


def thawed(seed: int, arm: LogitChange, *, at: int = 2000, **how: Any) -> CheckedTraining:
    """Features learned by turning pictures; a head alone, and all of it from step 2,000 on."""
    x, y = _rows(seed)
    trunk = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU())
    turns, turn = torch.randint(0, 4, (1500,)), nn.Linear(48, 4)
    turned = torch.stack(
        [torch.rot90(row.reshape(8, 8), int(k)).flatten() for row, k in zip(x, turns, strict=True)]
    )
    before = torch.optim.AdamW([*trunk.parameters(), *turn.parameters()])
    warm = epochs(turned, turns, size=64, seed=seed)
    for number in range(1, 400):
        rows, target = warm(number)[0]
        F.cross_entropy(turn(trunk(rows)), target).backward()
        before.step()
        before.zero_grad()
    trunk.requires_grad_(False)
    model = nn.Sequential(*trunk, nn.Linear(48, 10))

    def thaw(training: Any, number: int) -> None:
        if number == at:
            trunk.requires_grad_(True)
            training.optimizer.add_param_group({"params": list(trunk.parameters()), "lr": 1e-4})

    draw, loss = epochs(x, y, size=32, seed=seed), of_output(F.cross_entropy)
    return trained(model, loss, draw, arm, part=part_of(x, y), after_update=thaw, **how)


def averaged(seed: int, arm: LogitChange, *, every: int = 100, **how: Any) -> CheckedTraining:
    """Weights are averaged every 100 steps (Izmailov et al. 2018); a network of depth-wise pieces."""
    x, y = _rows(seed)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 2, stride=2), nn.GELU(), nn.BatchNorm2d(12),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.GELU(), nn.BatchNorm2d(12), nn.Conv2d(12, 24, 1),
        nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(96, 10),
    )  # fmt: skip
    average = torch.optim.swa_utils.AveragedModel(model)

    def keep(training: Any, number: int) -> None:
        if number % every == 0:
            average.update_parameters(training.model)

    draw, loss = epochs(x, y, size=32, seed=seed), of_output(F.cross_entropy)
    return trained(model, loss, draw, arm, part=part_of(x, y), after_update=keep, **how)


class Doubtful(nn.Module):
    """A linear layer with a Gaussian for each weight (Blundell et al. 2015)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)
        self.spread = nn.Parameter(torch.full((outputs, inputs), -4.0))

    def forward(self, x: Tensor) -> Tensor:
        centre = F.linear(x, self.mean)
        if not self.training:
            return centre
        return centre + F.linear(x.square(), F.softplus(self.spread).square()).add(1e-9).sqrt() * torch.randn(
            centre.shape
        )

    def divergence(self) -> Tensor:
        spread = F.softplus(self.spread)
        return (0.5 * (self.mean.square() + spread.square() - 1) - spread.log()).sum()


def doubtful(seed: int, arm: LogitChange, *, share: float = 0.1, **how: Any) -> CheckedTraining:
    """Cross-entropy + a share of the weights' divergence from their prior, per row."""
    x, y = _rows(seed)
    model = nn.Sequential(Doubtful(64, 32), nn.ReLU(), Doubtful(32, 10))

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        apart = training.model[0].divergence() + training.model[2].divergence()
        return F.cross_entropy(training.model(given[0]), given[1]) + share * apart / len(x)

    draw = epochs(x, y, size=32, seed=seed)
    return trained(model, loss, draw, arm, part=part_of(x, y), watch={"head": False}, **how)


class Conditioned(nn.Module):
    """A small network makes the weights of another one from a task's code (Ha et al. 2017)."""

    def __init__(self, codes: int, width: int = 12) -> None:
        super().__init__()
        self.codes = nn.Embedding(codes, 6)
        self.maker = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3 * width + 1))

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        which, x = given
        made = self.maker(self.codes(which))
        first, shift, second = made[:, :-1].chunk(3, -1)
        return ((x * first + shift).tanh() * second).sum(-1) + made[:, -1]


def waves(seed: int, arm: LogitChange, *, batch: int = 64, **how: Any) -> CheckedTraining:
    """Thirty sine waves, each of its own speed and phase, from noisy points."""
    torch.manual_seed(seed)
    which = torch.randint(0, 30, (3000,))
    speed, phase = 0.5 + torch.rand(30), 6.28 * torch.rand(30)
    x = 4 * torch.rand(3000, 1) - 2
    y = (speed[which] * x[:, 0] + phase[which]).sin() + 0.1 * torch.randn(3000)
    plain = epochs(which, x, y, size=batch, seed=seed)

    def draw(step: int) -> Any:
        ((some, their, wanted),) = plain(step)
        return [((some, their), wanted)]

    part = ((which[:256], x[:256]), y[:256])
    loss = of_output(F.smooth_l1_loss)
    return trained(Conditioned(30), loss, draw, arm, part=part, watch={"head": False}, **how)
