"""Run cases in several processes: ``python -m tests.distributed.launch FOLDER CASE:WORLD [CASE:WORLD ...]``.

A case is a function of :mod:`tests.distributed.cases` (or, as ``frameworks.CASE``, of another module beside
it), called as ``case(rank, world)`` on every rank; what it returns is pickled to ``FOLDER/CASE.RANK``, and so
is the exception it raises.  Files of its own go to ``$CASE_FOLDER``.  The processes are forked from one that
has imported torch and run nothing: an import for each process would be most of the time.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # an optimizer imports it: once here, not once in every process
import torch.distributed as dist

LIMIT = 60.0
"""Seconds for a case, unless it has a ``limit`` of its own; a process that takes longer has no result."""


def work(case: Callable[[int, int], Any], rank: int, world: int, port: int, out: Path) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    files = out.with_name(f"{case.__name__}.files")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CASE_FOLDER": str(files)}
    os.environ |= {name: str(number) for name, number in ranks.items()} | address
    result: Any
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        # The store has its own process, as it lives in the agent under torchrun: it outlasts every rank.
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group(
            "gloo", store=dist.PrefixStore(case.__name__, store), rank=rank, world_size=world
        )
        result = case(rank, world)
    except BaseException as error:
        traceback.print_exc()
        result = error
    try:
        data = pickle.dumps(result)
    except Exception:
        data = pickle.dumps(RuntimeError(repr(result)))
    part = out.with_name(f"{out.name}.part")
    part.write_bytes(data)
    part.rename(out)


def open_store() -> tuple[int, int]:
    """Start a store in a process of its own. Returns its port and the process.

    Not in the parent: the store has threads, and a lock that one of them holds during a fork stays locked in
    the child.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        while True:
            signal.pause()
    port = int(os.read(reading, 16))
    os.close(reading)
    os.close(writing)
    return port, process


def main(folder: Path, wanted: list[str]) -> None:
    port, store = open_store()
    try:
        run(folder, wanted, port)
    finally:
        os.kill(store, signal.SIGKILL)
        os.waitpid(store, 0)


def run(folder: Path, wanted: list[str], port: int) -> None:
    for one in wanted:
        name, _, size = one.partition(":")
        module, _, function = name.rpartition(".")
        case = getattr(importlib.import_module(f"tests.distributed.{module or 'cases'}"), function)
        world = int(size)
        children: dict[int, int] = {}
        for rank in range(world):
            child = os.fork()
            if child == 0:
                work(case, rank, world, port, folder / f"{name}.{rank}")
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
            children[child] = rank
        started = time.monotonic()
        while children:
            for child in list(children):
                if os.waitpid(child, os.WNOHANG)[0]:
                    del children[child]
            if time.monotonic() - started > getattr(case, "limit", LIMIT):
                for child in children:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
