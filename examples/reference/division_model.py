"""Build the data of modular division a/b mod p, and the two networks that learn it.

Both networks build the head last and call it ``head``. So arms that change the head draw the same other
weights as their pair.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def division(p: int, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return half of all (a, b ≠ 0) to train on and half to test: ``(pairs [N, 2], a/b mod p [N])`` each."""
    a, b = (grid.flatten() for grid in torch.meshgrid(torch.arange(p), torch.arange(1, p), indexing="ij"))
    inverse = torch.tensor([0, *(pow(k, -1, p) for k in range(1, p))])
    pairs, result = torch.stack([a, b], dim=1), a * inverse[b] % p
    order = torch.randperm(len(result), generator=torch.Generator().manual_seed(seed))
    train, test = order.tensor_split(2)
    return (pairs[train], result[train]), (pairs[test], result[test])


def one_hot(pairs: Tensor, p: int) -> Tensor:
    """Return one-hot(a) ⊕ one-hot(b), float32 [N, 2p]."""
    return F.one_hot(pairs, p).flatten(1).float()


def tokens(pairs: Tensor, p: int) -> Tensor:
    """Return [a, ÷, b, =] with the tokens p for ÷ and p + 1 for =, int64 [N, 4]."""
    sign = torch.full((len(pairs),), p, device=pairs.device)
    return torch.stack([pairs[:, 0], sign, pairs[:, 1], sign + 1], dim=1)


class MLP(nn.Module):
    """Apply ``depth`` hidden ReLU layers; ``norm`` puts a LayerNorm before the head."""

    def __init__(self, p: int, width: int, depth: int, *, norm: bool, head_bias: bool) -> None:
        super().__init__()
        sizes = [2 * p, *[width] * depth]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.below = nn.Sequential(*hidden[:-2])
        self.last = nn.Sequential(*hidden[-2:])
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.head = nn.Linear(width, p, bias=head_bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.last(self.below(x))))
        return out


class _Block(nn.Module):
    """Apply pre-norm self-attention, then a feed-forward layer of four times the width.

    Without ``norm`` it has no LayerNorm, as in Liu's runs.
    """

    def __init__(self, width: int, heads: int, *, norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width) if norm else nn.Identity()
        self.norm2 = nn.LayerNorm(width) if norm else nn.Identity()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.feed(self.norm2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Map tokens [N, 4] to logits [N, p] at the last position."""

    def __init__(
        self, p: int, width: int, depth: int, heads: int, *, norm: bool, head_norm: bool, head_bias: bool
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(p + 2, width)
        self.positions = nn.Parameter(0.02 * torch.randn(4, width))
        self.blocks = nn.Sequential(*(_Block(width, heads, norm=norm) for _ in range(depth)))
        self.norm = nn.LayerNorm(width) if head_norm else nn.Identity()
        self.head = nn.Linear(width, p, bias=head_bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.tokens(x) + self.positions)[:, -1]))
        return out
