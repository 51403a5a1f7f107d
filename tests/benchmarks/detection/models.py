"""The networks of the proving ground: small, standard, one linear head last."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(inputs: int, width: int, depth: int, outputs: int, *, norm: bool = False) -> nn.Sequential:
    """``depth`` hidden ReLU layers; ``norm`` puts a LayerNorm before the head."""
    sizes = [inputs, *[width] * depth]
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, *([nn.LayerNorm(width)] if norm else []), nn.Linear(width, outputs))


class Attention(nn.Module):
    """Multi-head self-attention without dropout."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width))


class Block(nn.Module):
    """Pre-norm transformer block; ``norm=False`` leaves the LayerNorms out (Liu et al. 2026)."""

    def __init__(self, width: int, heads: int, *, norm: bool, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width) if norm else nn.Identity()
        self.norm2 = nn.LayerNorm(width) if norm else nn.Identity()
        self.attention = Attention(width, heads, causal=causal)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Transformer(nn.Module):
    """Tokens [B, T] → logits of the last position [B, V], or of all of them [B·T, V]."""

    def __init__(
        self,
        tokens: int,
        length: int,
        outputs: int,
        *,
        width: int,
        layers: int,
        heads: int,
        norm: bool,
        all_positions: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.Sequential(
            *(Block(width, heads, norm=norm, causal=all_positions) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.all_positions = all_positions
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.tokens(tokens) + self.positions))
        return self.head(x.flatten(0, 1) if self.all_positions else x[:, -1])


def vgg11(classes: int, *, divide: int, norm: bool = False) -> nn.Sequential:
    """VGG11 for 32×32 images at 1/``divide`` of its width, one linear head; ``norm``: BatchNorm inside."""
    layers: list[nn.Module] = []
    channels = 3
    for item in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"):
        if item == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        wide = int(item) // divide
        layers.append(nn.Conv2d(channels, wide, 3, padding=1))
        layers += [nn.BatchNorm2d(wide)] if norm else []
        layers.append(nn.ReLU())
        channels = wide
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes))


class ViT(nn.Module):
    """Patches → pre-norm blocks → mean → LayerNorm → head."""

    def __init__(self, classes: int, *, size: int, patch: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn((size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, norm=True, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x).mean(1)))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x) + self.skip(x))


def resnet(classes: int, *, width: int) -> nn.Sequential:
    """A small ResNet with BatchNorm for one-channel images: a stem and three residual blocks."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _Residual(width, width, 1),
        _Residual(width, 2 * width, 2),
        _Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


class TwoHeads(nn.Module):
    """One trunk, a head for the label and one for its parity."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.parity = nn.Linear(width, 2)
        self.label = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x)
        return self.label(x), self.parity(x)


class TwoTowers(nn.Module):
    """CLIP-like: two views, two encoders, one learned temperature; similarities [N, N] are the logits."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.left, self.right = mlp(inputs, width, 1, 32), mlp(inputs, width, 1, 32)
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a = nn.functional.normalize(self.left(left), dim=1)
        b = nn.functional.normalize(self.right(right), dim=1)
        return self.log_scale.clamp_max(4.6).exp() * a @ b.T
