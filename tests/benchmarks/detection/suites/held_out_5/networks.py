"""Networks of the fifth held-out half: of rows and of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites.held_out_3.networks import Of, Places

# --- layers of rows --------------------------------------------------------------------------------------


class Joined(nn.Module):
    """Each layer sees all numbers before it (Huang et al. 2017)."""

    def __init__(self, inputs: int, width: int, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs + k * width, width) for k in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            found = F.relu(layer(x))
            x = torch.cat([x, found], -1)
        return found


class Reflections(nn.Module):
    """Four Householder reflections, then a learned size of each number (Mhammedi et al. 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.normals, self.sizes = nn.Parameter(torch.randn(4, width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        for normal in F.normalize(self.normals, dim=-1):
            x = x - 2 * (x @ normal)[:, None] * normal
        return x * self.sizes


class Ternary(nn.Module):
    """A map whose weights are −a, 0 or a; gradients pass as if they were not (Li et al. 2016)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight
        size = weight.detach().abs().mean()
        rounded = size * (weight / size).round().clamp(-1, 1)
        return F.linear(x, weight + (rounded - weight).detach(), self.inner.bias)


class Many(nn.Module):
    """The mean of four networks that share one map and scale its inputs and outputs (Wen et al. 2020)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.shared = nn.Linear(inputs, width)
        self.before = nn.Parameter(1 + 0.3 * torch.randn(4, 1, inputs))
        self.after = nn.Parameter(1 + 0.3 * torch.randn(4, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.shared(x * self.before) * self.after).mean(0)


class Recalled(nn.Module):
    """A softmax over learned keys picks learned values (Ramsauer et al. 2021)."""

    def __init__(self, inputs: int, width: int, count: int = 24) -> None:
        super().__init__()
        self.ask = nn.Linear(inputs, 12)
        self.keys, self.values = nn.Parameter(torch.randn(count, 12)), nn.Parameter(torch.randn(count, width))

    def forward(self, x: Tensor) -> Tensor:
        return (2.0 * self.ask(x) @ self.keys.T / math.sqrt(12)).softmax(-1) @ self.values


class Competing(nn.Module):
    """Groups of five numbers share a softmax, times the size of the group."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.map, self.sizes = nn.Linear(inputs, width), nn.Parameter(5 * torch.ones(width // 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.map(x).unflatten(-1, (-1, 5)).softmax(-1) * self.sizes).flatten(-2)


class Monomials(nn.Module):
    """exp(A · ln(0.1 + |x|)), with the sign of another map (Durbin and Rumelhart 1989)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.powers, self.sign = nn.Linear(inputs, width), nn.Linear(inputs, width)
        nn.init.normal_(self.powers.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.powers((0.1 + x.abs()).log()).clamp(-4, 4).exp() * self.sign(x).tanh()


class Given(nn.Module):
    """Cosines of fixed random maps (Rahimi and Recht 2007); no gradient passes below."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.register_buffer("maps", torch.randn(inputs, width))
        self.register_buffer("shift", 2 * math.pi * torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2.0) * (x @ self.maps + self.shift).cos()  # type: ignore[operator]


def _then(width: int) -> list[nn.Module]:
    return [nn.Linear(width, width), nn.ReLU()]


ROWS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "joined": lambda i, w: [Joined(i, w)],
    "reflections": lambda i, w: [
        nn.Linear(i, w), Reflections(w), nn.ELU(), Reflections(w), nn.ELU(), *_then(w),
    ],
    "ternary": lambda i, w: [Ternary(i, w), nn.LayerNorm(w), nn.ReLU(), Ternary(w, w), nn.ReLU()],
    "many": lambda i, w: [Many(i, w), Many(w, w)],
    "recalled": lambda i, w: [Recalled(i, w), *_then(w)],
    "competing": lambda i, w: [Competing(i, w), Competing(w, w), *_then(w)],
    "monomials": lambda i, w: [Monomials(i, w), *_then(w)],
    "given": lambda i, w: [Given(i, w), *_then(w), *_then(w)],
    "narrow_waist": lambda i, w: [nn.Linear(i, w), nn.SiLU(), nn.Linear(w, 4), nn.Linear(4, w), nn.SiLU()],
    "instance": lambda i, w: [
        nn.Linear(i, w), nn.Unflatten(1, (4, -1)), nn.InstanceNorm1d(4, affine=True), nn.Flatten(), nn.ReLU(),
        *_then(w),
    ],
    "shifted": lambda i, w: [
        nn.Linear(i, w), nn.Softshrink(0.2), nn.Linear(w, w), nn.Hardtanh(-2, 2), *_then(w),
    ],
}  # fmt: skip


def of_rows(name: str, inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*ROWS[name](inputs, width), nn.Linear(width, outputs))


# --- layers of tokens ------------------------------------------------------------------------------------


class Fourier(nn.Module):
    """Mix places and numbers by a Fourier transform (Lee-Thorp et al. 2022)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.fft.fft2(x, norm="ortho").real


class Sloped(nn.Module):
    """Attention whose odds fall with the distance (Press et al. 2022); ``causal``: only to the left."""

    def __init__(self, width: int, *, causal: bool = False) -> None:
        super().__init__()
        self.maps, self.out, self.causal = nn.Linear(width, 3 * width), nn.Linear(width, width), causal
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.maps(self.norm(x)).chunk(3, -1)
        places = torch.arange(x.shape[1])
        far = (places[:, None] - places).abs()
        odds = q @ k.transpose(1, 2) / math.sqrt(x.shape[-1]) - 0.25 * far
        if self.causal:
            odds = odds.masked_fill(places > places[:, None], -math.inf)
        return x + self.out(odds.softmax(-1) @ v)


class Shifted(nn.Module):
    """Half of the numbers come from the place before (Peng et al. 2023); then a gated map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        mixed = torch.cat([x[..., ::2], before[..., 1::2]], -1)
        return x + self.gate(mixed).sigmoid() * self.down(F.relu(self.up(mixed)).square())


class Found(nn.Module):
    """The largest answer of filters of one, two and three places (Kim 2014)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.filters = nn.ModuleList(nn.Conv1d(width, width // 3, size) for size in (1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return torch.cat([F.relu(one(x)).amax(-1) for one in self.filters], -1)


def of_tokens(net: str, tokens: int, length: int, width: int, outputs: int) -> nn.Module:
    """``net``: a name of :data:`ROWS` too; tokens are then embedded side by side."""
    head, last = nn.Linear(width, outputs), Of(lambda x: x[:, -1])
    feed: list[nn.Module] = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    first = Places(tokens, width, length)
    nets: dict[str, Callable[[], list[nn.Module]]] = {
        "fourier": lambda: [Fourier(), *feed, Fourier(), last],
        "sloped": lambda: [Sloped(width), *feed, Sloped(width), last],
        "shifted": lambda: [Shifted(width), Shifted(width), *feed, Shifted(width), last],
        "found": lambda: [Found(width)],
    }
    if net in nets:
        return nn.Sequential(first, *nets[net](), head)
    return nn.Sequential(first, nn.Flatten(), *of_rows(net, length * width, 2 * width, outputs))


def language_model(net: str, tokens: int, length: int, width: int) -> nn.Module:
    """A logit for each place and token; each place sees those to its left."""
    layers: list[nn.Module] = [Shifted(width), Shifted(width)]
    if net == "sloped":
        layers = [Sloped(width, causal=True), Shifted(width), Sloped(width, causal=True)]
    return nn.Sequential(
        Places(tokens, width, length), *layers, nn.LayerNorm(width), nn.Linear(width, tokens)
    )
