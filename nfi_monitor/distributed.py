"""Who trains together, and a line between them. The only file that asks torch.distributed.

The ranks of a team add up small vectors, once per measured step, in the optimizer's post-step hook.  They
do so over a gloo channel of their own, never over the training's process group: a collective too few or too
many there (a monitor on rank 0 alone, one that was closed, a rank that skipped a step) would pair with the
next gradient and corrupt or hang the run.  On a channel of their own it costs the monitor a bounded wait and
its view of the other ranks, and the training nothing.

Whether a team comes about is agreed once, through the store that the process group was made with: all ranks
attached, or each watches its own rows.  A rank that never attaches cannot be asked, hence the deadline.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

WAIT = 30.0
"""Seconds that the ranks which attached wait, once, for those that have not."""
TIMEOUT = 120.0
"""Seconds that one exchange may take. The ranks have just finished a collective of the training's: only one
that skipped the step, or died, is late."""

_ATTACHED: Counter[str] = Counter()


def rank() -> int:
    """This process's rank; 0 outside distributed training."""
    return dist.get_rank() if _running() else 0


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def processes(group: Any = None) -> int:
    """How many processes may train together: those of ``group``, where it names them, or all that run."""
    return len(_ranks_of(group) or ()) or (dist.get_world_size() if _running() else 1)


def check_group(group: Any) -> None:
    """Raises TypeError for a ``group`` that is none of None, False, a ProcessGroup and a DeviceMesh, and
    ValueError for a group that this process is not in."""
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
    """Global ranks that train ``model`` together, ascending; None where this process trains it alone.

    ``group`` as for :class:`nfi_monitor.Monitor`.  Found are DistributedDataParallel (also around or inside
    torch.compile), FSDP and FSDP2, tensor parallel meshes; of several meshes the largest.
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
    """The DDP or FSDP around ``model``, or the DDP whose forward is under way: a framework may wrap the model
    later than the monitor is attached, or outside what it was given. None if there is neither."""
    for module in model.modules():
        if type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            return module
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def lets_ranks_stop_early(wrapper: nn.Module | None) -> bool:
    """Whether DDP's join() is, or was, in use: ranks may have made different numbers of optimizer steps."""
    return bool(getattr(getattr(wrapper, "_join_config", None), "enable", False))


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part (or a replica)."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "to_local")


def shards(tensor: Any, axis: int | None = None) -> int:
    """Into how many parts a tensor is cut (along ``axis`` only, if given); 1 for one that is whole."""
    if not is_sharded(tensor):
        return 1
    parts = 1
    for dimension, placement in enumerate(tensor.placements):
        cut = getattr(placement, "dim", None)
        if cut is not None and axis in (None, cut):
            parts *= int(tensor.device_mesh.size(dimension))
    return parts


def flat_shards(wrapper: nn.Module | None) -> int:
    """Into how many parts the older FullyShardedDataParallel cuts every tensor; 1 for any other wrapper."""
    if type(wrapper).__name__ != "FullyShardedDataParallel":
        return 1
    strategy = getattr(getattr(wrapper, "sharding_strategy", None), "name", "")
    return 1 if strategy == "NO_SHARD" else len(_ranks_of(getattr(wrapper, "process_group", None)) or ())


@dataclass(frozen=True)
class ClassShard:
    """Which classes of a row this rank holds: ``classes`` of ``outputs`` from ``first`` on. The others are on
    the ranks of the same ``group``, whose number is its lowest global rank."""

    first: int
    classes: int
    outputs: int
    group: int


def class_shard(tensor: Any, axis: int) -> ClassShard | None:
    """How a DTensor of logits (or the head's weight) is cut along its class axis; None where it is not, or in
    pieces that are no range of classes, or where parts of it have still to be added up."""
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


def rows_alike(model: nn.Module, world: int) -> bool:
    """Whether all ``world`` ranks read the same rows: tensor parallelism over all of them, nothing else."""
    sharded: list[Any] = [param for param in model.parameters() if is_sharded(param)]
    meshes = {param.device_mesh for param in sharded}
    flat = all(mesh.ndim == 1 and mesh.size() == world for mesh in meshes)
    return bool(meshes) and flat and data_ranks(model, world) == 1


def data_ranks(model: nn.Module, world: int) -> int:
    """How many of the ``world`` ranks read rows of their own: all, but for the tensor parallel ones."""
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


class Team:
    """The monitors of several ranks that watch one model.

    Args:
        ranks: global ranks, ascending, this process's among them.
        name: what the monitors have in common (head, layout of what is exchanged): monitors of different
            names never meet, so that no exchange is misread.  The n-th monitor of a name meets the n-th.
        wait, timeout: seconds, see :data:`WAIT` and :data:`TIMEOUT`.
    """

    def __init__(
        self, ranks: tuple[int, ...], name: str, *, wait: float | None = None, timeout: float | None = None
    ) -> None:
        key = hashlib.sha256(f"{ranks} {name}".encode()).hexdigest()[:16]
        _ATTACHED[key] += 1
        store = distributed_c10d._get_default_store()
        self._store = distributed_c10d.PrefixStore(f"nfi_monitor/{key}/{_ATTACHED[key]}", store)
        self.ranks = ranks
        self.index = ranks.index(rank())
        self.world = len(ranks)
        self.here = int(self._store.add("attached", 1))
        self.together: bool | None = None
        """None until it is decided."""
        self._wait = WAIT if wait is None else wait
        self._timeout = TIMEOUT if timeout is None else timeout
        self._channel: Any = None

    def meet(self) -> bool:
        """Whether all ranks are here; decided once, for all alike. The first call waits for the others.

        Raises what gloo raises where they are, but cannot be reached.
        """
        if self.together is not None:
            return self.together
        deadline = time.monotonic() + self._wait
        while True:
            self.here = int(self._store.add("attached", 0))
            if self.here >= self.world:
                self.together = self._settle("together")
                break
            if time.monotonic() >= deadline or self._store.check(["decision"]):
                self.together = self._settle("alone")
                break
            time.sleep(0.01)
        if self.together:
            self.together = False  # until the channel stands
            self._channel = dist.ProcessGroupGloo(
                distributed_c10d.PrefixStore("channel", self._store),
                self.index,
                self.world,
                timedelta(seconds=self._timeout),
            )
            self.together = True
        return self.together

    def add_up(self, numbers: Tensor) -> Callable[[], Tensor]:
        """Start adding ``numbers``, float64 on the CPU, over the ranks; call the result to wait for the sum.

        The sum is the same to the last bit on every rank: each part of it is added up on one rank and passed
        on.  Raises RuntimeError when a rank is gone or late.
        """
        work = self._channel.allreduce([numbers])

        def finish() -> Tensor:
            work.wait()
            return numbers

        return finish

    def leave(self) -> bool:
        """Whether the others count on this rank and have to be told, by its next exchange, that it leaves."""
        if self.together is None:
            self.together = self._settle("alone")
            # The others may have agreed already, while this rank had not yet come to its first step.
            if self.together:
                self.together = None
                return self.meet()
        return self.together

    def disband(self) -> None:
        self.together = False
        self._channel = None

    def _settle(self, proposal: str) -> bool:
        """The first proposal of all ranks stands."""
        decided: Any = self._store.compare_set("decision", "", proposal)
        return (decided.decode() if isinstance(decided, bytes) else decided) == "together"


def any_accelerator(model: nn.Module) -> bool:
    """Whether the model's parameters are on a device that is read late."""
    first = next(model.parameters(), None)
    return first is not None and first.device.type not in ("cpu", "meta")
