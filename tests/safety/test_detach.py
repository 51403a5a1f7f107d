"""After ``close()`` nothing is left: no hook, no reference, no file, no thread, no entry in a global."""

from __future__ import annotations

import gc
import io
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import nfi_monitor.monitor
import nfi_monitor.registry
import nfi_monitor.report.run_directory.lock
from nfi_monitor import Monitor
from tests.runs import batch, mlp
from tests.safety.table import Shown


def hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of every kind, on every module, parameter and the optimizer."""
    count = sum(
        len(value)
        for holder in (*model.modules(), optimizer)
        for name, value in vars(holder).items()
        if "hooks" in name and isinstance(value, dict)
    )
    count += sum(len(p._backward_hooks or {}) for p in model.parameters())
    return count + sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())


def attach_train_close(
    model: nn.Module, optimizer: torch.optim.Optimizer, run_dir: Path | None, **options: Any
) -> None:
    inputs, targets = batch(6)
    with Monitor(
        model, optimizer, run_dir=run_dir, console=Console(file=io.StringIO()), every=1, **options
    ) as monitor:
        monitor.observe_outputs()
        for _ in range(2):
            monitor.observe_loss(loss := F.cross_entropy(model(inputs), targets))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_hooks_are_those_of_before(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    model[0].register_forward_hook(lambda *_: None)
    optimizer.register_step_post_hook(lambda *_: None)
    with Monitor(model, optimizer, console=False) as monitor:
        monitor.observe_outputs()
        assert hooks(model, optimizer) > 2, "the count sees hooks"
    assert hooks(model, optimizer) == 2
    attach_train_close(model, optimizer, tmp_path / "run")
    assert hooks(model, optimizer) == 2


def test_a_closed_monitor_keeps_no_model_no_optimizer_and_no_batch_alive(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    inputs, targets = batch(6)
    monitor = Monitor(
        model,
        optimizer,
        run_dir=tmp_path,
        console=False,
        every=1,
        probe=(inputs, targets),
        stateful=[scheduler],
    )
    loss = F.cross_entropy(model(inputs), targets)
    monitor.observe_loss(loss)
    loss.backward()
    optimizer.step()
    monitor.close()
    parameter = next(model.parameters())
    left = [
        weakref.ref(one) for one in (model, optimizer, scheduler, inputs, loss, parameter, parameter.grad)
    ]
    del model, optimizer, scheduler, inputs, targets, loss, parameter
    gc.collect()
    assert [one() for one in left] == [None] * len(left)
    assert monitor.step == 1 and monitor.history["loss"][0].tolist() == [1], "what it has seen is still there"
    closed = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert closed() is None


def test_no_cycle_keeps_a_closed_monitor_that_nobody_holds(tmp_path: Path) -> None:
    """Without the garbage collector: a notebook that attaches often must not pile up models."""
    gc.collect()
    gc.disable()
    try:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attach_train_close(model, optimizer, None)
        left = [weakref.ref(part) for part in (model, optimizer)]
        del model, optimizer
        assert [one() for one in left] == [None, None]
    finally:
        gc.enable()


def leaks(times: int, tmp_path: Path) -> dict[str, int]:
    """Attach, train and close so often; what there is more of than after the first few times."""

    def count() -> dict[str, int]:
        gc.collect()
        ours = [item for item in gc.get_objects() if str(type(item).__module__).startswith("nfi_monitor")]
        return {
            "objects of the package": len(ours),
            "tensors": sum(isinstance(item, torch.Tensor) for item in gc.get_objects()),
            "objects": len(gc.get_objects()) // 200,  # interned names and caches come and go
            "open files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "watched": len(nfi_monitor.registry._WATCHED),
            "open monitors": len(nfi_monitor.registry._OPEN),
            "locks": len(nfi_monitor.report.run_directory.lock._HELD),
        }

    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(5):
        attach_train_close(model, optimizer, tmp_path)
    before = count()
    for number in range(times):
        # With files every tenth time: TensorBoard's take most of the time.
        attach_train_close(model, optimizer, tmp_path if number % 10 == 0 else None)
    after = count()
    return {name: after[name] - before[name] for name in after if after[name] > before[name]}


def test_attaching_and_closing_again_and_again_leaves_nothing(tmp_path: Path) -> None:
    assert leaks(40, tmp_path) == {}


@pytest.mark.slow
def test_attaching_and_closing_a_thousand_times_leaves_nothing(tmp_path: Path, shown: Shown) -> None:
    assert leaks(1000, tmp_path) == {}
    shown("detach", 1000, "times attached and closed")
