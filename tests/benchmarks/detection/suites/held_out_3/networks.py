"""Networks of the third held-out half's spiking families: of rows, of graphs, points and sound, of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

# --- networks of rows ------------------------------------------------------------------------------------


class Of(nn.Module):
    """A function without weights."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Chebyshev(nn.Module):
    """Chebyshev polynomials of each input, mixed linearly, in the manner of a KAN."""

    def __init__(self, inputs: int, outputs: int, degree: int = 3) -> None:
        super().__init__()
        self.degree = degree
        self.mix = nn.Linear(inputs * degree, outputs)

    def forward(self, x: Tensor) -> Tensor:
        angle = x.tanh().clamp(-0.999, 0.999).acos()
        return self.mix(torch.cat([(k * angle).cos() for k in range(1, self.degree + 1)], -1))


class Rational(nn.Module):
    """A learned quotient of polynomials in the place of an activation (Boullé et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.above = nn.Parameter(torch.tensor([0.1, 0.6, 0.4])[:, None].repeat(1, width))
        self.below = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.above
        return (a + b * x + c * x.square()) / (1 + (self.below * x).square())


class Excited(nn.Module):
    """Each channel is scaled by a gate that a few numbers make of all of them (Hu et al. 2018)."""

    def __init__(self, width: int, few: int = 8) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(width, few), nn.ReLU(), nn.Linear(few, width))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x * self.gate(x).sigmoid()


class Squashed(nn.Module):
    """g · tanh(a · x) + b, which stands in for a norm (Zhu et al. 2025)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.steep = nn.Parameter(torch.tensor(0.5))
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (self.steep * x).tanh() + self.shift


class OneLength(nn.Module):
    """All rows get one learned length (Nguyen and Salazar 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.length = nn.Parameter(torch.tensor(width**0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.length * F.normalize(x, dim=-1)


class Centred(nn.Module):
    """Weights with mean 0 and one length in each row (Qiao et al. 2019)."""

    def forward(self, weight: Tensor) -> Tensor:
        weight = weight - weight.mean(1, keepdim=True)
        return weight / (weight.std(1, keepdim=True) * weight.shape[1] ** 0.5 + 1e-5)


def _centred(layer: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(layer, "weight", Centred())
    return layer


class Winners(nn.Module):
    """The largest third of each row is kept, the rest is 0 (Makhzani and Frey 2015)."""

    def forward(self, x: Tensor) -> Tensor:
        least = x.topk(x.shape[-1] // 3, -1).values[..., -1:]
        return torch.where(x >= least, x, 0.0)


class Mixed(nn.Module):
    """Four linear maps with ReLU, mixed by a softmax of the input."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.maps, self.share = nn.Linear(inputs, 4 * width), nn.Linear(inputs, 4)

    def forward(self, x: Tensor) -> Tensor:
        each = F.relu(self.maps(x)).unflatten(-1, (4, -1))
        return (each * self.share(x).softmax(-1)[..., None]).sum(-2)


class Butterfly(nn.Module):
    """Two block-diagonal maps with a shuffle between them (Dao et al. 2022)."""

    def __init__(self, width: int, blocks: int = 4) -> None:
        super().__init__()
        size = width // blocks
        self.blocks = blocks
        self.first, self.second = (
            nn.Parameter(torch.randn(blocks, size, size) * size**-0.5) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("nbi,bij->nbj", x.unflatten(-1, (self.blocks, -1)), self.first)
        x = x.transpose(1, 2).flatten(1).unflatten(-1, (self.blocks, -1))
        return torch.einsum("nbi,bij->nbj", x, self.second).flatten(1)


class Crossed(nn.Module):
    """x₀ · (W x + b) + x, twice (Wang et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in self.inner:
            x = x + first * layer(x)
        return x


class Blocks(nn.Module):
    """Residual perceptrons with ``norm`` before each."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module], count: int = 2) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(width) for _ in range(count))
        self.inner = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, inner in zip(self.norms, self.inner, strict=True):
            x = x + inner(norm(x))
        return x


def _twice(inputs: int, width: int, act: Callable[[], nn.Module]) -> list[nn.Module]:
    return [nn.Linear(inputs, width), act(), nn.Linear(width, width), act()]


ROWS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "snake": lambda inputs, width: _twice(inputs, width, lambda: Of(lambda x: x + x.sin().square())),
    "logarithm": lambda inputs, width: _twice(
        inputs, width, lambda: Of(lambda x: x.sign() * x.abs().log1p())),
    "power": lambda inputs, width: _twice(inputs, width, lambda: Of(lambda x: F.relu(x).pow(1.5))),
    "arctangent": lambda inputs, width: _twice(inputs, width, lambda: Of(torch.atan)),
    "rational": lambda inputs, width: _twice(inputs, width, lambda: Rational(width)),
    "winners": lambda inputs, width: _twice(inputs, width, Winners),
    "chebyshev": lambda inputs, width: [Chebyshev(inputs, width), Chebyshev(width, width)],
    "excited": lambda inputs, width: [*_twice(inputs, width, nn.ReLU), Excited(width)],
    "squashed": lambda inputs, width: [nn.Linear(inputs, width), Blocks(width, Squashed)],
    "one_length": lambda inputs, width: [nn.Linear(inputs, width), Blocks(width, OneLength)],
    "one_length_last": lambda inputs, width: [*_twice(inputs, width, nn.GELU), OneLength(width)],
    "centred": lambda inputs, width: [
        _centred(nn.Linear(inputs, width)), nn.ReLU(), _centred(nn.Linear(width, width)), nn.ReLU()],
    "mixed": lambda inputs, width: [Mixed(inputs, width), Mixed(width, width)],
    "butterfly": lambda inputs, width: [
        nn.Linear(inputs, width), nn.ReLU(), Butterfly(width), nn.ReLU(), Butterfly(width), nn.ReLU()],
    "crossed": lambda inputs, width: [nn.Linear(inputs, width), Crossed(width)],
    "three_lines": lambda inputs, width: [nn.Linear(inputs, width), nn.Linear(width, width)],
}  # fmt: skip
"""Name → hidden layers for (inputs, width); the last has ``width`` outputs."""


# --- networks of graphs, points and sound, each told as a row ------------------------------------------


class Graphs(nn.Module):
    """Sums over neighbours and a perceptron, twice (Xu et al. 2019); the sum over nodes is given on."""

    def __init__(self, nodes: int, width: int) -> None:
        super().__init__()
        self.nodes = nodes
        self.first = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        links = x.unflatten(-1, (self.nodes, self.nodes))
        seen = torch.stack([torch.ones_like(links[..., 0]), links.sum(-1) / self.nodes], -1)
        inner = self.first(seen + links @ seen / 3)
        return self.second(inner + links @ inner / 3).mean(1)


class Points(nn.Module):
    """The largest over points of what each alone gives (Qi et al. 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.each(x.unflatten(-1, (-1, 2))).amax(1)


def of_rows(name: str, inputs: int, width: int, outputs: int) -> nn.Sequential:
    """``name``: one of :data:`ROWS`, "graph", "points" or "sound"."""
    if name == "graph":
        body: list[nn.Module] = [Graphs(round(inputs**0.5), width)]
    elif name == "points":
        body = [Points(width), nn.Linear(width, width), nn.ReLU()]
    elif name == "sound":
        body = [
            nn.Unflatten(1, (1, inputs)), nn.Conv1d(1, width // 4, 8, stride=4), nn.ReLU(),
            nn.Conv1d(width // 4, width, 3, stride=2), nn.ReLU(), Of(lambda x: x.mean(-1)),
        ]  # fmt: skip
    else:
        body = ROWS[name](inputs, width)
    return nn.Sequential(*body, nn.Linear(width, outputs))


# --- networks of tokens ----------------------------------------------------------------------------------


class Retained(nn.Module):
    """What was seen fades, each head at its own speed (Sun et al. 2023); the last place is given on."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.maps = nn.Linear(width, 3 * width)
        far = torch.arange(length)[:, None] - torch.arange(length)
        speeds = torch.tensor([0.9, 0.6])[:, None, None]
        self.register_buffer("fading", torch.where(far >= 0, speeds ** far.clamp_min(0), 0.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.maps(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + (((q @ k.transpose(-1, -2)) * self.fading) @ v).transpose(1, 2).flatten(2)


class Attending(nn.Module):
    """Attention by ``kind``: "slopes" (a penalty for distance), "near" (neighbours alone), "difference"
    (one softmax minus half of another)."""

    def __init__(self, width: int, length: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.maps, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        far = (torch.arange(length)[:, None] - torch.arange(length)).abs().float()
        away = far * -0.5 if kind == "slopes" else torch.where(far <= 1, 0.0, -1e9)
        self.register_buffer("away", torch.zeros_like(far) if kind == "difference" else away)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.maps(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        odds = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + self.away).softmax(-1)
        if self.kind == "difference":
            odds = odds - 0.5 * odds.flip(1)
        return x + self.out((odds @ v).transpose(1, 2).flatten(2))


class Related(nn.Module):
    """The sum over all pairs of tokens of a perceptron of both (Santoro et al. 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        left, right = x[:, :, None].expand(-1, -1, count, -1), x[:, None].expand(-1, count, -1, -1)
        return self.both(torch.cat([left, right], -1)).mean((1, 2))


class Remembered(nn.Module):
    """A softmax over learned keys mixes learned values (Sukhbaatar et al. 2019)."""

    def __init__(self, width: int, count: int = 64) -> None:
        super().__init__()
        self.keys = nn.Linear(width, count)
        self.values = nn.Linear(count, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.values(self.keys(x).softmax(-1))


class TwoWays(nn.Module):
    """A GRU in each direction; their means are given on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0].mean(1)


class Adapted(nn.Module):
    """A frozen random perceptron with a thin trained product beside each of its maps (Hu et al. 2021)."""

    def __init__(self, inputs: int, width: int, rank: int = 6) -> None:
        super().__init__()
        self.frozen = nn.ModuleList([nn.Linear(inputs, width), nn.Linear(width, width)])
        self.frozen.requires_grad_(False)
        self.down = nn.ModuleList(nn.Linear(layer.in_features, rank, bias=False) for layer in self.frozen)
        self.up = nn.ModuleList(nn.Linear(rank, width, bias=False) for _ in self.frozen)
        for layer in self.up:
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        for frozen, down, up in zip(self.frozen, self.down, self.up, strict=True):
            x = F.gelu(frozen(x) + up(down(x)))
        return x


class Places(nn.Module):
    """Embedded tokens and places."""

    def __init__(self, tokens: int, width: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.places = nn.Parameter(0.3 * torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x) + self.places


class Outer(nn.Module):
    """All products of a number of the first half of the tokens and one of the second."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.tensor_split(2, 1)
        return (left.mean(1)[:, :, None] * right.mean(1)[:, None]).flatten(1)


def of_tokens(net: str, tokens: int, length: int, width: int, outputs: int) -> nn.Module:
    """``net``: a name of :data:`ROWS` too; tokens are then embedded side by side."""
    last, whole = Of(lambda x: x[:, -1]), nn.Sequential(nn.Flatten(), nn.Linear(length * width, width))
    feed = Blocks(width, lambda _: nn.Identity(), 1)
    nets: dict[str, Callable[[], list[nn.Module]]] = {
        "retained": lambda: [Retained(width, length), feed, Retained(width, length), last],
        "slopes": lambda: [Attending(width, length, "slopes"), feed, last],
        "near": lambda: [Attending(width, length, "near"), feed, Attending(width, length, "near"), whole],
        "difference": lambda: [Attending(width, length, "difference"), feed, last],
        "related": lambda: [Related(width)],
        "remembered": lambda: [whole, Remembered(width), nn.Linear(width, width), nn.ReLU()],
        "two_ways": lambda: [TwoWays(width)],
        "adapted": lambda: [nn.Flatten(), Adapted(length * width, width)],
    }  # fmt: skip
    first = Places(tokens, width, length)
    if net in nets:
        return nn.Sequential(first, *nets[net](), nn.Linear(width, outputs))
    if net == "outer":
        return nn.Sequential(first, Outer(), nn.Linear(width**2, outputs))
    return nn.Sequential(first, nn.Flatten(), *of_rows(net, length * width, 2 * width, outputs))
