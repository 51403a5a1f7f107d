"""What keeps its monitor can be copied and saved: the copy's monitor is closed, and says what it is."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nfi_monitor import Monitor, MonitorError, Phase
from tests.runs import batch


class System(nn.Module):
    """A module that owns model, optimizer and monitor, and uses its monitor in each step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 7))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3)
        self.monitor: Any = None

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def step(self) -> None:
        inputs, targets = batch()
        loss = F.cross_entropy(self.monitor.tap(self(inputs)), targets)
        self.monitor.observe_loss(loss)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.fixture
def system(tmp_path: Path) -> Any:
    made = System()
    made.monitor = Monitor(
        made, made.optimizer, run_dir=tmp_path / "run", console=Console(file=io.StringIO())
    )
    made.step()
    yield made
    made.monitor.close()


def test_a_copied_owner_trains_unseen_with_a_closed_monitor_that_says_so(system: System) -> None:
    for other in (copy.deepcopy(system), copy.deepcopy(copy.deepcopy(system)), AveragedModel(system).module):
        monitor = other.monitor
        assert isinstance(monitor, Monitor) and monitor is not system.monitor and monitor.closed
        other.step()
        with monitor as same, same.paused():
            same.observe_outputs()
            same.note("mine", "nobody hears it")
        assert monitor.alerts == [] and monitor.phase is Phase.HEALTHY and monitor.step == 0
        assert len(monitor.history) == 0 and monitor.snapshots == monitor.replays == []
        assert "This is a copy of a monitor" in monitor.notes[0].message
        assert not monitor.watches(other, other.optimizer)
        assert monitor.head is None and monitor.run_dir is None
        assert not monitor.port.may_act()
        for needs_a_run in (monitor.state_dict, monitor.take_snapshot, monitor.weight_norms, monitor.summary):
            with pytest.raises(MonitorError, match=r"copy of a monitor|closed"):
                needs_a_run()
    assert system.monitor.step == 1 and not system.monitor.closed
    assert copy.copy(system.monitor) is system.monitor


def test_a_saved_owner_loads_with_a_remark_in_the_monitors_place(system: System) -> None:
    for make in (copy.copy, copy.deepcopy):
        file = io.BytesIO()
        torch.save(make(system.net), file)
    system.net.monitor = system.monitor
    torch.save(system.net, file := io.BytesIO())
    del system.net.monitor
    file.seek(0)
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.ReLU]):
        loaded = torch.load(file, weights_only=True)
    assert "attach a new one" in loaded.monitor["nfi_monitor"]
    assert type(loaded.monitor).__module__ == "collections"
    assert pickle.loads(pickle.dumps(system)).monitor["nfi_monitor"] == loaded.monitor["nfi_monitor"]
