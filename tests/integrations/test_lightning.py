"""The Lightning adapter, under the real ``Trainer``."""

from __future__ import annotations

import csv
import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning", reason='pip install "nfi-monitor[lightning]"')
from lightning.pytorch import LightningModule, Trainer, seed_everything  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger  # noqa: E402

from nfi_monitor import Alert, AlertKind, Monitor, Thresholds  # noqa: E402
from nfi_monitor.integrations.attach import TrainerContext  # noqa: E402
from nfi_monitor.integrations.lightning import NFICallback  # noqa: E402
from nfi_monitor.report.run_directory import read_run  # noqa: E402
from tests.compatibility import Recorder  # noqa: E402
from tests.runs import batch, differences, snapshot  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec:FutureWarning")
STEPS = 10
SOON = Thresholds(absorbing_enter=1e-9, absorbing_exit=1e-10)
"""Any rounding at all counts as absorption: *at risk* fires within the first steps of any training."""


class Net(LightningModule):
    """Dropout draws random numbers: they would betray an extra pass."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(16, 7)
        self.fail_at = fail_at
        self.seen: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        if index == self.fail_at:
            raise RuntimeError("out of memory, say")
        loss = F.cross_entropy(self.head(self.body(batch[0])), batch[1])
        self.seen.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val_loss", F.cross_entropy(self.head(self.body(batch[0])), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TwoOptimizers(Net):
    """Manual optimization; the first optimizer does not train the head, and draws the batch's own noise."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = F.cross_entropy(self.head(self.body(batch[0])), batch[1])
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.body.parameters(), 1e-2), torch.optim.Adam(self.head.parameters(), 1e-2)]


def loader(batches: int = 40) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*batch(rows=8 * batches)), batch_size=8, shuffle=True)


def quiet(**options: Any) -> NFICallback:
    return NFICallback(**{"console": False, "every": 1, "run_dir": None, **options})


def watched(callback: NFICallback) -> Monitor:
    assert callback.monitor is not None, "training never began"
    return callback.monitor


def fit(
    folder: Path,
    callbacks: list[Any] | None = None,
    module: Net | None = None,
    resume: Path | None = None,
    **options: Any,
) -> Trainer:
    seed_everything(0, verbose=False)
    module = module if module is not None else Net()
    defaults: dict[str, Any] = {
        "max_steps": STEPS, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
    }  # fmt: skip
    trainer = Trainer(default_root_dir=folder, callbacks=callbacks, **(defaults | options))
    trainer.fit(module, loader(), loader(2), ckpt_path=resume)
    return trainer


def state(trainer: Trainer) -> dict[str, Any]:
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return {**snapshot(trainer.lightning_module, trainer.optimizers[0]), "more": (optimizers, schedules)}


MODES: dict[str, dict[str, Any]] = {
    "automatic optimization": {},
    "gradient accumulation, clipping": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "validation in between": {"val_check_interval": 3},
    "manual optimization, two optimizers": {"module": TwoOptimizers, "max_steps": 2 * STEPS},
}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_watched_and_trains_to_the_same_bits(
    mode: str, tmp_path: Path, compatibility: Recorder
) -> None:
    results = []
    callback = quiet(run_dir="auto")
    for callbacks in (None, [callback]):
        options = dict(MODES[mode])
        seed_everything(0, verbose=False)
        module = options.pop("module", Net)()
        results.append(state(fit(tmp_path, callbacks, module, **options)))
    assert differences(*results) == []
    monitor = watched(callback)
    assert monitor.step == STEPS
    assert [note for note in monitor.notes if note.code.startswith("failed")] == []
    row = compatibility("Lightning", mode, monitor.history)
    assert row.rows and row.weight_gradient and row.second_moment and row.loss


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_loss_seen_is_the_mean_of_what_the_training_steps_returned(
    accumulation: int, tmp_path: Path
) -> None:
    callback, module = quiet(), Net()
    fit(tmp_path, [callback], module, accumulate_grad_batches=accumulation)
    expected = torch.tensor(module.seen, dtype=torch.float64).reshape(STEPS, accumulation).mean(1)
    assert watched(callback).history["loss"][1] == pytest.approx(expected.tolist(), rel=1e-6)


def test_of_several_optimizers_the_one_that_trains_the_head_is_watched(tmp_path: Path) -> None:
    callback = quiet(run_dir="auto")
    fit(tmp_path, [callback], TwoOptimizers(), max_steps=4)
    assert read_run(tmp_path / "nfi").info["optimizer"]["name"] == "Adam"
    assert [note for note in watched(callback).notes if note.code == "optimizer_without_head"] == []


# --- attach and detach ------------------------------------------------------------------------------


def hooks(trainer: Trainer) -> int:
    modules = sum(len(module._forward_hooks) for module in trainer.lightning_module.modules())
    return modules + sum(len(optimizer._optimizer_step_post_hooks) for optimizer in trainer.optimizers)


def test_nothing_is_left_on_the_model_when_training_ends(tmp_path: Path) -> None:
    callback = quiet()
    trainer = fit(tmp_path, [callback])
    assert watched(callback).closed
    assert watched(callback).history["live_fraction"][0].tolist() == list(range(1, STEPS + 1))
    assert hooks(trainer) == 0


def test_a_monitor_that_is_kept_keeps_no_model_alive(tmp_path: Path) -> None:
    """A callback that is kept does: Lightning gives it the module's own log()."""
    callback, module = quiet(), Net()
    trainer = fit(tmp_path, [callback], module, max_steps=2)
    monitor, left = watched(callback), weakref.ref(module)
    del trainer, module, callback
    gc.collect()
    assert left() is None and monitor.step == 2


def test_an_exception_in_training_detaches_and_keeps_what_was_seen(tmp_path: Path) -> None:
    callback, module = quiet(), Net(fail_at=3)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        fit(tmp_path, [callback], module)
    assert watched(callback).closed
    assert watched(callback).step == 3
    assert sum(len(part._forward_hooks) for part in module.modules()) == 0


def test_a_second_fit_in_the_same_folder_gets_a_run_directory_of_its_own(tmp_path: Path) -> None:
    callback = quiet(run_dir="auto")
    for _ in range(2):
        fit(tmp_path, [callback], max_steps=3)
    assert [len(read_run(tmp_path / name).history["loss"][0]) for name in ("nfi", "nfi-2")] == [3, 3]


def test_wrong_options_are_refused_when_the_callback_is_made() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'evry'"):
        NFICallback(evry=1)
    with pytest.raises(ValueError, match="stop_on='loss': use any of 'at_risk'"):
        NFICallback(stop_on="loss")


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "lightning" or name.startswith("lightning.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "nfi_monitor.integrations.lightning")
    with pytest.raises(ImportError, match=r'pip install "nfi-monitor\[lightning\]"'):
        import nfi_monitor.integrations.lightning  # noqa: F401


# --- alerts -----------------------------------------------------------------------------------------


def at_risk(**options: Any) -> NFICallback:
    return quiet(thresholds=SOON, **options)


def test_readings_go_to_every_logger_of_the_trainer(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    fit(tmp_path, [quiet()], logger=loggers)
    with open(Path(loggers[0].log_dir) / "metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("nfi/zero_sum_violation")]
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert tensorboard(loggers[1])["scalars"] >= {"nfi/zero_sum_violation", "nfi/phase", "train_loss"}


def test_scalars_are_as_sparse_as_the_trainers_own_where_nothing_changes(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "csv")
    fit(tmp_path, [quiet()], logger=logger, log_every_n_steps=4)
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["nfi/phase"]] == [1, 5, 9]


def test_an_alert_is_a_text_in_tensorboard_and_a_call_of_on_alert(tmp_path: Path) -> None:
    told: list[Alert] = []
    logger = TensorBoardLogger(tmp_path, "tb")
    fit(tmp_path, [at_risk(on_alert=told.append)], logger=logger)
    assert told[0].kind is AlertKind.AT_RISK
    assert f"nfi/alerts/{told[0].id}/text_summary" in tensorboard(logger)["tensors"]


def tensorboard(logger: Any) -> dict[str, set[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return {kind: set(events.Tags()[kind]) for kind in ("scalars", "tensors")}


def test_save_on_and_stop_on_act_at_the_step_of_the_alert(tmp_path: Path) -> None:
    callback = at_risk(save_on="at_risk", stop_on="at_risk")
    trainer = fit(
        tmp_path,
        [callback, ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1000)],
        enable_checkpointing=True,
    )
    first = watched(callback).alerts[0].first_step
    assert trainer.global_step == first < STEPS
    assert (tmp_path / "kept" / f"nfi-step={first}.ckpt").is_file()


class Numbers(Logger):
    """A logger that keeps no files and has no experiment."""

    name, version = "numbers", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        return None

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        return None


def test_a_logger_without_files_or_experiment_takes_nothing_from_save_on(tmp_path: Path) -> None:
    callback = at_risk(save_on="at_risk", run_dir="auto")
    trainer = fit(tmp_path, [callback], logger=Numbers())
    assert trainer.log_dir is None
    monitor = watched(callback)
    assert [note.code for note in monitor.notes if note.code.startswith("failed")] == []
    assert (tmp_path / "checkpoints" / f"nfi-step={monitor.alerts[0].first_step}.ckpt").is_file()
    assert read_run(tmp_path / "nfi").alerts


def test_a_remedy_gets_the_alert_and_the_trainer(tmp_path: Path) -> None:
    seen: list[tuple[Alert, TrainerContext]] = []
    trainer = fit(tmp_path, [at_risk(remedy=lambda alert, context: seen.append((alert, context)))])
    alert, context = seen[0]
    assert alert.kind is AlertKind.AT_RISK
    assert context.model is trainer.lightning_module
    assert context.optimizer is trainer.optimizers[0]
    assert context.schedulers == (trainer.lr_scheduler_configs[0].scheduler,)
    assert context.native["trainer"] is trainer


def test_a_resumed_fit_goes_on_with_alerts_and_detector_and_trains_as_without_them(tmp_path: Path) -> None:
    straight = at_risk(run_dir="auto")
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    fit(tmp_path, [straight, checkpoints], enable_checkpointing=True)
    callback = at_risk(run_dir="auto")
    resumed = [state(fit(tmp_path, given, resume=tmp_path / "step=5.ckpt")) for given in (None, [callback])]
    assert differences(*resumed) == []
    monitor = watched(callback)
    assert monitor.step == STEPS
    assert monitor.history["loss"][0].tolist() == list(range(6, STEPS + 1))
    alerts = [(alert.id, alert.first_step) for alert in monitor.alerts]
    assert alerts == [(alert.id, alert.first_step) for alert in watched(straight).alerts] != []
    assert monitor.run_dir == str(tmp_path / "nfi")
