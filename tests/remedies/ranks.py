"""What each remedy does in two processes: ``main(folder)`` forks them, and writes one pickle a rank.

The store lives in a file.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # an optimizer imports it: once here, not in each process
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nfi_monitor import remedies

WORLD, STEPS, ROWS = 2, 4, 12
Applied = Callable[[nn.Module, nn.Module, torch.optim.Optimizer], object]
REMEDIES: dict[str, Applied] = {
    "nothing": lambda model, head, optimizer: None,
    "project_zero_sum": lambda model, head, optimizer: remedies.project_zero_sum(head),
    "raise_epsilon": lambda model, head, optimizer: remedies.raise_epsilon(optimizer, 1e-2),
    "cool_down": lambda model, head, optimizer: remedies.cool_down(optimizer, 0.1, 2, 1),
    "clip_update_rms": lambda model, head, optimizer: remedies.experimental.clip_update_rms(optimizer, 0.3),
    "orthogonal_gradients": lambda model, head, optimizer: remedies.experimental.orthogonal_gradients(
        optimizer
    ),
    "reset_second_moment": lambda model, head, optimizer: remedies.experimental.reset_second_moment(
        optimizer
    ),
    "center_classifier": lambda model, head, optimizer: remedies.experimental.center_classifier(
        model, optimizer
    ),
}
WRAPPERS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "one process": lambda model: model,
    "DDP": DistributedDataParallel,
    "FSDP2": lambda model: fully_shard(model),
}


def train(wrapper: str, remedy: str, rows: slice) -> list[Tensor] | str:
    """The parameters, whole, after a few steps on these rows; or what the remedy was refused with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    inputs, targets = torch.randn(ROWS, 6), torch.randint(0, 4, (ROWS,))
    head = model[-1]
    wrapped = WRAPPERS[wrapper](model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, betas=(0.9, 0.95))

    def step() -> None:
        # A sum over the rows of this rank: the ranks' gradients are averaged, hence the factor.
        share = 1 if wrapper == "one process" else WORLD
        loss = F.cross_entropy(wrapped(inputs[rows]), targets[rows], reduction="sum") * share / ROWS
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    try:
        REMEDIES[remedy](wrapped, head, optimizer)
    except (ValueError, RuntimeError) as refused:
        return str(refused)
    for _ in range(STEPS):
        step()
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in wrapped.parameters())
    return [tensor.detach().clone() for tensor in whole]


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    rows = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
    results: dict[tuple[str, str], Any] = {}
    for wrapper in ("DDP", "FSDP2"):
        for remedy in REMEDIES:
            try:
                results[wrapper, remedy] = train(wrapper, remedy, rows)
            except Exception as error:
                results[wrapper, remedy] = error
    part = folder / f"{rank}.part"
    part.write_bytes(pickle.dumps(results))
    part.rename(folder / str(rank))


def main(folder: Path) -> int:
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            try:
                work(rank, folder)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
