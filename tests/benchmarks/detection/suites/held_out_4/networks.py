"""Networks of the fourth held-out half's spiking families: of rows and of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites.held_out_3.networks import Of, Places

# --- layers of rows --------------------------------------------------------------------------------------


class Polynomial(nn.Module):
    """x ← (A · first input) ∘ x + x, twice: products of the input with itself (Chrysos et al. 2020)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(inputs, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.maps
        found = first(x)
        for layer in others:
            found = found + layer(x) * found
        return found


class Sorted(nn.Module):
    """The larger and the smaller of each pair of numbers (Anil et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (-1, 2))
        return torch.cat([pairs.amax(-1), pairs.amin(-1)], -1)


class Circulant(nn.Module):
    """Each row of the weights is the one above, shifted: a product of Fourier transforms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(width) * width**-0.5)
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(self.first), n=x.shape[-1])
        return found + self.shift


class Kronecker(nn.Module):
    """The sum of two Kronecker products of small maps (Zhang et al. 2021)."""

    def __init__(self, width: int, small: int = 5) -> None:
        super().__init__()
        self.small = small
        self.left = nn.Parameter(torch.randn(2, small, small) * (2 * small) ** -0.5)
        self.right = nn.Parameter(torch.randn(2, width // small, width // small) * (width // small) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.small, -1))
        return torch.einsum("nab,kac,kbd->ncd", x, self.left, self.right).flatten(1)


class Tropical(nn.Module):
    """The largest of x + w minus the largest of x + v (Zhang et al. 2018)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.above, self.below = (nn.Parameter(torch.randn(outputs, inputs)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None] + self.above).amax(-1) - (x[:, None] + self.below).amax(-1)


class Complex(nn.Module):
    """A complex linear map; magnitudes above a learned level stay (Arjovsky et al. 2016)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.real, self.imaginary = (nn.Linear(inputs, width // 2, bias=False) for _ in range(2))
        self.level = nn.Parameter(torch.zeros(width // 2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        real, imaginary = self.real(a) - self.imaginary(b), self.real(b) + self.imaginary(a)
        size = (real.square() + imaginary.square() + 1e-6).sqrt()
        share = F.relu(size + self.level) / size
        return torch.cat([real * share, imaginary * share], -1)


class Flowing(nn.Module):
    """Three steps of Heun's method through a field that is one map and tanh (Chen et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            first = self.field(x)
            x = x + 0.5 * (first + self.field(x + first))
        return x


class Reversible(nn.Module):
    """Two streams that are added to each other in turns (Gomez et al. 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList(
            nn.Sequential(nn.Linear(width // 2, width), nn.SiLU(), nn.Linear(width, width // 2))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        a = a + self.inner[0](b)
        return torch.cat([a, b + self.inner[1](a)], -1)


class FromZero(nn.Module):
    """x + a · f(x), a from 0 (Bachlechner et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.share = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.share * self.inner(x)


class Pieces(nn.Module):
    """A learned broken line for each number (Agostinelli et al. 2015)."""

    def __init__(self, width: int, pieces: int = 3) -> None:
        super().__init__()
        self.slope = nn.Parameter(0.2 * torch.randn(pieces, width))
        self.place = nn.Parameter(torch.randn(pieces, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) + (self.slope * F.relu(self.place - x[:, None])).sum(1)


class Quadratic(nn.Module):
    """Each number is a product of two maps and a map of squares (Fan et al. 2019)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.both, self.squares = nn.Linear(inputs, 2 * width), nn.Linear(inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).chunk(2, -1)
        return a * b + self.squares(x.square())


class Written(nn.Module):
    """A second network writes the weights of a thin map for each row (Ha et al. 2017)."""

    def __init__(self, inputs: int, width: int, few: int = 6) -> None:
        super().__init__()
        self.few = few
        self.down = nn.Linear(inputs, few)
        self.writer = nn.Sequential(nn.Linear(inputs, 10), nn.Tanh(), nn.Linear(10, few * width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.writer(x).unflatten(-1, (self.few, -1))
        return F.leaky_relu(torch.einsum("nf,nfw->nw", self.down(x), weight))


class Rules(nn.Module):
    """Fuzzy rules: products of Gaussian memberships, normalised, each with a linear map (Jang 1993)."""

    def __init__(self, inputs: int, width: int, count: int = 12) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(count, inputs))
        self.widths = nn.Parameter(torch.zeros(count, inputs))
        self.maps = nn.Linear(inputs, count * width)

    def forward(self, x: Tensor) -> Tensor:
        far = ((x[:, None] - self.centres) * self.widths.exp()).square().sum(-1)
        return torch.einsum(
            "nr,nrw->nw", (-0.5 * far).softmax(-1), self.maps(x).unflatten(-1, (far.shape[1], -1))
        )


class Boosted(nn.Module):
    """Four small networks, each of which also sees the sum of those before it."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs + width, 12), nn.ReLU(), nn.Linear(12, width)) for _ in range(4)
        )
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        found = x.new_zeros(len(x), self.width)
        for stage in self.stages:
            found = found + stage(torch.cat([x, found], -1))
        return found


class Whole(nn.Module):
    """Each row minus its mean, with the length 1 in the sum of absolute values."""

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x.shape[-1] * x / x.abs().sum(-1, keepdim=True).clamp_min(1e-6)


def _hat(x: Tensor) -> Tensor:
    """The Mexican hat, a wavelet."""
    return (1 - x.square()) * torch.exp(-0.5 * x.square())


def _two(inputs: int, width: int, act: Callable[[], nn.Module], wrap: Any = None) -> list[nn.Module]:
    wrap = wrap or (lambda layer: layer)
    return [wrap(nn.Linear(inputs, width)), act(), wrap(nn.Linear(width, width)), act()]


ROWS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "polynomial": lambda inputs, width: [Polynomial(inputs, width)],
    "sorted": lambda inputs, width: _two(inputs, width, Sorted),
    "circulant": lambda inputs, width: [
        nn.Linear(inputs, width), nn.ReLU(), Circulant(width), nn.ReLU(), Circulant(width), nn.ReLU()],
    "kronecker": lambda inputs, width: [
        nn.Linear(inputs, width), nn.ReLU(), Kronecker(width), nn.ReLU(), Kronecker(width), nn.ReLU()],
    "tropical": lambda inputs, width: [nn.Linear(inputs, width), Tropical(width, width)],
    "complex": lambda inputs, width: [
        nn.Linear(inputs, width), Complex(width // 2, width), Complex(width // 2, width)],
    "flowing": lambda inputs, width: [nn.Linear(inputs, width), Flowing(width)],
    "reversible": lambda inputs, width: [nn.Linear(inputs, width), Reversible(width), Reversible(width)],
    "from_zero": lambda inputs, width: [nn.Linear(inputs, width), FromZero(width), FromZero(width)],
    "pieces": lambda inputs, width: _two(inputs, width, lambda: Pieces(width)),
    "quadratic": lambda inputs, width: [Quadratic(inputs, width), nn.Tanh(), Quadratic(width, width)],
    "written": lambda inputs, width: [Written(inputs, width), Written(width, width)],
    "rules": lambda inputs, width: [nn.Linear(inputs, 8), Rules(8, width)],
    "boosted": lambda inputs, width: [Boosted(inputs, width)],
    "wavelets": lambda inputs, width: _two(inputs, width, lambda: Of(_hat)),
    "shrunk": lambda inputs, width: _two(inputs, width, lambda: nn.Softshrink(0.2)),
    "smooth_celu": lambda inputs, width: _two(inputs, width, lambda: nn.CELU(0.5)),
    "absolute": lambda inputs, width: _two(inputs, width, lambda: Of(torch.abs)),
    "spread": lambda inputs, width: [
        nn.Linear(inputs, width), Whole(), nn.GELU(), nn.Linear(width, width), Whole()],
}  # fmt: skip
"""Name → hidden layers for (inputs, width); the last has ``width`` outputs."""


def of_rows(name: str, inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*ROWS[name](inputs, width), nn.Linear(width, outputs))


# --- layers of tokens ------------------------------------------------------------------------------------


class Kernelised(nn.Module):
    """Attention by elu(q) + 1 and elu(k) + 1 in the place of a softmax (Katharopoulos et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maps = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.maps(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return x + (q @ (k.transpose(1, 2) @ v)) / (q @ k.sum(1)[..., None])


class Turning(nn.Module):
    """Cosines between questions and keys, times a learned steepness (Henry et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maps, self.steep = nn.Linear(width, 3 * width), nn.Parameter(torch.tensor(5.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.maps(x).chunk(3, -1)
        odds = self.steep * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)
        return x + odds.softmax(-1) @ v


class Folded(nn.Module):
    """One map joins neighbours until one vector is left (Socher et al. 2011)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.join = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        while x.shape[1] > 1:
            rest = x[:, -1:] if x.shape[1] % 2 else x[:, :0]
            pairs = x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2))
            x = torch.cat([pairs.mean(2) + self.join(pairs.flatten(2)), rest], 1)
        return x[:, 0]


class Diagonal(nn.Module):
    """A linear recurrence with a decay of its own for each number, and a gate (Gupta et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.keep = nn.Parameter(torch.linspace(-1.0, 3.0, width))
        self.new, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        keep, new = self.keep.sigmoid(), self.new(x)
        state, states = torch.zeros_like(new[:, 0]), []
        for k in range(x.shape[1]):
            state = keep * state + new[:, k]
            states.append(state)
        return x + F.silu(self.gate(x)) * torch.stack(states, 1)


class MatrixProducts(nn.Module):
    """Each token is a matrix; a vector goes through all of them (Stoudenmire and Schwab 2016)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.matrices = nn.Embedding(tokens, width * width)
        nn.init.normal_(self.matrices.weight, std=0.5 * width**-0.5)
        self.start = nn.Parameter(torch.randn(width))
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        state = self.start.expand(len(x), -1)
        for k in range(x.shape[1]):
            matrix = self.matrices(x[:, k]).unflatten(-1, (self.width, self.width))
            state = state + torch.einsum("na,nab->nb", state, matrix)
        return state


class Dilated(nn.Module):
    """Causal convolutions over two places, farther apart in each layer (Bai et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=2**k) for k in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        for k, layer in enumerate(self.layers):
            x = x + F.relu(layer(F.pad(x, (2**k, 0))))
        return x.transpose(1, 2)


class Neighbours(nn.Module):
    """The mean of embedded pairs of neighbours, as fastText has it (Joulin et al. 2017)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Embedding(tokens, width), nn.Embedding(tokens**2, width)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).mean(1) + self.two(x[:, :-1] * self.tokens + x[:, 1:]).mean(1)


def of_tokens(net: str, tokens: int, length: int, width: int, outputs: int) -> nn.Module:
    """``net``: a name of :data:`ROWS` too; tokens are then embedded side by side."""
    head, last = nn.Linear(width, outputs), Of(lambda x: x[:, -1])
    feed: list[nn.Module] = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    nets: dict[str, Callable[[], list[nn.Module]]] = {
        "kernelised": lambda: [Kernelised(width), *feed, last],
        "turning": lambda: [Turning(width), *feed, Turning(width), last],
        "folded": lambda: [Folded(width)],
        "diagonal": lambda: [Diagonal(width), *feed, Diagonal(width), last],
        "dilated": lambda: [Dilated(width), last],
    }
    if net == "matrix_products":
        return nn.Sequential(MatrixProducts(tokens, width), head)
    if net == "neighbours":
        return nn.Sequential(Neighbours(tokens, width), *feed, head)
    first = Places(tokens, width, length)
    if net in nets:
        return nn.Sequential(first, *nets[net](), head)
    return nn.Sequential(first, nn.Flatten(), *of_rows(net, length * width, 2 * width, outputs))
