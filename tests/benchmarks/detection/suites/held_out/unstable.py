"""Networks and tasks of the held-out half, full batch, where slingshots are to be expected."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data, losses
from tests.benchmarks.detection.suites.checked import CheckedTraining
from tests.benchmarks.detection.suites.common import of_output, trained
from tests.benchmarks.detection.training import LogitChange, full_batch

# --- networks of rows ------------------------------------------------------------------------------------


class Highway(nn.Module):
    """t · h(x) + (1 − t) · x (Srivastava et al. 2015)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.constant_(self.gate.bias, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, F.relu(self.inner(x)), self.gate(x).sigmoid())


class Maxout(nn.Module):
    """The largest of three linear maps (Goodfellow et al. 2013)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.maps = nn.Linear(inputs, 3 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x).unflatten(-1, (3, -1)).amax(-2)


class Bumps(nn.Module):
    """Radial bases of every input, mixed linearly, in the manner of a KAN."""

    def __init__(self, inputs: int, outputs: int, bases: int = 5) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(-2, 2, bases))
        self.mix = nn.Linear(inputs * bases, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.exp(-(x[..., None] - self.centres).square()).flatten(1))


class Squared(nn.Module):
    """relu(x)²."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ROWS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "highway": lambda inputs, width: [nn.Linear(inputs, width), Highway(width), Highway(width)],
    "maxout": lambda inputs, width: [Maxout(inputs, width), Maxout(width, width)],
    "bumps": lambda inputs, width: [Bumps(inputs, width), Bumps(width, width)],
    "squared": lambda inputs, width: [
        nn.Linear(inputs, width), Squared(), nn.Linear(width, width), Squared()],
    "softplus": lambda inputs, width: [
        nn.Linear(inputs, width), nn.Softplus(beta=5), nn.Linear(width, width), nn.Softplus(beta=5)],
    "mish": lambda inputs, width: [nn.Linear(inputs, width), nn.Mish(), nn.Linear(width, width), nn.Mish()],
    "leaky": lambda inputs, width: [
        nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)],
}  # fmt: skip


def of_rows(name: str, inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*ROWS[name](inputs, width), nn.Linear(width, outputs))


# --- networks of tokens ----------------------------------------------------------------------------------


class Side(nn.Module):
    """Embedded tokens side by side; :data:`ROWS` after them."""

    def __init__(self, net: str, tokens: int, length: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.rest = of_rows(net, length * width, 2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.embedding(x).flatten(1))


class Bilinear(nn.Module):
    """Products of embeddings, a factor for each place."""

    def __init__(self, tokens: int, length: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(tokens, 2 * width) for _ in range(length))
        self.head = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        factors = [embedding(x[:, k]) for k, embedding in enumerate(self.embeddings)]
        return self.head(torch.stack(factors).prod(0))


class Convolved(nn.Module):
    """Two convolutions over embedded tokens, the largest over time."""

    def __init__(self, tokens: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.first = nn.Conv1d(width, 2 * width, 3, padding=1)
        self.second = nn.Conv1d(2 * width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.embedding(x).transpose(1, 2)))
        return self.head(F.relu(self.second(x)).amax(-1))


class Gathered(nn.Module):
    """Places and tokens; two attention layers and no perceptron; the last place goes to the head."""

    def __init__(self, tokens: int, length: int, width: int, outputs: int, *, norm: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        self.layers = nn.ModuleList(nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.places
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x)[:, -1])


class Summed(nn.Module):
    """A sum over a set's members (Zaheer et al. 2017), gated."""

    def __init__(self, tokens: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.Mish())
        self.head = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outer(F.glu(self.inner(self.embedding(x))).sum(1)))


def of_tokens(net: str, tokens: int, length: int, width: int, outputs: int) -> nn.Module:
    if net == "bilinear":
        return Bilinear(tokens, length, width, outputs)
    if net == "convolved":
        return Convolved(tokens, width, outputs)
    if net == "summed":
        return Summed(tokens, width, outputs)
    if net.startswith("gathered"):
        return Gathered(tokens, length, width, outputs, norm=net == "gathered_norm")
    return Side(net, tokens, length, width, outputs)


# --- losses ----------------------------------------------------------------------------------------------


def one_hot_squares(z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, F.one_hot(y, z.shape[-1]).to(z.dtype))


def cubed_hinges(z: Tensor, y: Tensor) -> Tensor:
    """max(0, 1 − (right − other))^1.5, the mean over other classes."""
    own = z.gather(1, y[:, None])
    apart = F.relu(1 - own + z).pow(1.5).scatter(1, y[:, None], 0.0)
    return apart.sum(1).mean() / (z.shape[1] - 1)


def one_against_all(z: Tensor, y: Tensor) -> Tensor:
    """A hinge for each class: ±1 is wanted."""
    sign = 2.0 * F.one_hot(y, z.shape[-1]) - 1
    return F.relu(1 - sign * z).mean()


OWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squares": one_hot_squares, "hinges": F.multi_margin_loss, "cubed_hinges": cubed_hinges,
    "one_against_all": one_against_all,
}  # fmt: skip


def loss_of(name: str, smoothing: float) -> Any:
    return of_output(OWN[name]) if name in OWN else losses.smoothed(smoothing)


# --- tasks -----------------------------------------------------------------------------------------------


def permutations(seed: int, size: int = 4, share: float = 0.5) -> tuple[Tensor, Tensor, int]:
    """Composition in the symmetric group: (pairs, result, order of the group)."""
    group = list(itertools.permutations(range(size)))
    number = {element: k for k, element in enumerate(group)}
    rows = [
        (a, b, number[tuple(group[a][k] for k in group[b])])
        for a in range(len(group))
        for b in range(len(group))
    ]
    table = torch.tensor(rows)[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    table = table[: round(share * len(rows))]
    return table[:, :2], table[:, 2], len(group)


def token_rows(task: str, seed: int) -> tuple[Tensor, Tensor, int, int]:
    """(tokens [N, T], class [N], tokens, classes)."""
    if task == "permutations":
        x, y, count = permutations(seed)
        return x, y, count, count
    if task == "three_terms":
        x = torch.cartesian_prod(*(torch.arange(7),) * 3)
        x = x[torch.randperm(len(x))[:200]]
        return x, x.sum(1) % 7, 7, 7
    if task == "polynomial":
        x = torch.cartesian_prod(torch.arange(17), torch.arange(17))
        x = x[torch.randperm(len(x))[:150]]
        return x, (x[:, 0].square() + x[:, 0] * x[:, 1]) % 17, 17, 17
    if task == "brackets":  # how deep a random walk of brackets ever is
        x = torch.randint(0, 2, (250, 12))
        return x, (2 * x - 1).cumsum(1).amax(1).clamp(0, 6), 2, 7
    if task == "noise":
        return torch.randint(0, 12, (120, 6)), torch.randint(0, 6, (120,)), 12, 6
    raise ValueError(f"task {task!r}")


def number_rows(task: str, seed: int) -> tuple[Tensor, Tensor, int]:
    """(numbers [N, D], class [N] or target [N, 1], outputs)."""
    if task == "spirals":
        y = torch.arange(150) % 3
        way = torch.rand(150)
        angle = 6 * way + 2 * math.pi * y / 3
        x = 2 * way[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
        return torch.cat([x, x.square(), x[:, :1] * x[:, 1:]], 1), y, 3
    if task == "digits":
        x, y = data.digits(150, seed=seed)
        return x, y, 10
    if task == "majority":
        x = torch.randint(0, 2, (300, 21)).float()
        return 2 * x - 1, (x[:, :9].sum(1) > 4).long(), 2
    if task == "teacher":
        x = torch.randn(150, 8)
        with torch.no_grad():
            y = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 1))(x) * 3
        return x, y, 1
    raise ValueError(f"task {task!r}")


# --- trainings ---------------------------------------------------------------------------------------------


def on_tokens(
    seed: int,
    arm: LogitChange,
    *,
    net: str,
    task: str,
    width: int = 32,
    loss: str = "cross_entropy",
    smoothing: float = 0.0,
    **how: Any,
) -> CheckedTraining:
    torch.manual_seed(seed)
    x, y, tokens, classes = token_rows(task, seed)
    model = of_tokens(net, tokens, x.shape[1], width, classes)
    return trained(model, loss_of(loss, smoothing), full_batch(x, y), arm, **({"decay": 0.0} | how))


def on_numbers(
    seed: int,
    arm: LogitChange,
    *,
    net: str,
    task: str,
    width: int = 48,
    loss: str = "cross_entropy",
    smoothing: float = 0.0,
    **how: Any,
) -> CheckedTraining:
    torch.manual_seed(seed)
    x, y, outputs = number_rows(task, seed)
    model = of_rows(net, x.shape[1], width, outputs)
    function = of_output(F.mse_loss) if task == "teacher" else loss_of(loss, smoothing)
    return trained(model, function, full_batch(x, y), arm, **({"decay": 0.0} | how))
