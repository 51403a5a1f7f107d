"""Read second moments that an optimizer keeps in 8 bits, at sampled coordinates only.

Both libraries keep a code per coordinate, a table with the value of each code, and a scale per block of
neighbouring coordinates: value = table[code] · scale[block].

* torchao's ``OptimState8bit``: attributes ``codes``, ``qmap``, ``scale``.
* bitsandbytes: state entries ``state2`` (uint8), ``qmap2``, ``absmax2``; small tensors have ``state2`` in
  float32.

Rejected: calling ``dequantize()``, because it makes the whole tensor, and only a few thousand coordinates are
needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nfi_monitor.capture.sampling import local


class Quantized(NamedTuple):
    """An 8-bit moment: ``codes`` uint8 of the parameter's shape, ``table`` [256], ``scales`` [blocks]."""

    codes: Tensor
    table: Tensor
    scales: Tensor

    def sample(self, stride: int) -> Tensor:
        """Return every ``stride``-th coordinate, float32 [⌈n / stride⌉]."""
        codes = self.codes.reshape(-1)
        at = torch.arange(0, len(codes), stride, device=codes.device)
        blocks = at // block_size(len(codes), len(self.scales))
        return (self.table[codes[::stride].long()] * self.scales[blocks]).float()


def block_size(coordinates: int, blocks: int) -> int:
    """Return how many coordinates share a scale, a power of two. The last block may be shorter.

    Raises ValueError if no power of two makes this many blocks.
    """
    size = 1
    while -(-coordinates // size) > blocks:
        size *= 2
    if -(-coordinates // size) != blocks:
        raise ValueError(f"{coordinates} coordinates in {blocks} blocks: of what size?")
    return size


def quantized_moment(state: Mapping[str, Any]) -> Quantized | None:
    """Return the second moment of one parameter's optimizer state if it is kept in 8 bits, else None."""
    moment = state.get("exp_avg_sq")
    if isinstance(moment, Tensor):
        held = local(moment)
        found = [getattr(held, name, None) for name in ("codes", "qmap", "scale")]
    else:
        found = [state.get(name) for name in ("state2", "qmap2", "absmax2")]
    parts = [part for part in found if isinstance(part, Tensor)]
    return Quantized(*parts) if len(parts) == 3 and parts[0].dtype is torch.uint8 else None
