"""Find the processes that train a model together, from torch.distributed and the model's wrappers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn

from nfi_monitor.capture.sharding import is_sharded


def rank() -> int:
    """Return this process's rank; 0 outside distributed training."""
    return dist.get_rank() if _running() else 0


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def processes(group: Any = None) -> int:
    """Return the number of processes in ``group``, or of all running processes."""
    return len(_ranks_of(group) or ()) or (dist.get_world_size() if _running() else 1)


def check_group(group: Any) -> None:
    """Check a ``group`` argument.

    Raises TypeError unless it is None, False, a ProcessGroup or a DeviceMesh, and ValueError for a group
    without this process.
    """
    if group is None or group is False:
        return
    ranks = _ranks_of(group)
    if ranks is None:
        raise TypeError(
            "group must be None (found from DDP or FSDP), False (read this process alone), a ProcessGroup "
            f"or a DeviceMesh, got {type(group).__name__}."
        )
    if rank() not in ranks:
        raise ValueError(f"group holds ranks {ranks}, and this process is rank {rank()}.")


def find_ranks(model: nn.Module, group: Any = None) -> tuple[int, ...] | None:
    """Return the global ranks that train ``model`` together, ascending; None if this process trains alone.

    ``group`` as for :class:`nfi_monitor.Monitor`.  This finds DistributedDataParallel (also around or inside
    torch.compile), FSDP, FSDP2 and tensor parallel meshes; of several meshes it takes the largest.
    """
    if group is False or not _running():
        return None
    if group is not None:
        return _several(_ranks_of(group))
    wrapper: Any = wrapper_of(model)
    if wrapper is not None:
        return _several(_ranks_of(wrapper.process_group))
    sharded: list[Any] = [param for param in model.parameters() if is_sharded(param)]
    meshes = [_ranks_of(param.device_mesh) or () for param in sharded]
    return _several(max(meshes, key=len, default=()))


def wrapper_of(model: nn.Module) -> nn.Module | None:
    """Return the DDP or FSDP around ``model``, or the DDP whose forward pass is running; else None.

    A framework may wrap the model after the monitor is attached, or around the model that it was given.
    """
    for module in model.modules():
        if type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            return module
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def lets_ranks_stop_early(wrapper: nn.Module | None) -> bool:
    """Return whether DDP's join() is or was in use: then ranks may make different numbers of steps."""
    return bool(getattr(getattr(wrapper, "_join_config", None), "enable", False))


def flat_shards(wrapper: nn.Module | None) -> int:
    """Return the number of shards of a tensor under FullyShardedDataParallel (FSDP1), else 1."""
    if type(wrapper).__name__ != "FullyShardedDataParallel":
        return 1
    strategy = getattr(getattr(wrapper, "sharding_strategy", None), "name", "")
    return 1 if strategy == "NO_SHARD" else len(_ranks_of(getattr(wrapper, "process_group", None)) or ())


def same_rows_everywhere(model: nn.Module, world: int) -> bool:
    """Return whether all ``world`` ranks read the same rows: they are all in one tensor parallel mesh."""
    sharded: list[Any] = [param for param in model.parameters() if is_sharded(param)]
    meshes = {param.device_mesh for param in sharded}
    flat = all(mesh.ndim == 1 and mesh.size() == world for mesh in meshes)
    return bool(meshes) and flat and data_ranks(model, world) == 1


def data_ranks(model: nn.Module, world: int) -> int:
    """Return how many of the ``world`` ranks read different rows: tensor parallel ranks read the same."""
    if not any(is_sharded(param) for param in model.parameters()):
        return world
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", None)
        if callable(state):
            group = getattr(state(), "_fsdp_param_group", None)
            if group is not None:
                return int(group.mesh_info.mesh.size())
    return 1  # DTensors without FSDP: tensor parallel only


def _ranks_of(group: Any) -> tuple[int, ...] | None:
    if hasattr(group, "mesh") and hasattr(group, "get_group"):
        return tuple(sorted(int(one) for one in group.mesh.flatten().tolist()))
    if _running() and isinstance(group, dist.ProcessGroup):
        return tuple(sorted(dist.get_process_group_ranks(group)))
    return None


def _several(ranks: Iterable[int] | None) -> tuple[int, ...] | None:
    found = tuple(ranks or ())
    return found if len(found) > 1 and rank() in found else None


def any_accelerator(model: nn.Module) -> bool:
    """Return whether a parameter is on an accelerator, whose numbers reach the host late."""
    first = next(model.parameters(), None)
    return first is not None and first.device.type not in ("cpu", "meta")
