"""Tasks, losses and trainings of the fifth held-out half where slingshots are to be expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs
from tests.benchmarks.detection.suites.common import of_output, standardised, trained
from tests.benchmarks.detection.suites.held_out_3.unstable import Autocast
from tests.benchmarks.detection.suites.held_out_5.networks import of_rows, of_tokens
from tests.benchmarks.detection.training import LogitChange, full_batch

# --- losses ----------------------------------------------------------------------------------------------


def _behind(z: Tensor, y: Tensor) -> Tensor:
    """By how much the right class is less than 1 above the best other one (Crammer and Singer 2001)."""
    others = z.masked_fill(F.one_hot(y, z.shape[1]).bool(), -math.inf).amax(1)
    return F.relu(1 - z.gather(1, y[:, None]).squeeze(1) + others)


def far_behind(z: Tensor, y: Tensor) -> Tensor:
    """A line beyond 1, a square below."""
    behind = _behind(z, y)
    return torch.where(behind > 1, 2 * behind - 1, behind.square()).mean()


def to_corners(z: Tensor, y: Tensor) -> Tensor:
    """Squares of what is missing to 1 at the right class and above 0 at the others."""
    own = F.one_hot(y, z.shape[1]).to(z.dtype)
    return (own * F.relu(1 - z).square() + (1 - own) * F.relu(z).square()).sum(1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "behind_squared": lambda z, y: _behind(z, y).square().mean(),
    "far_behind": far_behind,
    "to_corners": to_corners,
    "focal": lambda z, y: ((1 - z.softmax(1).gather(1, y[:, None])) ** 2).mean() * F.cross_entropy(z, y),
    "squares": F.mse_loss,
    "cubes": lambda z, y: (z - y).abs().pow(3).mean(),
    "of_sines": lambda z, y: (z.sin() - y.sin()).square().mean() + (z.cos() - y.cos()).square().mean(),
    "whitened": lambda z, y: ((z - y) / (0.3 + y.std(0))).square().mean(),
}


# --- tasks -----------------------------------------------------------------------------------------------


def token_rows(task: str, rows: int) -> tuple[Tensor, Tensor, int, int]:
    """(tokens [N, T], class [N], tokens, classes)."""
    if task == "three_summands":
        table = torch.cartesian_prod(*(torch.arange(7) for _ in range(3)))
        table = table[torch.randperm(len(table))[:rows]]
        return table, (table * torch.tensor([1, 2, 3])).sum(1) % 7, 7, 7
    if task == "divisor":
        table = torch.cartesian_prod(torch.arange(1, 19), torch.arange(1, 19))
        table = table[torch.randperm(len(table))[:rows]]
        return table, torch.gcd(table[:, 0], table[:, 1]).clamp_max(6) - 1, 19, 6
    if task == "mirrors":  # how many of the outer pairs are equal
        x = torch.randint(0, 3, (rows, 8))
        return x, (x == x.flip(1))[:, :4].cumprod(1).sum(1), 3, 5
    if task == "first_again":  # the place at which a token comes for the second time
        x = torch.randint(0, 6, (rows, 7))
        again = torch.stack([(x[:, :k] == x[:, k : k + 1]).any(1) for k in range(1, 7)], 1)
        return x, torch.where(again.any(1), again.long().argmax(1), 6), 6, 7
    if task == "codes":  # labels of chance
        x = torch.randint(0, 4, (rows, 6))
        return x, torch.randint(0, 5, (rows,)), 4, 5
    raise ValueError(f"task {task!r}")


def number_rows(task: str, rows: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """(numbers [N, D], class [N] or target [N, K], outputs)."""
    if task == "checkers":
        x = 4 * torch.rand(rows, 3)
        return x - 2, x[:, :2].floor().sum(1).long() % 2 + 2 * (x[:, 2] > 2).long(), 4
    if task == "signs":
        x = torch.randn(rows, 8)
        return x, (x[:, :3].prod(1) > 0).long() + (x[:, 3:5].prod(1) > 0).long(), 3
    if task == "upper_half":
        x, y = data.digits(rows, seed=seed)
        return x[:, :32], y, 10
    if task == "chance":
        return torch.randn(rows, 10), torch.randint(0, 6, (rows,)), 6
    if task == "wine_of_two":  # the differences of two wines, and their classes
        from sklearn import datasets

        found = datasets.load_wine()
        x, y = standardised(torch.tensor(found.data).float()), torch.tensor(found.target)
        a, b = torch.randint(0, len(x), (2, rows))
        return x[a] - x[b], 3 * y[a] + y[b], 9
    if task == "friedman":
        from sklearn import datasets

        found = datasets.make_friedman1(rows, n_features=6, random_state=seed)
        x, y = (standardised(torch.tensor(part).float().reshape(rows, -1)) for part in found)
        return x, y, 1
    if task == "pendulum":  # angle and speed → both after half a second
        start = torch.stack([6 * torch.rand(rows) - 3, 4 * torch.rand(rows) - 2], 1)
        angle, speed = start.unbind(1)
        for _ in range(50):
            speed = speed - 0.01 * (9.8 * angle.sin() + 0.2 * speed)
            angle = angle + 0.01 * speed
        return start, torch.stack([angle, speed], 1), 2
    if task == "ellipses":  # three points of an ellipse → its axes and its angle
        axes = 0.5 + torch.rand(rows, 2)
        turn, at = math.pi * torch.rand(rows, 1), 2 * math.pi * torch.rand(rows, 3)
        x, y = axes[:, :1] * at.cos(), axes[:, 1:] * at.sin()
        points = torch.cat([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], 1)
        return points, torch.cat([axes, (2 * turn).cos()], 1), 3
    if task == "chirps":
        x = 2 * torch.rand(rows, 1) - 1
        return (
            torch.cat([x, x.square(), x.pow(3)], 1),
            torch.cat([(9 * x.square()).sin(), (7 * x).cos()], 1),
            2,
        )
    if task == "sugar":  # scikit-learn's diabetes
        from sklearn import datasets

        found = datasets.load_diabetes()
        x, y = (torch.tensor(part).float() for part in (found.data, found.target))
        chosen = torch.randperm(len(x))[:rows]
        return standardised(x[chosen]), standardised(y[chosen, None]), 1
    raise ValueError(f"task {task!r}")


# --- trainings -------------------------------------------------------------------------------------------


def _trained(
    model: Any, x: Tensor, y: Tensor, arm: LogitChange, seed: int, *, loss: str = "cross_entropy",
    batch: int | None = None, low: bool = False, **how: Any,
) -> CheckedTraining:  # fmt: skip
    """``batch``: rows a step; the loss of all rows is recorded besides. ``low``: autocast in bfloat16."""
    function, how = of_output(LOSSES[loss]), {"decay": 0.0} | how
    model = Autocast(model) if low else model
    if batch is None:
        return trained(model, function, full_batch(x, y), arm, **how)
    draw = epochs(x, y, size=batch, seed=seed)
    return trained(model, function, draw, arm, part=(x, y), check_every=4, **how)


def on_tokens(
    seed: int, arm: LogitChange, *, net: str, task: str, rows: int = 120, width: int = 24, **how: Any
) -> CheckedTraining:
    torch.manual_seed(seed)
    x, y, tokens, classes = token_rows(task, rows)
    return _trained(of_tokens(net, tokens, x.shape[1], width, classes), x, y, arm, seed, **how)


def on_numbers(
    seed: int, arm: LogitChange, *, net: str, task: str, rows: int = 120, width: int = 40, **how: Any
) -> CheckedTraining:
    torch.manual_seed(seed)
    x, y, outputs = number_rows(task, rows, seed)
    return _trained(of_rows(net, x.shape[1], width, outputs), x, y, arm, seed, **how)
