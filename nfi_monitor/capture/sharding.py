"""Find out how a tensor is sharded over several ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor, of which this process holds a part (or a replica)."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "to_local")


def shards(tensor: Any, axis: int | None = None) -> int:
    """Return the number of shards of a tensor (along ``axis`` only, if given); 1 if it is whole."""
    if not is_sharded(tensor):
        return 1
    parts = 1
    for dimension, placement in enumerate(tensor.placements):
        cut = getattr(placement, "dim", None)
        if cut is not None and axis in (None, cut):
            parts *= int(tensor.device_mesh.size(dimension))
    return parts


@dataclass(frozen=True)
class ClassShard:
    """The classes that this rank holds: ``classes`` of ``outputs``, from class ``first`` on.

    The other classes are on the other ranks of ``group``, which is named by its lowest global rank.
    """

    first: int
    classes: int
    outputs: int
    group: int


def class_shard(tensor: Any, axis: int) -> ClassShard | None:
    """Return this rank's classes of a DTensor of logits (or of the head's weight).

    Returns None if it is not sharded along its class axis, if a shard is not a range of classes, or if the
    shards must still be added up.
    """
    if not is_sharded(tensor):
        return None
    placements, axis = tensor.placements, axis % tensor.dim()
    cut = [at for at, one in enumerate(placements) if getattr(one, "dim", None) == axis]
    if len(cut) != 1 or not placements[cut[0]].is_shard() or any(one.is_partial() for one in placements):
        return None
    mesh, outputs = tensor.device_mesh, tensor.shape[axis]
    each = -(-outputs // mesh.size(cut[0]))  # Shard cuts as torch.chunk does
    first = min(mesh.get_local_rank(cut[0]) * each, outputs)
    group = dist.get_process_group_ranks(mesh.get_group(cut[0]))
    return ClassShard(first, min(each, outputs - first), outputs, min(group))
