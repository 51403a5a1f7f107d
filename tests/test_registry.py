"""The monitors that are open can be found without knowing their class."""

from __future__ import annotations

import pytest
import torch

import nfi_monitor
from nfi_monitor import AlreadyMonitoredError, Monitor
from nfi_monitor._moved import _Moved
from nfi_monitor.registry import open_monitors, watcher
from tests.forked import Forked
from tests.runs import mlp


def test_a_monitor_is_found_by_its_model_or_its_optimizer_until_it_closes():
    model, other = mlp(), mlp()
    optimizer, others = (torch.optim.AdamW(one.parameters()) for one in (model, other))
    with Monitor(model, optimizer, console=False) as monitor:
        assert open_monitors(model, others) == open_monitors(other, optimizer) == [monitor]
        assert open_monitors(torch.nn.Sequential(model), others) == [monitor], "inside a larger model"
        assert open_monitors(other, others) == []
        assert watcher(model[-1]) is monitor and watcher(other[-1]) is None
    assert open_monitors(model, optimizer) == [] and watcher(model[-1]) is None
    assert not monitor.watches(model, optimizer)


def test_hooks_keep_a_monitor_that_nobody_holds():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    Monitor(model, optimizer, console=False)
    (monitor,) = open_monitors(model, optimizer)
    monitor.close()


def opened_since(before: list[Monitor]) -> list[Monitor]:
    """Other tests may have left monitors open in this process."""
    return [monitor for monitor in nfi_monitor.open_monitors() if monitor not in before]


def test_an_exception_in_a_cell_loses_no_monitor():
    """A notebook: the function that held the monitor is gone, and what is open can still be closed."""
    before = nfi_monitor.open_monitors()
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())

    def cell() -> None:
        monitor = Monitor(model, optimizer, console=False)
        assert monitor.step == 0
        raise RuntimeError("a bug in the loop")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="a bug"):
            cell()
        with pytest.raises(AlreadyMonitoredError, match=r"nfi_monitor\.open_monitors\(\)") as refused:
            Monitor(model, optimizer, console=False)
        (lost,) = opened_since(before)
        assert refused.value.monitor is lost and not lost.closed
        lost.close()
        assert opened_since(before) == [] and not model[-1]._forward_hooks
    other = mlp()
    others = torch.optim.AdamW(other.parameters())
    with Monitor(model, optimizer, console=False), Monitor(other, others, console=False) as last:
        assert len(opened_since(before)) == 2 and opened_since(before)[1] is last
        assert open_monitors(optimizer=optimizer) == open_monitors(model) != open_monitors(other)


def test_the_function_can_be_called_also_after_an_import_of_the_module_of_that_name():
    """The module ``nfi_monitor.open_monitors`` of earlier versions is now ``nfi_monitor.registry``."""
    old = _Moved("nfi_monitor.open_monitors")
    assert old() == old.open_monitors() == open_monitors() and old.watcher is watcher


def test_a_forked_process_has_none(tmp_path):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, optimizer, console=False) as monitor:

        def program() -> None:
            hooks = [*model[-1]._forward_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
            print(open_monitors(model, optimizer), watcher(model[-1]), hooks, monitor.closed)

        assert Forked(program, tmp_path, {}).printed().strip() == "[] None [] True"
        assert open_monitors(model, optimizer) == [monitor] and not monitor.closed
