"""Real or made data, small enough for a CPU; nothing is downloaded."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def modular(p: int, operation: str, *, seed: int, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """``(pairs [N, 2] int64, result [N])``: a random ``share`` of all a∘b mod p; ∘ is one of + * /."""
    b_first = 1 if operation == "/" else 0
    grids = torch.meshgrid(torch.arange(p), torch.arange(b_first, p), indexing="ij")
    a, b = (grid.flatten() for grid in grids)
    if operation == "+":
        result = (a + b) % p
    elif operation == "*":
        result = a * b % p
    elif operation == "/":
        result = a * torch.tensor([0, *(pow(k, -1, p) for k in range(1, p))])[b] % p
    else:
        raise ValueError(f"operation {operation!r}: use '+', '*' or '/'.")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(a), generator=generator)[: round(share * len(a))]
    return torch.stack([a, b], dim=1)[rows], result[rows]


def one_hot_pairs(pairs: Tensor, p: int) -> Tensor:
    """one-hot(a) ⊕ one-hot(b) as float32 [N, 2p]."""
    return F.one_hot(pairs, p).flatten(1).float()


def parity(rows: int, bits: int, relevant: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """``(bits [rows, bits] as 0.0/1.0, XOR of the first ``relevant`` [rows])``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2, (rows, bits), generator=generator)
    return values.float(), values[:, :relevant].sum(1) % 2


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)


def digits(rows: int | None = None, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """8×8 digits as ``(pixels [N, 64] in [0, 1], label [N])``; ``rows`` random ones, or all 1,797."""
    x, y = _digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:rows]
    return x[order], y[order]


def digit_images(rows: int | None, *, size: int, channels: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same as images [N, channels, size, size], scaled up."""
    x, y = digits(rows, seed=seed)
    images = F.interpolate(x.reshape(-1, 1, 8, 8), size=(size, size), mode="bilinear", align_corners=False)
    return images.expand(-1, channels, -1, -1).contiguous(), y


@cache
def text() -> Tensor:
    """Bytes of the language reference that ships with Python (``pydoc_data.topics``), as int64 below 128."""
    from pydoc_data.topics import topics

    joined = "\n".join(topics[name] for name in sorted(topics))
    return torch.tensor([byte for byte in joined.encode("ascii", "ignore")])


def text_windows(rows: int, length: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """``rows`` random windows ``(tokens [rows, length], next token [rows, length])``."""
    stream = text()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - length - 1, (rows,), generator=generator)
    windows = stream[starts[:, None] + torch.arange(length + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
