"""Tasks, losses and trainings of the second held-out half where slingshots are to be expected."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs
from tests.benchmarks.detection.suites.common import of_output, trained
from tests.benchmarks.detection.suites.held_out_2.networks import of_pictures, of_rows, of_tokens
from tests.benchmarks.detection.training import LogitChange, full_batch

# --- losses ----------------------------------------------------------------------------------------------


def highest_other(z: Tensor, y: Tensor) -> Tensor:
    """max(0, 1 − (right − highest other)), the hinge of Crammer and Singer (2001)."""
    own = z.gather(1, y[:, None]).squeeze(1)
    others = z.scatter(1, y[:, None], -math.inf).amax(1)
    return F.relu(1 - own + others).mean()


def rounded_hinges(z: Tensor, y: Tensor) -> Tensor:
    """A hinge for each class whose corner is a piece of a parabola (Rennie and Srebro 2005)."""
    margin = z * (2 * F.one_hot(y, z.shape[-1]) - 1)
    return torch.where(margin <= 0, 0.5 - margin, 0.5 * F.relu(1 - margin).square()).mean()


def wide_hinges(z: Tensor, y: Tensor) -> Tensor:
    """max(0, 4 − (right − other)), the mean over other classes."""
    return F.multi_margin_loss(z, y, margin=4.0)


def in_order(z: Tensor, y: Tensor) -> Tensor:
    """Of each pair of rows the one with the larger target should be 1 higher."""
    higher = (y > y.T).to(z.dtype)
    return (higher * F.relu(1 - z + z.T)).sum() / higher.sum()


def outside_tube(z: Tensor, y: Tensor) -> Tensor:
    """What an error exceeds 0.1 by (Drucker et al. 1997)."""
    return F.relu((z - y).abs() - 0.1).mean()


def outside_tube_squared(z: Tensor, y: Tensor) -> Tensor:
    return F.relu((z - y).abs() - 0.05).square().mean()


def in_pairs(z: Tensor, y: Tensor) -> Tensor:
    """Rows of one class should be nearer than 0.5, others farther than 1.5."""
    far = (z[:, None] - z[None]).square().sum(-1).add(1e-6).sqrt()
    same = (y[:, None] == y[None]).to(z.dtype)
    return (same * F.relu(far - 0.5) + (1 - same) * F.relu(1.5 - far)).mean()


def counted(z: Tensor, y: Tensor) -> Tensor:
    """Poisson's deviance, half of it: 0 where the rate is the count."""
    return (F.poisson_nll_loss(z, y) - (y - torch.special.xlogy(y, y))).mean()


def binary(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z.squeeze(1), y.to(z.dtype))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy, "highest_other": highest_other, "rounded_hinges": rounded_hinges,
    "wide_hinges": wide_hinges, "in_order": in_order, "outside_tube": outside_tube,
    "outside_tube_squared": outside_tube_squared, "in_pairs": in_pairs, "counted": counted,
    "binary": binary, "squares": F.mse_loss, "huber": lambda z, y: F.huber_loss(z, y.to(z.dtype)),
}  # fmt: skip


# --- tasks -----------------------------------------------------------------------------------------------


def token_rows(task: str, rows: int) -> tuple[Tensor, Tensor, int, int]:
    """(tokens [N, T], class [N], tokens, classes)."""
    if task == "divisors":  # the greatest common divisor
        x = torch.randint(1, 24, (rows, 2))
        return x, torch.gcd(x[:, 0], x[:, 1]).clamp_max(9) - 1, 24, 9
    if task == "weekdays":
        days = torch.randint(0, 30_000, (rows,)).tolist()
        dates = [datetime.date(1950, 1, 1) + datetime.timedelta(day) for day in days]
        digits = [[int(digit) for digit in date.strftime("%Y%m%d")] for date in dates]
        return torch.tensor(digits), torch.tensor([date.weekday() for date in dates]), 10, 7
    if task == "inversions":
        x = torch.rand(rows, 6).argsort(1)
        wrong = (x[:, :, None] > x[:, None]).triu(1).sum((1, 2))
        return x, wrong % 4, 6, 4
    if task == "clock":  # a − b on a clock of eleven hours
        x = torch.cartesian_prod(torch.arange(11), torch.arange(11))[torch.randperm(121)[:rows]]
        return x, (x[:, 0] - x[:, 1]) % 11, 11, 11
    if task == "automaton":  # the middle cell after two steps of rule 30
        x = torch.randint(0, 2, (rows, 9))
        cells = x
        for _ in range(2):
            cells = cells[:, :-2] ^ (cells[:, 1:-1] | cells[:, 2:])
        return x, cells[:, 1] + 2 * cells[:, 3], 2, 4
    raise ValueError(f"task {task!r}")


def number_rows(task: str, rows: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """(numbers [N, D], class [N] or target [N, K], outputs)."""
    if task == "digits":
        x, y = data.digits(rows, seed=seed)
        return x, y, 10
    if task == "board":  # a chessboard of 4 × 4 fields, three colours
        x = 2 * torch.rand(rows, 2) - 1
        field = ((x + 1) * 2).long()
        waves = torch.cat([(k * math.pi * x).sin() for k in (1, 2)], 1)
        return torch.cat([x, waves], 1), (field[:, 0] + 2 * field[:, 1]) % 3, 3
    if task == "regions":  # the nearest of eight points in six dimensions; a tenth of the labels is wrong
        x, centres = torch.randn(rows, 6), torch.randn(8, 6)
        y = torch.cdist(x, centres).argmin(1)
        return x, torch.where(torch.rand(rows) < 0.1, torch.randint(0, 8, (rows,)), y), 8
    if task == "two_signs":  # the sign of a product
        x = torch.randn(rows, 10)
        return x, (x[:, 0] * x[:, 1] * x[:, 2] > 0).long(), 2
    if task == "rings":
        y = torch.arange(rows) % 4
        angle = 2 * math.pi * torch.rand(rows)
        radius = 0.4 + 0.4 * y + 0.1 * torch.randn(rows)
        return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1), y, 4
    x = 2 * torch.rand(rows, 5) - 1
    curve = (3 * x[:, :1] * x[:, 1:2]).sin() + 2 * x[:, 2:3].square() + x[:, 3:4]  # after Friedman (1991)
    if task == "curve":
        return x, curve, 1
    if task == "curves":
        return x, torch.cat([curve, curve.cos(), x[:, 4:] * curve], 1), 3
    if task == "visits":
        return x, torch.poisson(curve.exp().clamp_max(20)), 1
    if task == "pictures":  # the picture itself is wanted
        x = data.digits(rows, seed=seed)[0]
        return x, x, 64
    raise ValueError(f"task {task!r}")


class Mirrored(nn.Module):
    """An autoencoder whose second half has the first one's weights."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, width)
        self.shift = nn.Parameter(torch.zeros(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(self.inner(x)), self.inner.weight.T, self.shift)


# --- trainings -------------------------------------------------------------------------------------------


def _trained(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    arm: LogitChange,
    loss: str,
    batch: int | None,
    seed: int,
    **how: Any,
) -> CheckedTraining:
    """``batch``: rows a step; the loss of all rows is recorded besides."""
    function, how = of_output(LOSSES[loss]), {"decay": 0.0} | how
    if batch is None:
        return trained(model, function, full_batch(x, y), arm, **how)
    draw = epochs(x, y, size=batch, seed=seed)
    return trained(model, function, draw, arm, part=(x, y), check_every=4, **how)  # fmt: skip


def on_tokens(
    seed: int,
    arm: LogitChange,
    *,
    net: str,
    task: str,
    rows: int = 120,
    width: int = 24,
    loss: str = "cross_entropy",
    batch: int | None = None,
    **how: Any,
) -> CheckedTraining:
    torch.manual_seed(seed)
    x, y, tokens, classes = token_rows(task, rows)
    model = of_tokens(net, tokens, x.shape[1], width, classes)
    return _trained(model, x, y, arm, loss, batch, seed, **how)


def on_numbers(
    seed: int,
    arm: LogitChange,
    *,
    net: str,
    task: str,
    rows: int = 120,
    width: int = 40,
    loss: str = "cross_entropy",
    batch: int | None = None,
    low: bool = False,
    **how: Any,
) -> CheckedTraining:
    """``low``: weights and activations are bfloat16."""
    torch.manual_seed(seed)
    x, y, outputs = number_rows(task, rows, seed)
    outputs = 1 if loss == "binary" else outputs
    if net == "mirrored":
        model: nn.Module = Mirrored(x.shape[1], width)
    elif net in ("branches", "averaged", "channel_norm"):
        model = of_pictures(net, width, outputs)
    else:
        model = of_rows(net, x.shape[1], width, outputs)
    if low:
        model, x = model.bfloat16(), x.bfloat16()
    return _trained(model, x, y, arm, loss, batch, seed, **how)
