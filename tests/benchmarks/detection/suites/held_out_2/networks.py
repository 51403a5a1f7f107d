"""Networks of the second held-out half's spiking families: of rows, of pictures and of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

# --- networks of rows ------------------------------------------------------------------------------------


class BothSigns(nn.Module):
    """relu(x) beside relu(−x) (Shang et al. 2016): twice as many outputs as inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(x), F.relu(-x)], -1)


class Kept(nn.Module):
    """Everything computed so far stays among the inputs (Huang et al. 2017)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.relu(self.inner(x))], -1)


class Iterated(nn.Module):
    """One layer applied three times: its weights are tied."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + F.relu(self.inner(x))
        return x


class Products(nn.Module):
    """A linear map and products of pairs of inputs, low rank (Rendle 2010)."""

    def __init__(self, inputs: int, outputs: int, rank: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.factors = nn.Linear(inputs, rank * outputs, bias=False)
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.factors(x).unflatten(-1, (-1, self.rank))
        return self.linear(x) + 0.5 * mixed.square().sum(-1)


class Hills(nn.Module):
    """exp(−x²)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-x.square())


def _stack(inputs: int, width: int, act: Callable[[], nn.Module], layers: int = 2) -> list[nn.Module]:
    body: list[nn.Module] = []
    for k in range(layers):
        body += [nn.Linear(inputs if k == 0 else width, width), act()]
    return body


ROWS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "hard_swish": lambda inputs, width: _stack(inputs, width, nn.Hardswish),
    "learned_slope": lambda inputs, width: _stack(inputs, width, nn.PReLU),
    "soft_sign": lambda inputs, width: _stack(inputs, width, nn.Softsign),
    "hard_tanh": lambda inputs, width: _stack(inputs, width, nn.Hardtanh),
    "scaled_exponential": lambda inputs, width: _stack(inputs, width, nn.SELU),
    "hills": lambda inputs, width: _stack(inputs, width, Hills),
    "deep": lambda inputs, width: _stack(inputs, width, nn.ReLU6, layers=4),
    "both_signs": lambda inputs, width: [
        nn.Linear(inputs, width), BothSigns(), nn.Linear(2 * width, width), BothSigns(),
        nn.Linear(2 * width, width)],
    "kept": lambda inputs, width: [
        Kept(inputs, width), Kept(inputs + width, width), nn.Linear(inputs + 2 * width, width), nn.ReLU()],
    "iterated": lambda inputs, width: [nn.Linear(inputs, width), Iterated(width)],
    "products": lambda inputs, width: [Products(inputs, width), nn.ReLU()],
    "thin": lambda inputs, width: [
        nn.Linear(inputs, 8), nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8), nn.Linear(8, width),
        nn.ReLU()],
    "weight_norm": lambda inputs, width: [
        parametrizations.weight_norm(nn.Linear(inputs, width)), nn.ReLU(),
        parametrizations.weight_norm(nn.Linear(width, width)), nn.ReLU()],
    "grouped_norm": lambda inputs, width: [
        nn.Linear(inputs, width), nn.GroupNorm(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()],
    "batch_norm": lambda inputs, width: [
        nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()],
}  # fmt: skip
"""Name → hidden layers for (inputs, width); the last has ``width`` outputs."""


def of_rows(name: str, inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*ROWS[name](inputs, width), nn.Linear(width, outputs))


# --- networks of pictures --------------------------------------------------------------------------------


class Branches(nn.Module):
    """Kernels of three sizes side by side (Szegedy et al. 2015)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.sizes = nn.ModuleList(nn.Conv2d(inputs, width, k, padding=k // 2) for k in (1, 3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.cat([size(x) for size in self.sizes], 1))


def of_pictures(name: str, width: int, outputs: int) -> nn.Sequential:
    """8×8 pictures of one channel as rows of 64 → outputs."""
    shape = nn.Unflatten(1, (1, 8, 8))
    if name == "branches":
        return nn.Sequential(
            shape, Branches(1, width), nn.MaxPool2d(2), Branches(3 * width, width), nn.MaxPool2d(4),
            nn.Flatten(), nn.Linear(3 * width, outputs),
        )  # fmt: skip
    if name == "averaged":  # in the manner of LeNet
        return nn.Sequential(
            shape, nn.Conv2d(1, width, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(width, 2 * width, 2),
            nn.Tanh(), nn.Flatten(), nn.Linear(8 * width, 32), nn.Tanh(), nn.Linear(32, outputs),
        )  # fmt: skip
    if name == "channel_norm":
        return nn.Sequential(
            shape, nn.Conv2d(1, width, 3, stride=2, padding=1), nn.GroupNorm(1, width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(8 * width, outputs),
        )  # fmt: skip
    raise ValueError(f"net {name!r}")


# --- networks of tokens ----------------------------------------------------------------------------------


class Elman(nn.Module):
    """A plain recurrent network of two layers; the last state goes to the head."""

    def __init__(self, tokens: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.layer = nn.RNN(width, width, num_layers=2, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x))[0][:, -1])


class Minimal(nn.Module):
    """A recurrent network with one gate and no candidate's own past (Heck and Salem 2017)."""

    def __init__(self, tokens: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.gate, self.new = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        state = torch.zeros_like(x[:, 0])
        for k in range(x.shape[1]):
            gate = self.gate(torch.cat([x[:, k], state], 1)).sigmoid()
            state = torch.lerp(state, self.new(x[:, k]).tanh(), gate)
        return self.head(state)


class Waves(nn.Module):
    """Fourier transforms mix places and channels (Lee-Thorp et al. 2022)."""

    def __init__(self, tokens: int, width: int, outputs: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.places = nn.Parameter(0.3 * torch.randn(length, width))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.places
        for feed in self.feed:
            x = x + torch.fft.fft2(x, norm="ortho").real
            x = x + feed(x)
        return self.head(x[:, 0])


class Universal(nn.Module):
    """One attention block applied twice (Dehghani et al. 2019); ``norm``: after each addition."""

    def __init__(self, tokens: int, width: int, outputs: int, length: int, *, norm: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for _ in range(2))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.places
        for _ in range(2):
            x = self.norms[0](x + self.attention(x, x, x, need_weights=False)[0])
            x = self.norms[1](x + self.feed(x))
        return self.head(x.mean(1))


class Spatial(nn.Module):
    """A gate made of the other places (Liu et al. 2021); no attention."""

    def __init__(self, tokens: int, width: int, outputs: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.across = nn.Linear(length, length)
        self.head = nn.Linear(length * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        kept, gate = F.gelu(self.up(x)).chunk(2, -1)
        gate = 1 + self.across(gate.transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.down(kept * gate)).flatten(1))


class Shared(nn.Module):
    """Tokens pass a perceptron, and their own embeddings are the head: no weight of its own."""

    def __init__(self, tokens: int, width: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.inner = nn.Sequential(
            nn.Linear(length * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.embedding(x).flatten(1)) @ self.embedding.weight.T


def of_tokens(net: str, tokens: int, length: int, width: int, outputs: int) -> nn.Module:
    nets: dict[str, Callable[[], nn.Module]] = {
        "elman": lambda: Elman(tokens, width, outputs),
        "minimal": lambda: Minimal(tokens, width, outputs),
        "waves": lambda: Waves(tokens, width, outputs, length),
        "universal": lambda: Universal(tokens, width, outputs, length, norm=False),
        "universal_norm": lambda: Universal(tokens, width, outputs, length, norm=True),
        "spatial": lambda: Spatial(tokens, width, outputs, length),
        "shared": lambda: Shared(tokens, width, length),
    }
    if net in nets:
        return nets[net]()
    rest = of_rows(net, length * width, 2 * width, outputs)
    return nn.Sequential(nn.Embedding(tokens, width), nn.Flatten(), *rest)
