"""Tasks, losses and trainings of the third held-out half where slingshots are to be expected."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs
from tests.benchmarks.detection.suites.common import of_output, trained
from tests.benchmarks.detection.suites.held_out_3.networks import of_rows, of_tokens
from tests.benchmarks.detection.training import LogitChange, full_batch

# --- losses ----------------------------------------------------------------------------------------------


def sure_enough(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of rows for what it exceeds 0.1 by: rows that are sure enough count no more."""
    return F.relu(F.cross_entropy(z, y, reduction="none") - 0.1).mean()


def second_best(z: Tensor, y: Tensor) -> Tensor:
    """Half of the squared hinge between the right class and the mean of the two highest others."""
    own = z.gather(1, y[:, None]).squeeze(1)
    others = z.scatter(1, y[:, None], -math.inf).topk(2, 1).values.mean(1)
    return 0.5 * F.relu(1 - own + others).square().mean()


def exponential(z: Tensor, y: Tensor) -> Tensor:
    """exp(−margin), as AdaBoost has it, of margins up to 2."""
    sign = 2 * F.one_hot(y, z.shape[-1]) - 1
    return torch.expm1(F.relu(2 - sign * z)).mean()


def three_apart(z: Tensor, y: Tensor) -> Tensor:
    """A row should be nearer to those of its class than to others, by 1 (Schroff et al. 2015)."""
    far = (z[:, None] - z[None]).square().sum(-1)
    same = (y[:, None] == y[None]).to(z.dtype)
    hinge = F.relu(1 + far[:, :, None] - far[:, None, :])
    wanted = same[:, :, None] * (1 - same)[:, None, :]
    return (hinge * wanted).sum() / wanted.sum()


def inside(z: Tensor, y: Tensor) -> Tensor:
    """An error beyond 0.1 to the power of 1.5."""
    return (F.relu((z - y).abs() - 0.1) + 1e-12).pow(1.5).mean()


def pairs_squared(z: Tensor, y: Tensor) -> Tensor:
    """Of each pair of rows the one with the larger target should be higher by 0.5; squared."""
    higher = (y > y.T).to(z.dtype)
    return (higher * F.relu(0.5 - z + z.T).square()).sum() / higher.sum()


def binary_hinges(z: Tensor, y: Tensor) -> Tensor:
    """A hinge for one output with a corner that is a piece of a logarithm of a hyperbolic cosine."""
    missing = F.relu(1 - (2 * y - 1).to(z.dtype) * z.squeeze(1))
    return (missing + F.softplus(-2 * missing) - math.log(2)).mean()


def lopsided(z: Tensor, y: Tensor) -> Tensor:
    """Squares of errors; those below the target weigh nine times as much (an expectile)."""
    missing = y - z
    return (torch.where(missing > 0, 0.9, 0.1) * missing.square()).mean()


def log_cosh(z: Tensor, y: Tensor) -> Tensor:
    far = (z - y).abs()
    return (far + F.softplus(-2 * far) - math.log(2)).mean()


def of_one_hot(z: Tensor, y: Tensor) -> Tensor:
    """Brier's score: squares between probabilities and the one-hot target."""
    return (z.softmax(1) - F.one_hot(y, z.shape[1])).square().sum(1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy, "sure_enough": sure_enough, "second_best": second_best,
    "exponential": exponential, "three_apart": three_apart, "inside": inside,
    "pairs_squared": pairs_squared, "binary_hinges": binary_hinges, "lopsided": lopsided,
    "log_cosh": log_cosh, "of_one_hot": of_one_hot, "squares": F.mse_loss,
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.02),
}  # fmt: skip


# --- tasks -----------------------------------------------------------------------------------------------


def _dihedral(order: int = 8) -> tuple[Tensor, Tensor, int, int]:
    """Turns and flips of a polygon: half of all pairs, one after the other."""
    pairs = torch.cartesian_prod(torch.arange(2 * order), torch.arange(2 * order))
    (a, flip), (b, other) = ((pairs[:, k] % order, pairs[:, k] // order) for k in range(2))
    turned = (a + torch.where(flip == 1, -b, b)) % order
    kept = torch.randperm(len(pairs))[: len(pairs) // 2]
    return pairs[kept], (turned + order * (flip ^ other))[kept], 2 * order, 2 * order


def _won(cells: Tensor) -> Tensor:
    """Who has three in a row: 0 nobody, 1 or 2; 1 is asked first."""
    rows = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]
    three = torch.stack([cells[:, row] for row in rows], 1)
    first, second = ((three == who).all(-1).any(1) for who in (1, 2))
    return torch.where(first, 1, torch.where(second, 2, 0))


def _moves(start: tuple[int, int], size: int = 5) -> dict[tuple[int, int], int]:
    """Moves that a knight needs to each field of a small board."""
    found, border = {start: 0}, [start]
    while border:
        row, column = border.pop(0)
        for a, b in ((1, 2), (2, 1), (1, -2), (2, -1), (-1, 2), (-2, 1), (-1, -2), (-2, -1)):
            there = row + a, column + b
            if there not in found and all(0 <= place < size for place in there):
                found[there] = found[row, column] + 1
                border.append(there)
    return found


def token_rows(task: str, rows: int) -> tuple[Tensor, Tensor, int, int]:
    """(tokens [N, T], class [N], tokens, classes)."""
    if task == "dihedral":
        return _dihedral()
    if task == "affine":  # a · b + c
        x = torch.cartesian_prod(*(torch.arange(7),) * 3)[torch.randperm(343)[:rows]]
        return x, (x[:, 0] * x[:, 1] + x[:, 2]) % 7, 7, 7
    if task == "two_squares":
        x = torch.cartesian_prod(torch.arange(13), torch.arange(13))[torch.randperm(169)[:rows]]
        return x, x.square().sum(1) % 13, 13, 13
    if task == "three_in_a_row":
        x = torch.randint(0, 3, (4 * rows, 9))
        y = _won(x)
        few = torch.cat([(y == who).nonzero()[: rows // 3, 0] for who in range(3)])
        return x[few], y[few], 3, 3
    if task == "hands":  # how many equal cards of five
        x = torch.randint(0, 6, (rows, 5))
        equal = (x[:, :, None] == x[:, None]).sum((1, 2))  # 5 none, 7 a pair, 9 two, 11 three, ...
        return x, ((equal - 5) // 2).clamp_max(4), 6, 5
    if task == "knights":
        fields = list(itertools.product(range(5), range(5)))
        table = [(*start, *end, count) for start in fields for end, count in _moves(start).items()]
        chosen = torch.tensor(table)[torch.randperm(len(table))[:rows]]
        return chosen[:, :4], chosen[:, 4], 5, 5
    if task == "below":  # how many of the others are below the first
        x = torch.rand(rows, 7).argsort(1)
        return x, x[:, 0], 7, 7
    raise ValueError(f"task {task!r}")


def number_rows(task: str, rows: int) -> tuple[Tensor, Tensor, int]:
    """(numbers [N, D], class [N] or target [N, K], outputs)."""
    if task == "graphs":  # how many triangles a random graph of seven nodes has
        links = (torch.rand(rows, 7, 7) < 0.3).float().triu(1)
        links = links + links.transpose(1, 2)
        closed = ((links @ links) * links).sum((1, 2)) / 6
        return links.flatten(1), closed.long().clamp_max(3), 4
    if task == "clouds":  # twelve points on a circle, a square, a cross or a line
        y = torch.arange(rows) % 4
        along = 2 * math.pi * torch.rand(rows, 12)
        circle = torch.stack([along.cos(), along.sin()], -1)
        square = circle / circle.abs().amax(-1, keepdim=True)
        way = 2 * torch.rand(rows, 12) - 1
        side = torch.where(torch.rand(rows, 12) < 0.5, 1.0, -1.0)
        cross, line = torch.stack([way, way * side], -1), torch.stack([way, 0.3 * way], -1)
        shapes = torch.stack([circle, square, cross, line])
        return (shapes[y, torch.arange(rows)] + 0.1 * torch.randn(rows, 12, 2)).flatten(1), y, 4
    if task == "tones":  # which of six tones is in the noise
        y = torch.randint(0, 6, (rows,))
        time = torch.arange(64) * (0.2 + 0.15 * y[:, None]) + 2 * math.pi * torch.rand(rows, 1)
        return time.sin() + 0.5 * torch.randn(rows, 64), y, 6
    if task == "two_of_sixteen":  # the parity of two bits
        x = torch.randint(0, 2, (rows, 16))
        return 2.0 * x - 1, x[:, 3] ^ x[:, 11], 2
    if task == "gates":  # four classes of bytes by chance
        x = torch.randint(0, 2, (rows, 8))
        numbers = (x * 2 ** torch.arange(8)).sum(1)
        return 2.0 * x - 1, torch.randint(0, 4, (256,))[numbers], 4
    if task == "highest":  # which of twelve directions is the nearest
        x = torch.randn(rows, 5)
        return x, (x @ torch.randn(5, 12)).argmax(1), 12
    x = 2 * torch.rand(rows, 4) - 1
    surface = (3 * x[:, :1]).sin() * (2 * x[:, 1:2]).cos() + x[:, 2:3] * x[:, 3:]
    if task == "surface":
        return x, surface, 1
    if task == "surfaces":
        return x, torch.cat([surface, surface.square(), x[:, :1].abs()], 1), 3
    if task == "terraces":  # a surface in five steps
        return x, torch.bucketize(surface[:, 0], torch.tensor([-0.8, -0.3, 0.2, 0.7])), 5
    raise ValueError(f"task {task!r}")


# --- trainings -------------------------------------------------------------------------------------------


def later(step: int, decay: float) -> Callable[[Any, int], None]:
    """Return what switches weight decay on at a step."""

    def disturb(training: Any, number: int) -> None:
        if number == step:
            for group in training.optimizer.param_groups:
                group["weight_decay"] = decay

    return disturb


def _trained(
    model: nn.Module,
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
    """``batch``: rows a step; the loss of all rows is recorded besides. ``low``: autocast in bfloat16."""
    plain, how = LOSSES[loss], {"decay": 0.0} | how
    if late is not None:
        how["disturb"] = later(*late)
    if low:
        model = Autocast(model)
    if batch is None:
        return trained(model, of_output(plain), full_batch(x, y), arm, **how)
    draw = epochs(x, y, size=batch, seed=seed)
    return trained(model, of_output(plain), draw, arm, part=(x, y), check_every=4, **how)


class Autocast(nn.Module):
    """The network's layers compute in bfloat16; so do its logits come out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


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
    x, y, outputs = number_rows(task, rows)
    outputs = 1 if how.get("loss") == "binary_hinges" else outputs
    return _trained(of_rows(net, x.shape[1], width, outputs), x, y, arm, seed, **how)
