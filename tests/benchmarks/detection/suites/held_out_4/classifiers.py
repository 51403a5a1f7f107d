"""Ordinary classifiers: full batches at the edge of stability, and minibatches as recipes have them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import of_output, trained
from tests.benchmarks.detection.suites.held_out_4.networks import Kernelised, Places, of_rows
from tests.benchmarks.detection.suites.held_out_4.shared import generator_of
from tests.benchmarks.detection.training import LogitChange, full_batch

# --- full batches ----------------------------------------------------------------------------------------


def _network(name: str, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """(network, inputs, classes): "deep", "convolved" and "pieces" on digits, "read" on text."""
    torch.manual_seed(seed)
    if name == "read":
        x, _ = data.text_windows(100, 8, seed=seed)
        y = ((x >= 65) & (x <= 90)).sum(1).clamp_max(2)
        body = [Places(128, 16, 8), Kernelised(16), nn.Flatten(), nn.Linear(128, 32), nn.ELU()]
        return nn.Sequential(*body, nn.Linear(32, 3)), x, y
    x, y = data.digits(150, seed=seed)
    if name == "deep":
        body = [layer for _ in range(4) for layer in (nn.LazyLinear(48), nn.Tanh())]
        model: nn.Module = nn.Sequential(*body, nn.Linear(48, 10))
    elif name == "convolved":
        model = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ELU(),
            nn.Conv2d(8, 12, 3, padding=1), nn.ELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 10),
        )  # fmt: skip
    else:
        model = of_rows(name, 64, 40, 10)
    model(x[:2])
    return model, x, y


def _to_one_hot(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - F.one_hot(y, z.shape[1])).square().sum(1).mean()


def all_rows(seed: int, arm: LogitChange, *, net: str, squares: bool = False, **how: Any) -> CheckedTraining:
    """All rows at each step, with steps as long as the curvature allows (Cohen et al. 2021)."""
    model, x, y = _network(net, seed)
    loss = _to_one_hot if squares else F.cross_entropy
    return trained(model, of_output(loss), full_batch(x, y), arm, **({"decay": 0.0} | how))


# --- minibatches -----------------------------------------------------------------------------------------


class Sometimes(nn.Module):
    """x + f(x), or x alone for whole rows, at random (Huang et al. 2016)."""

    def __init__(self, width: int, odds: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip
        self.odds = odds

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + (1 - self.odds) * self.inner(x)
        return x + (torch.rand(len(x), 1, 1, 1) > self.odds) * self.inner(x)


def _pictures(odds: float = 0.3) -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.ReLU(), Sometimes(12, odds),
        Sometimes(12, odds), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


def _rows(dropout: float = 0.3) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 72), nn.Softplus(), nn.Dropout(dropout), nn.Linear(72, 72), nn.Softplus(),
        nn.Dropout(dropout), nn.Linear(72, 10),
    )  # fmt: skip


def _erased(x: Tensor, generator: torch.Generator) -> Tensor:
    """A square of 3 × 3 pixels is 0 in each picture (DeVries and Taylor 2017)."""
    place = torch.randint(0, 6, (len(x), 2, 1), generator=generator)
    inside = (torch.arange(8) >= place) & (torch.arange(8) < place + 3)
    return x * ~(inside[:, 0, :, None] & inside[:, 1, None]).flatten(1)


def classes(
    seed: int,
    arm: LogitChange,
    *,
    net: str = "rows",
    batch: int = 32,
    wrong: float = 0.0,
    erase: bool = False,
    low: bool = False,
    **how: Any,
) -> CheckedTraining:
    """Digits. ``wrong``: share of labels by chance. ``low``: weights and numbers of bfloat16."""
    torch.manual_seed(seed)
    x, y = data.digits(1400, seed=seed)
    y = torch.where(torch.rand(len(y)) < wrong, torch.randint(0, 10, (len(y),)), y)
    model: nn.Module = _pictures() if net == "pictures" else _rows()
    if low:
        model, x = model.bfloat16(), x.bfloat16()
    plain = epochs(x, y, size=batch, seed=seed)

    def draw(step: int) -> Any:
        ((rows, target),) = plain(step)
        return [(_erased(rows, generator_of(seed, step)) if erase else rows, target)]

    return trained(model, of_output(F.cross_entropy), draw, arm, part=part_of(x, y), **how)


def agreeing(
    seed: int, arm: LogitChange, *, batch: int = 32, share: float = 1.0, **how: Any
) -> CheckedTraining:
    """Each row twice through dropout; the two answers should be alike (Liang et al. 2021)."""
    torch.manual_seed(seed)
    x, y = data.digits(600, seed=seed)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        rows, target = given
        z = training.arm(training.model(torch.cat([rows, rows])))
        one, other = (half.log_softmax(1) for half in z.chunk(2))
        apart = F.kl_div(one, other, reduction="batchmean", log_target=True)
        apart = apart + F.kl_div(other, one, reduction="batchmean", log_target=True)
        return F.cross_entropy(z, target.repeat(2)) + 0.5 * share * apart

    draw = epochs(x, y, size=batch, seed=seed)
    return trained(_rows(0.4), loss, draw, arm, part=part_of(x, y), **how)


class InBetween(nn.Module):
    """What the first layer makes of a row may be mixed with what it makes of another row."""

    def __init__(self, width: int = 56) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(64, width), of_rows("absolute", width, width, 10)

    def forward(self, given: tuple[Tensor, Tensor, float]) -> Tensor:
        x, other, share = given
        inner = self.first(x).relu()
        return self.rest(share * inner + (1 - share) * inner[other])


def in_between(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """Features of two rows are mixed, and so is the loss (Verma et al. 2019)."""
    torch.manual_seed(seed)
    x, y = data.digits(1400, seed=seed)
    plain = epochs(x, y, size=batch, seed=seed)

    def draw(step: int) -> Any:
        generator = generator_of(seed, step)
        share = 0.5 + 0.5 * float(torch.rand((), generator=generator))
        ((rows, target),) = plain(step)
        other = torch.randperm(batch, generator=generator)
        return [((rows, other, share), target, target[other], share)]

    def loss(z: Tensor, one: Tensor, two: Tensor, share: float) -> Tensor:
        return share * F.cross_entropy(z, one) + (1 - share) * F.cross_entropy(z, two)

    part = (x[:256], torch.arange(256), 1.0), y[:256], y[:256], 1.0
    return trained(InBetween(), of_output(loss), draw, arm, part=part, **how)


def long_tail(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """Few rows of late classes; a class's log share is added to its logit (Menon et al. 2021)."""
    torch.manual_seed(seed)
    x, y = data.digits(None, seed=seed)
    kept = torch.rand(len(y)) < 0.7 ** y.float()
    x, y = x[kept], y[kept]
    odds = (torch.bincount(y, minlength=10) / len(y)).log()
    model = of_rows("pieces", 64, 48, 10)
    loss = of_output(lambda z, wanted: F.cross_entropy(z + odds, wanted))
    return trained(model, loss, epochs(x, y, size=batch, seed=seed), arm, part=part_of(x, y), **how)


# --- curricula -------------------------------------------------------------------------------------------


def harder(seed: int, arm: LogitChange, *, batch: int = 32, full: int = 1500, **how: Any) -> CheckedTraining:
    """Digits that are turned, and noisy, more and more: by up to 40 degrees from step ``full`` on."""
    torch.manual_seed(seed)
    x, y = data.digits(1400, seed=seed)
    plain = epochs(x, y, size=batch, seed=seed)

    def changed(rows: Tensor, level: float, number: int) -> Tensor:
        generator = generator_of(seed, number)
        angle = level * 0.7 * (2 * torch.rand(len(rows), generator=generator) - 1)
        turn = torch.stack([angle.cos(), -angle.sin(), 0 * angle, angle.sin(), angle.cos(), 0 * angle], 1)
        grid = F.affine_grid(turn.reshape(-1, 2, 3), [len(rows), 1, 8, 8], align_corners=False)
        turned = F.grid_sample(rows.reshape(-1, 1, 8, 8), grid, align_corners=False).flatten(1)
        return turned + 0.2 * level * torch.randn(rows.shape, generator=generator)

    def draw(step: int) -> Any:
        ((rows, target),) = plain(step)
        return [(changed(rows, min(step / full, 1.0), step), target)]

    part = changed(x[:256], 1.0, 0), y[:256]
    return trained(_rows(0.1), of_output(F.cross_entropy), draw, arm, part=part, **how)


def more_classes(
    seed: int, arm: LogitChange, *, batch: int = 32, every: int = 500, **how: Any
) -> CheckedTraining:
    """A new class every so many steps, at first as a few rows of each batch; the others keep coming."""
    torch.manual_seed(seed)
    x, y = data.digits(1400, seed=seed)

    def draw(step: int) -> Any:
        known = 6 + min((step - 1) // every, 4)
        share = min(((step - 1) % every + 20) / every, 1.0) if 6 < known < 10 else 1.0
        weight = (y < known) * torch.where(y == known - 1, share, 1.0)
        chosen = weight.multinomial(batch, generator=generator_of(seed, step))
        return [(x[chosen], y[chosen])]

    return trained(_pictures(0.1), of_output(F.cross_entropy), draw, arm, part=part_of(x, y), **how)


# --- a stream that drifts ----------------------------------------------------------------------------------


def drifting(
    seed: int, arm: LogitChange, *, batch: int = 48, turn: float = 1e-3, **how: Any
) -> CheckedTraining:
    """Two classes whose border turns slowly for ever; no loss of a fixed part is recorded."""
    torch.manual_seed(seed)

    def draw(step: int) -> Any:
        x = torch.randn(batch, 6, generator=generator_of(seed, step))
        angle = 2 * math.pi * turn * step
        side = math.cos(angle) * x[:, 0] + math.sin(angle) * x[:, 1] + 0.3 * x[:, 2] * x[:, 3]
        return [(x, (side > 0).long())]

    return trained(of_rows("sorted", 6, 32, 2), of_output(F.cross_entropy), draw, arm, **how)
