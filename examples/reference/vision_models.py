"""Define the image classifiers of Liu et al. 2026, table 1; each ends in one linear head.

Results depend on the last layer before that head. So every network is written out here. Library versions add
dropout, three linear layers or a pooled token. ``divide`` divides every width, so that the quick preset runs
the same networks on a CPU; the paper uses 1. All take images [N, 3, 32, 32] and return logits [N, classes].
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 32
VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


def mlp(classes: int, divide: int = 1) -> nn.Sequential:
    """Build an MLP with five hidden ReLU layers of 512."""
    sizes = [3 * SIDE * SIDE, *[512 // divide] * 5]
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))


def vgg11(classes: int, divide: int = 1, *, norm_inside: bool = False) -> nn.Sequential:
    """Build VGG11's convolutions; ``norm_inside`` adds a BatchNorm after each, as torchvision does."""
    layers: list[nn.Module] = []
    channels = 3
    for item in VGG11:
        if isinstance(item, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, item // divide, 3, padding=1))
        layers += [nn.BatchNorm2d(item // divide)] if norm_inside else []
        layers.append(nn.ReLU())
        channels = item // divide
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes))


def vgg11_norm_before_head(classes: int, divide: int = 1) -> nn.Sequential:
    """Build VGG11 with one BatchNorm on the head's input, which fixes the batch mean of the features."""
    *body, head = vgg11(classes, divide)
    return nn.Sequential(*body, nn.BatchNorm1d(512 // divide), head)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, length, width))


class Block(nn.Module):
    """Apply pre-norm x + attention(norm(x)), then x + feed(norm(x)). No dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed(x)


class ViT(nn.Module):
    """Apply patches → blocks → mean over the patches → LayerNorm → head."""

    def __init__(self, classes: int, *, patch: int, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn((SIDE // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x).mean(1)))


def vit(classes: int, divide: int = 1) -> ViT:
    """Build a transformer: patch 4, width 256, 12 blocks, 8 heads.

    ``divide`` also reduces blocks and heads and enlarges patches. The width is rounded down to a multiple of
    8.
    """
    if divide == 1:
        return ViT(classes, patch=4, width=256, blocks=12, heads=8)
    patch, width = min(4 * divide, SIDE // 2), 256 // divide // 8 * 8
    return ViT(classes, patch=patch, width=width, blocks=12 // divide, heads=4)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x) + self.skip(x))


def resnet18(classes: int, divide: int = 1) -> nn.Sequential:
    """Build ResNet18 for small images: a 3×3 stem of stride 1 and no max-pool."""
    stem = 64 // divide
    layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()]
    channels = stem
    for stage in range(4):
        outputs = stem * 2**stage
        layers += [Residual(channels, outputs, 1 if stage == 0 else 2), Residual(outputs, outputs, 1)]
        channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "mlp": mlp,
    "vgg11": vgg11,
    "vgg11-bn-inside": lambda classes, divide: vgg11(classes, divide, norm_inside=True),
    "vgg11-bn-before-head": vgg11_norm_before_head,
    "vit": vit,
    "resnet18": resnet18,
}
"""Name → (classes, divide) → network."""
