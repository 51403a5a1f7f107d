"""What the adapters of all frameworks share, without any of them; and that importing it draws no number."""

from __future__ import annotations

import importlib
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nfi_monitor import AlertKind, AlreadyMonitoredError, Change, Monitor, MonitorError, Thresholds
from nfi_monitor.integrations.attach import Attachment, free_directory
from tests.forked import Forked
from tests.runs import mlp, train

ROOT = Path(__file__).resolve().parents[1]
SOON = Thresholds(absorbing_enter=1e-9, absorbing_exit=1e-10)
"""Any rounding at all counts as absorption: *at risk* fires within the first steps of any training."""


def pair() -> tuple[nn.Sequential, torch.optim.Adam]:
    model = mlp()
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def attached(**options: object) -> Attachment:
    return Attachment(**{"console": False, "every": 1, "thresholds": SOON, **options})  # type: ignore[arg-type]


def test_an_alert_asks_for_each_action_once(tmp_path: Path) -> None:
    model, optimizer = pair()
    attachment = attached(save_on=["at_risk", "imminent"], stop_on=AlertKind.NON_FINITE)
    attachment.open(model, optimizer, directory=tmp_path / "run")
    asked = []
    for _ in range(8):
        train(model, optimizer, 1)
        asked.append(attachment.act())
    attachment.close()
    assert [due.save for due in asked].count(True) == 1
    assert not any(due.stop for due in asked)


def test_a_monitor_left_open_by_an_interrupted_run_gives_way_to_the_next(tmp_path: Path) -> None:
    model, optimizer = pair()
    left = attached(run_dir=None).open(model, optimizer, directory=tmp_path)
    again = attached(run_dir=None)
    monitor = again.open(model, optimizer, directory=tmp_path)
    assert left.closed and not monitor.closed
    again.close()
    with Monitor(model, optimizer, console=False), pytest.raises(AlreadyMonitoredError):
        again.open(model, optimizer, directory=tmp_path)


def test_what_began_before_a_checkpoint_is_not_acted_on_again() -> None:
    model, optimizer = pair()
    attachment = attached(run_dir=None, save_on="at_risk")
    monitor = attachment.open(model, optimizer, directory="unused")
    train(model, optimizer, 4)
    assert attachment.act().save, "an alert fires here, or this test shows nothing"
    state = attachment.state()
    attachment.close()

    resumed = attachment.open(model, optimizer, directory="unused", state=state)
    assert [alert.id for alert in resumed.alerts] == [alert.id for alert in monitor.alerts]
    resumed._loop.judge.report(Change.UPDATE, resumed.alerts[0])
    assert not attachment.act().save
    resumed._loop.judge.report(Change.BEGIN, replace(resumed.alerts[0], id="at_risk-9"))
    assert attachment.act().save
    attachment.close()


def test_after_a_run_model_and_optimizer_are_let_go_and_the_history_is_kept(tmp_path: Path) -> None:
    model, optimizer = pair()
    attachment = attached()
    monitor = attachment.open(model, optimizer, directory=tmp_path / "run", native={"model": model})
    train(model, optimizer, 2)
    assert monitor.optimizer is optimizer
    assert attachment.state()["monitor"]["step"] == 2
    attachment.close()
    assert attachment._context is None and attachment.state() == {}
    assert attachment.monitor is monitor and len(monitor.history) == 2
    with pytest.raises(MonitorError, match="does not hold the optimizer"):
        _ = monitor.optimizer


def test_a_run_directory_is_not_shared_with_an_earlier_run_except_on_resume(tmp_path: Path) -> None:
    model, optimizer = pair()
    attachment = attached()
    directories = []
    for resume in (False, False, True):
        state = {"run_dir": str(tmp_path / "run")} if resume else None
        attachment.open(model, optimizer, directory=tmp_path / "run", state=state)
        directories.append(Path(str(attachment.monitor.run_dir)).name)  # type: ignore[union-attr]
        attachment.close()
    assert directories == ["run", "run-2", "run"]
    assert free_directory(tmp_path / "run") == tmp_path / "run-3"


def test_of_several_optimizers_the_one_that_trains_the_head_is_taken() -> None:
    model = mlp()
    below = torch.optim.SGD(model[:-1].parameters(), 1e-2)
    head = torch.optim.Adam(model[-1].parameters())
    for given in ([below, head], (head, below)):
        with Monitor(model, given, console=False) as monitor:
            assert monitor.optimizer is head
    with pytest.raises(TypeError, match="got an empty list"):
        Monitor(model, [], console=False)


def test_what_is_guarded_is_reported_once_and_does_not_raise() -> None:
    model, optimizer = pair()
    with Monitor(model, optimizer, console=False) as monitor:
        for _ in range(2):
            with monitor.port.guarded("upload"):
                raise OSError("no network")
    assert [note.message for note in monitor.notes if note.code == "failed_upload"] == [
        "The monitor's upload failed after step 0; training is not affected. OSError: no network"
    ]


def test_importing_the_monitor_and_its_reports_draws_no_random_number() -> None:
    """rich draws one from Python's generator: a training that draws from it, too, would be another one."""

    def anew() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("nfi_monitor", "rich")]:
            del sys.modules[name]
        random.seed(0)
        before = random.getstate()
        for name in ("nfi_monitor.monitor", "nfi_monitor.report.console", "nfi_monitor.report.summary"):
            importlib.import_module(name)
        importlib.import_module("rich.console")
        print(random.getstate() == before)

    assert Forked(anew, ROOT, {}).printed().strip() == "True"


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.policy, self.value = nn.Linear(4, 5), nn.Linear(4, 1)


@pytest.mark.parametrize(("model", "says"), [(TwoHeads(), "head='value'"), (nn.Embedding(5, 4), "head=...")])
def test_a_model_without_one_head_is_watched_and_the_note_shows_the_adapters_own_call(
    model: nn.Module, says: str
) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    monitor = attached(run_dir=None).open(model, optimizer, directory="unused")
    assert f"NFICallback({says})" in monitor.notes[0].message
    monitor.close()


def test_an_object_that_trains_a_module_is_attached_by_that_module() -> None:
    class Wrapper:  # as setfit's
        def __init__(self, model: nn.Module) -> None:
            self.model_body = model

    model, optimizer = pair()
    monitor = attached(run_dir=None).open(Wrapper(model), optimizer, directory="unused")
    assert monitor.watches(model, optimizer)
    monitor.close()
