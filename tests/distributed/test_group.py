"""Who is taken to train together, in one process: what needs several is in ``test_ranks``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nfi_monitor import Monitor
from nfi_monitor.capture import sharding
from nfi_monitor.capture.host_transfer import HostTransfer
from nfi_monitor.ranks import processes
from tests.runs import mlp


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("group", [True, 3, "world", object()])
def test_a_group_that_is_none_is_refused_with_what_would_do(group: object) -> None:
    model = mlp()
    with pytest.raises(
        TypeError, match=r"group must be None .* or a DeviceMesh, got " + type(group).__name__
    ):
        Monitor(model, torch.optim.Adam(model.parameters()), group=group)
    Monitor(model, torch.optim.Adam(model.parameters()), console=False).close()  # nothing was left attached


def test_without_a_process_group_a_process_trains_alone() -> None:
    assert processes.rank() == 0
    assert processes.processes() == processes.processes(False) == 1
    assert processes.find_ranks(mlp()) is None
    assert processes.wrapper_of(mlp()) is None


def test_one_process_in_ddp_needs_nobody(one_process: None) -> None:
    model = nn.parallel.DistributedDataParallel(mlp())
    assert processes.find_ranks(model) is None
    assert processes.find_ranks(mlp(), dist.group.WORLD) is None
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        model(torch.randn(4, 12)).logsumexp(-1).sum().backward()
        optimizer.step()
    assert monitor.history["live_fraction"][0].tolist() == [1]


def test_plain_tensors_are_whole() -> None:
    assert sharding.shards(torch.zeros(3)) == 1
    assert not sharding.is_sharded(torch.zeros(3))
    assert processes.data_ranks(mlp(), 8) == 8
    assert processes.flat_shards(mlp()) == 1


def test_the_outbox_leaves_what_is_not_due_where_it_is() -> None:
    outbox = HostTransfer()
    for step in range(4):
        outbox.put(step, torch.tensor([float(step)]))

    def taken(**how: Any) -> list[tuple[int, list[float]]]:
        return [(label, numbers.tolist()) for label, numbers in outbox.take(**how)]

    assert taken(due=lambda step: step <= 1) == [(0, [0.0]), (1, [1.0])]
    assert taken(due=lambda step: step <= 1) == []
    assert taken() == [(2, [2.0]), (3, [3.0])]
