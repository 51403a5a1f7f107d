"""The only file that knows about ranks. Each rank watches its own rows; rank 0 alone speaks and writes."""

from __future__ import annotations

import torch.distributed


def rank() -> int:
    """This process's rank; 0 outside distributed training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0
