"""Watch a data-parallel run with a slingshot: every rank attaches the monitor, rank 0 reports.

Modular division (a/b mod 23) as in example 02, with its rows distributed over the ranks: an MLP, Adam, full
batch, warm-up of ten steps.  Each rank reads its own rows; readings and alerts are of all rows.  Every rank
must attach, because the ranks agree on the steps to read and on every alert.

    torchrun --nproc-per-node 2 examples/07_ddp.py
    torchrun --nproc-per-node 2 examples/07_ddp.py --fully-shard     # FSDP2 instead of DDP
    torchrun --nproc-per-node 2 examples/07_ddp.py --loss-dtype float64     # the cure: no slingshot
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/07_ddp.py

It runs on CPUs over gloo, and on GPUs over NCCL where each process has one.
"""

from __future__ import annotations

import argparse
import os
from itertools import pairwise
from pathlib import Path

import rich
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nfi_monitor import AlertKind, Monitor

P, WIDTH, DEPTH, LR, WARM_UP = 23, 128, 3, 1e-3, 10
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def division(seed: int) -> tuple[Tensor, Tensor]:
    """Return one-hot pairs (a, b) and a/b mod P of the half of all pairs that is trained on."""
    pairs = torch.tensor([(a, b) for a in range(P) for b in range(1, P)])
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    pairs = pairs[order[: len(pairs) // 2]]
    targets = pairs[:, 0] * torch.tensor([pow(int(b), P - 2, P) for b in pairs[:, 1]]) % P
    return F.one_hot(pairs, P).flatten(1).float(), targets


def mlp() -> nn.Sequential:
    sizes = [2 * P] + [WIDTH] * DEPTH
    layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, P))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train into a slingshot on several processes, under one monitor."
    )
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, help="write readings and alerts here (default: nowhere)")
    parser.add_argument("--fully-shard", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument(
        "--loss-dtype", choices=DTYPES, default="float32", help="precision from the logits to the loss"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if "RANK" not in os.environ:
        raise SystemExit("Start it with torchrun: torchrun --nproc-per-node 2 examples/07_ddp.py")
    torch.set_num_threads(1)  # at this size a second thread costs more time than it saves
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() > local_rank
    device = torch.device("cuda", local_rank) if on_gpus else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    inputs, targets = (part[rank::world].to(device) for part in division(args.seed))
    torch.manual_seed(args.seed)
    bare = mlp().to(device)
    if args.fully_shard:
        from torch.distributed.fsdp import fully_shard  # needs torch 2.6

        model = fully_shard(bare)
    else:
        model = DistributedDataParallel(bare)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.95))

    with Monitor(model, optimizer, run_dir=args.run_dir) as monitor:  # on every rank
        for step in range(1, args.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = LR * min(step / WARM_UP, 1.0)
            logits = model(inputs)
            if args.loss_dtype != "float32":
                logits = monitor.tap(logits.to(DTYPES[args.loss_dtype]))
            loss = F.cross_entropy(logits, targets)
            monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if any(alert.kind is AlertKind.SLINGSHOT for alert in monitor.alerts):
                break  # every rank has the alert at the same step, so all stop here

    if rank == 0:
        rich.print(monitor.summary())
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
