"""The monitors that are open can be found without knowing their class."""

from __future__ import annotations

import torch

from nfi_monitor import Monitor
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


def test_a_forked_process_has_none(tmp_path):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, optimizer, console=False) as monitor:

        def program() -> None:
            hooks = [*model[-1]._forward_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
            print(open_monitors(model, optimizer), watcher(model[-1]), hooks, monitor.closed)

        assert Forked(program, tmp_path, {}).printed().strip() == "[] None [] True"
        assert open_monitors(model, optimizer) == [monitor] and not monitor.closed
