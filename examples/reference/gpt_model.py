"""Define a small GPT (Liu et al. 2026, table 4): rotary positions, SwiGLU, QK-LayerNorm, untied, no bias.

``transformers`` has each of these parts but no model with all of them. The head is called ``head`` and
returns raw logits in the precision of autocast. The loss casts them, because the study compares precisions of
the loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotate ``x`` [B, heads, T, even size] by its positions, in float32 (Su et al., arXiv 2104.09864).

    Channel i turns with channel i + size/2 by the angle position · base^(−2i/size).
    """
    length, size = x.shape[-2:]
    frequency = base ** (-torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size)
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1).type_as(x)


class Attention(nn.Module):
    """Apply causal self-attention; a LayerNorm on queries and keys bounds the attention logits."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = nn.LayerNorm(width // heads, bias=False)
        self.norm_k = nn.LayerNorm(width // heads, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.norm_q(q)).type_as(v), rotate(self.norm_k(k)).type_as(v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width))


class SwiGLU(nn.Module):
    """Compute out(silu(gate(x)) · up(x)) (Shazeer, arXiv 2002.05202).

    It has as many weights as a feed-forward layer of four times the width.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = (8 * width + 2) // 3
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.norm_feed = nn.LayerNorm(width, bias=False)
        self.feed = SwiGLU(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.feed(self.norm_feed(x))


class GPT(nn.Module):
    """Map tokens [B, T] int64 to logits [B, T, vocabulary]."""

    def __init__(self, vocabulary: int, *, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # As in GPT-2: the more layers add to the residual stream, the smaller each term.
                residual = name.endswith("out.weight")
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)

    def features(self, tokens: Tensor) -> Tensor:
        """Return the input of the head, [B, T, width]."""
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens))
