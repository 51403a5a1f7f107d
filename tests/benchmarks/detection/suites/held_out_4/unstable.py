"""Tasks, losses and trainings of the fourth held-out half where slingshots are to be expected."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs
from tests.benchmarks.detection.suites.common import of_output, standardised, trained
from tests.benchmarks.detection.suites.held_out_3.unstable import Autocast, later
from tests.benchmarks.detection.suites.held_out_4.networks import of_rows, of_tokens
from tests.benchmarks.detection.training import LogitChange, full_batch

# --- losses ----------------------------------------------------------------------------------------------


def against_mean(z: Tensor, y: Tensor) -> Tensor:
    """Squared hinge between the right class and the mean of all others."""
    own = z.gather(1, y[:, None]).squeeze(1)
    others = (z.sum(1) - own) / (z.shape[1] - 1)
    return F.relu(1 - own + others).square().mean()


def modified_huber(z: Tensor, y: Tensor) -> Tensor:
    """A squared hinge for each class that is a line where a row is far on the wrong side (Zhang 2004)."""
    margin = z * (2 * F.one_hot(y, z.shape[-1]) - 1)
    return torch.where(margin < -1, -4 * margin, F.relu(1 - margin).square()).mean()


def each_squared(z: Tensor, y: Tensor) -> Tensor:
    """A squared hinge for each class, as an L2-SVM in the place of a softmax has it (Tang 2013)."""
    margin = z * (2 * F.one_hot(y, z.shape[-1]) - 1)
    return F.relu(1 - margin).square().mean()


def apart_by_angle(z: Tensor, y: Tensor) -> Tensor:
    """Rows of one class should have a cosine above 0.9, others one below 0; squared."""
    near = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T
    same = (y[:, None] == y[None]).to(z.dtype)
    return (same * F.relu(0.9 - near).square() + (1 - same) * F.relu(near).square()).mean()


def with_squares(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy and the mean square of the other logits (Hui et al. 2023)."""
    others = z.scatter(1, y[:, None], 0.0).square().sum(1) / (z.shape[1] - 1)
    return F.cross_entropy(z, y) + others.mean()


def truncated(z: Tensor, y: Tensor) -> Tensor:
    """(1 − p^0.7) / 0.7 of the right class (Zhang and Sabuncu 2018)."""
    return ((1 - z.softmax(1).gather(1, y[:, None]).pow(0.7)) / 0.7).mean()


def rooted(z: Tensor, y: Tensor) -> Tensor:
    """sqrt(1 + e²) − 1."""
    return ((1 + (z - y).square()).sqrt() - 1).mean()


def relative(z: Tensor, y: Tensor) -> Tensor:
    """Squares of errors as shares of the target's size."""
    return ((z - y) / (0.2 + y.abs())).square().mean()


def quartic(z: Tensor, y: Tensor) -> Tensor:
    far = (z - y).square()
    return (far + 0.5 * far.square()).mean()


def explained(z: Tensor, y: Tensor) -> Tensor:
    """1 − the correlation of each output with its target."""
    z, y = z - z.mean(0), y - y.mean(0)
    return (1 - (z * y).sum(0) / (z.norm(dim=0) * y.norm(dim=0)).clamp_min(1e-9)).mean()


def one_hot_squares(z: Tensor, y: Tensor) -> Tensor:
    """Squares to one-hot targets, the right class weighs more (Hui and Belkin 2021)."""
    wanted = F.one_hot(y, z.shape[1]).to(z.dtype)
    return ((1 + 4 * wanted) * (z - 2 * wanted).square()).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy, "against_mean": against_mean, "modified_huber": modified_huber,
    "each_squared": each_squared, "apart_by_angle": apart_by_angle, "with_squares": with_squares,
    "truncated": truncated, "rooted": rooted, "relative": relative, "quartic": quartic,
    "explained": explained, "one_hot_squares": one_hot_squares, "squares": F.mse_loss,
    "hinges": F.multi_margin_loss, "squared_hinges": lambda z, y: F.multi_margin_loss(z, y, p=2),
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.05),
}  # fmt: skip


# --- tasks -----------------------------------------------------------------------------------------------


def _collatz(number: int) -> int:
    """Steps from a number to 1."""
    steps = 0
    while number > 1:
        number, steps = (number // 2 if number % 2 == 0 else 3 * number + 1), steps + 1
    return steps


def _longest_run(x: Tensor) -> Tensor:
    """How many equal tokens stand side by side at most."""
    now = torch.ones(len(x), dtype=torch.long)
    most = now
    for k in range(1, x.shape[1]):
        now = torch.where(x[:, k] == x[:, k - 1], now + 1, 1)
        most = torch.maximum(most, now)
    return most


def _changes(a: Tensor, b: Tensor) -> Tensor:
    """Edits that make one word of another (Levenshtein)."""
    length = a.shape[1]
    row = [torch.full((len(a),), k) for k in range(length + 1)]
    for i in range(length):
        last, row = row, [torch.full((len(a),), i + 1)]
        for j in range(length):
            wrong = last[j] + (a[:, i] != b[:, j]).long()
            row.append(torch.minimum(torch.minimum(last[j + 1], row[j]) + 1, wrong))
    return row[-1]


def token_rows(task: str, rows: int) -> tuple[Tensor, Tensor, int, int]:
    """(tokens [N, T], class [N], tokens, classes)."""
    if task == "powers":  # a^b mod 13
        table = torch.tensor([(a, b, pow(a, b, 13)) for a in range(13) for b in range(12)])
        table = table[torch.randperm(len(table))[:rows]]
        return table[:, :2], table[:, 2], 13, 13
    if task == "collatz":  # how far the number of four digits is from 1, in five parts
        numbers = torch.randint(1, 2000, (rows,))
        far = torch.tensor([_collatz(number) for number in numbers.tolist()])
        digits = numbers[:, None] // 10 ** torch.arange(4) % 10
        return digits, (far // 30).clamp_max(4), 10, 5
    if task == "games":  # scissors, stone and paper: who is left after all have played the next one
        x = torch.randint(0, 3, (rows, 7))
        left = x[:, 0]
        for k in range(1, 7):
            left = torch.where((x[:, k] - left) % 3 == 1, x[:, k], left)
        return x, left, 3, 3
    if task == "runs":
        x = torch.randint(0, 3, (rows, 10))
        return x, _longest_run(x).clamp_max(5) - 1, 3, 5
    if task == "edits":
        x = torch.randint(0, 3, (rows, 10))
        return x, _changes(x[:, :5], x[:, 5:]), 3, 6
    if task == "square_of_chance":  # a Latin square whose rows, columns and signs are shuffled
        turns = [torch.randperm(12) for _ in range(3)]
        x = torch.cartesian_prod(torch.arange(12), torch.arange(12))[torch.randperm(144)[:rows]]
        return x, turns[2][(turns[0][x[:, 0]] + turns[1][x[:, 1]]) % 12], 12, 12
    if task == "queens":  # whether two queens on a small board see each other, and how
        fields = list(itertools.product(range(6), range(6), range(6), range(6)))
        x = torch.tensor(fields)[torch.randperm(len(fields))[:rows]]
        down, across = (x[:, 0] - x[:, 2]).abs(), (x[:, 1] - x[:, 3]).abs()
        return x, torch.where(down == across, 2, torch.where(down * across == 0, 1, 0)), 6, 3
    if task == "middles":  # which of five numbers is the median
        x = torch.rand(rows, 5).argsort(1)
        return x, (x == 2).long().argmax(1), 5, 5
    raise ValueError(f"task {task!r}")


def _circuits(rows: int) -> tuple[Tensor, Tensor]:
    """Two numbers of four bits; the upper bits of their product."""
    x = torch.randint(0, 2, (rows, 8))
    a, b = ((half * 2 ** torch.arange(4)).sum(1) for half in x.chunk(2, 1))
    return 2.0 * x - 1, (a * b) // 38


def _arm(rows: int) -> tuple[Tensor, Tensor]:
    """Angles of a robot's arm of three parts, and where its hand is."""
    angles = math.pi * (2 * torch.rand(rows, 3) - 1) / 1.5
    along = angles.cumsum(1)
    length = torch.tensor([1.0, 0.7, 0.4])
    hand = torch.stack([(length * along.cos()).sum(1), (length * along.sin()).sum(1)], 1)
    return angles, hand


def _weather(rows: int) -> tuple[Tensor, Tensor]:
    """A point near Lorenz's attractor (1963), and where it is a fifth of a unit of time later."""
    points = torch.randn(rows, 3) * torch.tensor([7.0, 8.0, 8.0]) + torch.tensor([0.0, 0.0, 24.0])

    def moved(points: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x, y, z = points.unbind(1)
            points = points + 0.01 * torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], 1)
        return points

    start = moved(points, 60)
    return standardised(start), standardised(moved(start, 20))


def number_rows(task: str, rows: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """(numbers [N, D], class [N] or target [N, K], outputs)."""
    if task == "moons":  # two moons and a point between them, with a sine of each coordinate
        from sklearn import datasets

        x, y = (torch.tensor(part) for part in datasets.make_moons(rows, noise=0.15, random_state=seed))
        x = x.float()
        middle = (x - torch.tensor([0.5, 0.25])).norm(dim=1) < 0.35
        return torch.cat([x, (3 * x).sin()], 1), torch.where(middle, 2, y), 3
    if task == "shells":  # how far from the middle, in five parts of equal size
        x = torch.randn(rows, 5)
        far = x.norm(dim=1)
        return x, torch.bucketize(far, far.quantile(torch.tensor([0.2, 0.4, 0.6, 0.8]))), 5
    if task == "monks":  # the first of MONK's problems, and a third class (Thrun et al. 1991)
        sizes = torch.tensor([3, 3, 2, 3, 4, 2])
        x = (torch.rand(rows, 6) * sizes).long()
        y = torch.where(x[:, 0] == x[:, 1], 1, torch.where(x[:, 4] == 0, 2, 0))
        return torch.cat([F.one_hot(x[:, k], int(size)) for k, size in enumerate(sizes)], 1).float(), y, 3
    if task == "circuits":
        return *_circuits(rows), 6
    if task == "turned":  # by how many quarters a digit is turned
        x, _ = data.digits(rows, seed=seed)
        y = torch.arange(len(x)) % 4
        turned = [torch.rot90(row.reshape(8, 8), int(k)).flatten() for row, k in zip(x, y, strict=True)]
        return torch.stack(turned), y, 4
    if task == "labels_of_chance":
        return torch.randn(rows, 12), torch.randint(0, 8, (rows,)), 8
    if task == "vowels":  # which of six sums of two waves
        y = torch.arange(rows) % 6
        pitch = 0.3 + 0.1 * torch.rand(rows, 1)
        time = pitch * torch.arange(32) + 6 * torch.rand(rows, 1)
        return (2 * time).sin() + ((3 + y[:, None]) * time).cos() + 0.3 * torch.randn(rows, 32), y, 6
    if task == "arm":
        return *_arm(rows), 2
    if task == "weather":
        return *_weather(rows), 3
    if task == "impedance":  # the second of Friedman's (1991)
        from sklearn import datasets

        found = datasets.make_friedman2(rows, random_state=seed)
        x, y = (standardised(torch.tensor(part).float().reshape(rows, -1)) for part in found)
        return x, y, 1
    if task == "ripples":
        x = 2 * torch.rand(rows, 2) - 1
        far = 6 * x.norm(dim=1, keepdim=True)
        return x, torch.cat([far.sin() / (0.3 + far) * 3, (2 * x[:, :1]).sin() * x[:, 1:]], 1), 2
    raise ValueError(f"task {task!r}")


# --- trainings -------------------------------------------------------------------------------------------


def _trained(
    model: Any,
    x: Tensor,
    y: Tensor,
    arm: LogitChange,
    seed: int,
    *,
    loss: str = "cross_entropy",
    batch: int | None = None,
    late: tuple[int, float] | None = None,
    low: bool = False,
    **how: Any,
) -> CheckedTraining:
    """``batch``: rows a step; the loss of all rows is recorded besides. ``low``: autocast in bfloat16.

    ``late``: (step, weight decay) from which on there is decay.
    """
    function, how = of_output(LOSSES[loss]), {"decay": 0.0} | how
    if late is not None:
        how["disturb"] = later(*late)
    if low:
        model = Autocast(model)
    if batch is None:
        return trained(model, function, full_batch(x, y), arm, **how)
    draw = epochs(x, y, size=batch, seed=seed)
    return trained(model, function, draw, arm, part=(x, y), check_every=4, **how)


def on_tokens(
    seed: int, arm: LogitChange, *, net: str, task: str, rows: int = 100, width: int = 24, **how: Any
) -> CheckedTraining:
    torch.manual_seed(seed)
    x, y, tokens, classes = token_rows(task, rows)
    return _trained(of_tokens(net, tokens, x.shape[1], width, classes), x, y, arm, seed, **how)


def on_numbers(
    seed: int, arm: LogitChange, *, net: str, task: str, rows: int = 100, width: int = 40, **how: Any
) -> CheckedTraining:
    torch.manual_seed(seed)
    x, y, outputs = number_rows(task, rows, seed)
    return _trained(of_rows(net, x.shape[1], width, outputs), x, y, arm, seed, **how)
