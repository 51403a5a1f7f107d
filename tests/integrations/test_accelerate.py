"""The Accelerate adapter, in a loop as Accelerate's own documentation writes it."""

from __future__ import annotations

import gc
import itertools
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate", reason='pip install "nfi-monitor[accelerate]"')
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.tracking import GeneralTracker  # noqa: E402

from nfi_monitor import Autopilot, Monitor, Thresholds  # noqa: E402
from nfi_monitor.integrations.accelerate import STATE, watch  # noqa: E402
from nfi_monitor.remedies.policy import Rung  # noqa: E402
from nfi_monitor.report.run_directory import read_run  # noqa: E402
from tests.compatibility import Recorder  # noqa: E402
from tests.runs import batch, differences, snapshot  # noqa: E402

STEPS = 10
SOON = Thresholds(absorbing_enter=1e-9, absorbing_exit=1e-10)
"""Any rounding at all counts as absorption: *at risk* fires within the first steps of any training."""


class Net(nn.Module):
    """Returns its loss, as HuggingFace models do; dropout would betray an extra pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(16, 7)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.body(x))
        return F.cross_entropy(logits, y), logits


def prepared(folder: Path | None = None, **options: Any) -> tuple[Any, Any, Any, Any]:
    for state in (AcceleratorState, GradientState, PartialState):  # precision and accumulation, process-wide
        state._reset_state()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, project_dir=folder, **options)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = DataLoader(TensorDataset(*batch(rows=400)), batch_size=8, shuffle=True)
    return accelerator, *accelerator.prepare(model, optimizer, data)


def train(accelerator: Any, model: Any, optimizer: Any, data: Any, steps: int = STEPS) -> list[float]:
    """``steps`` optimizer steps; returns the losses of all micro-batches."""
    losses: list[float] = []
    model.train()
    for x, y in data:
        with accelerator.accumulate(model):
            loss, _ = model(x, y)
            losses.append(loss.item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if len(losses) == steps * accelerator.gradient_accumulation_steps:
            break
    return losses


def quiet(accelerator: Any, model: Any, optimizer: Any, **options: Any) -> Monitor:
    return watch(accelerator, model, optimizer, **{"console": False, "every": 1, **options})


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient accumulation, clipping": {"gradient_accumulation_steps": 3},
    "bf16": {"mixed_precision": "bf16"},
}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_watched_and_trains_to_the_same_bits(
    mode: str, tmp_path: Path, compatibility: Recorder
) -> None:
    results, losses = [], []
    for watching in (False, True):
        accelerator, model, optimizer, data = prepared(tmp_path, **MODES[mode])
        monitor = quiet(accelerator, model, optimizer) if watching else None
        losses = train(accelerator, model, optimizer, data)
        results.append(snapshot(accelerator.unwrap_model(model), optimizer.optimizer))
    assert differences(*results) == []
    assert monitor is not None
    monitor.close()
    assert monitor.step == STEPS
    assert [note for note in monitor.notes if note.code.startswith("failed")] == []
    expected = torch.tensor(losses, dtype=torch.float64).reshape(STEPS, -1).mean(1).tolist()
    assert monitor.history["loss"][1] == pytest.approx(expected, rel=1e-6)
    row = compatibility("Accelerate", mode, monitor.history)
    assert row.rows and row.weight_gradient and row.second_moment and row.loss


def test_nothing_is_left_on_the_model_when_the_monitor_is_closed(tmp_path: Path) -> None:
    accelerator, model, optimizer, data = prepared(tmp_path)
    with quiet(accelerator, model, optimizer):
        train(accelerator, model, optimizer, data, steps=2)
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0
    assert not optimizer.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "left open"])
def test_an_accelerator_keeps_no_model_for_the_sake_of_a_monitor(closed: bool) -> None:
    """After an out-of-memory error find_executable_batch_size goes on with it, and needs the room."""
    accelerator, model, optimizer, data = prepared()
    monitor = quiet(accelerator, model, optimizer)
    train(accelerator, model, optimizer, data, steps=2)
    hooks = accelerator._save_model_state_pre_hook, accelerator._load_model_state_pre_hook
    assert [len(kind) for kind in hooks] == [1, 1]
    left = [weakref.ref(model), weakref.ref(optimizer.optimizer)]
    if closed:
        monitor.close()
        assert [len(kind) for kind in hooks] == [0, 0]
        assert monitor.step == 2, "it may be kept, for its history"
    else:
        del monitor
    accelerator.free_memory()
    del model, optimizer, data
    gc.collect()
    assert [one() for one in left] == [None, None]


def test_a_run_directory_is_made_in_the_project_directory_and_nowhere_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (None, tmp_path / "project"):
        accelerator, model, optimizer, data = prepared(folder)
        with quiet(accelerator, model, optimizer):
            train(accelerator, model, optimizer, data, steps=3)
        if folder is None:
            assert list(tmp_path.iterdir()) == []
    assert len(read_run(tmp_path / "project" / "nfi").history["loss"][0]) == 3


class Kept(GeneralTracker):
    """A tracker that keeps what it is given, under any name."""

    requires_logging_directory = False

    def __init__(self, name: str) -> None:
        self._name = name
        self.logged: list[tuple[dict[str, float], int | None]] = []
        super().__init__()

    @property
    def name(self) -> str:
        return self._name

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        self.logged.append((values, step))


def test_readings_go_to_the_trackers_even_to_those_set_up_later() -> None:
    """wandb is given no step: it drops what comes with a smaller step than the loop's own."""
    trackers = [Kept("aim"), Kept("wandb")]
    accelerator, model, optimizer, data = prepared(log_with=trackers)
    with quiet(accelerator, model, optimizer):
        accelerator.init_trackers("project")
        train(accelerator, model, optimizer, data, steps=3)
    for tracker, steps in zip(trackers, ([1, 2, 3], [None] * 3), strict=True):
        assert [step for _, step in tracker.logged] == steps
        assert [values["nfi/step"] for values, _ in tracker.logged] == [1, 2, 3]
        assert "nfi/zero_sum_violation" in tracker.logged[0][0]


def test_an_alert_notifies_the_trackers_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    run = SimpleNamespace(alert=lambda **given: calls.append(given))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=run))
    accelerator, model, optimizer, data = prepared(log_with=[Kept("wandb")])
    with quiet(accelerator, model, optimizer, thresholds=SOON) as monitor:
        train(accelerator, model, optimizer, data)
    assert monitor.alerts[0].id in calls[0]["title"]


def test_load_state_goes_on_with_alerts_and_detector(tmp_path: Path) -> None:
    accelerator, model, optimizer, data = prepared(tmp_path)
    with quiet(accelerator, model, optimizer, thresholds=SOON) as first:
        train(accelerator, model, optimizer, data, steps=5)
        accelerator.save_state(tmp_path / "checkpoint")
        saved = first.state_dict()
    assert first.alerts, "an alert fires here, or this test shows nothing"

    accelerator, model, optimizer, data = prepared(tmp_path)
    with quiet(accelerator, model, optimizer, thresholds=SOON) as second:
        accelerator.load_state(tmp_path / "checkpoint")
        assert json.dumps(second.state_dict()) == json.dumps(saved)  # as text: there are NaNs
        train(accelerator, model, optimizer, data, steps=5)
    assert second.step == STEPS
    assert [alert.id for alert in second.alerts][: len(first.alerts)] == [alert.id for alert in first.alerts]


def test_load_state_goes_on_with_an_autopilot(tmp_path: Path) -> None:
    """Forgotten, the loss would be the one that rounds again, and the learning rate the one of before."""
    states = []
    for resumed in (False, True):
        accelerator, model, optimizer, data = prepared(tmp_path)
        pilot = Autopilot()
        with quiet(accelerator, model, optimizer, thresholds=SOON, on_alert=pilot) as monitor:
            if resumed:
                accelerator.load_state(tmp_path / "checkpoint")
            else:
                train(accelerator, model, optimizer, data, steps=5)
                pilot._answer(monitor.alerts[0], Rung.LOSS, monitor)
                accelerator.save_state(tmp_path / "checkpoint")
            states.append(json.dumps(pilot.state_dict()))
            assert len(model.head._forward_hooks) == 2, "the monitor's and the projection's"
    assert '"exchanged": "projection"' in states[0]
    assert states[1] == states[0]


def test_a_checkpoint_of_before_the_monitor_or_a_damaged_one_loads_all_the_same(tmp_path: Path) -> None:
    accelerator, model, optimizer, data = prepared()
    train(accelerator, model, optimizer, data, steps=2)
    accelerator.save_state(tmp_path)
    with quiet(accelerator, model, optimizer) as monitor:
        accelerator.load_state(tmp_path)
        assert monitor.notes == []
        (tmp_path / STATE).write_text(json.dumps({"monitor": {"of": "another kind"}}), encoding="utf-8")
        accelerator.load_state(tmp_path)
        assert ["Not a monitor's state" in note.message for note in monitor.notes] == [True]
        train(accelerator, model, optimizer, data, steps=2)
        assert monitor.step == 2


def test_without_accelerate_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "nfi_monitor.integrations.accelerate")
    with pytest.raises(ImportError, match=r'pip install "nfi-monitor\[accelerate\]"'):
        import nfi_monitor.integrations.accelerate  # noqa: F401


# --- the loss that trains ---------------------------------------------------------------------------


@pytest.mark.parametrize("told", [False, True])
def test_the_loss_is_the_one_given_to_backward_unless_the_loop_reports_another(told: bool) -> None:
    """The model returns its own loss, which is only a part of the one that trains."""
    accelerator, model, optimizer, data = prepared(gradient_accumulation_steps=2)
    other = nn.Linear(12, 1)  # trained by the same accelerator
    losses: list[float] = []
    with quiet(accelerator, model, optimizer) as monitor:
        for x, y in itertools.islice(data, 2 * STEPS):
            with accelerator.accumulate(model):
                accelerator.backward(1e3 * other(x).square().mean())
                loss, logits = model(x, y)
                loss = 0.1 * loss + logits.square().mean()
                losses.append(loss.item())
                if told:
                    monitor.observe_loss(loss.item() + 1)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    expected = [(one + two) / 2 + told for one, two in zip(losses[::2], losses[1::2], strict=True)]
    assert monitor.history["loss"][1] == pytest.approx(expected, rel=1e-5)
    assert "backward" not in vars(accelerator), "restored"
