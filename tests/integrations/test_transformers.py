"""The HuggingFace adapter, on real tiny models trained by the real ``Trainer``."""

from __future__ import annotations

import gc
import json
import math
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason='pip install "nfi-monitor[transformers]"')
pytest.importorskip("accelerate", reason='pip install "nfi-monitor[transformers]"')

from nfi_monitor import (  # noqa: E402
    Alert,
    AlertKind,
    AlreadyMonitoredError,
    Change,
    HeadNotFoundError,
    Monitor,
    MonitorError,
    Snapshot,
    Thresholds,
)
from nfi_monitor.integrations.attach import TrainerContext  # noqa: E402
from nfi_monitor.integrations.transformers import NFICallback  # noqa: E402
from nfi_monitor.replay.run import replay  # noqa: E402
from nfi_monitor.report.json_values import from_strict_json  # noqa: E402
from nfi_monitor.report.run_directory import read_run  # noqa: E402
from tests.compatibility import Recorder  # noqa: E402
from tests.integrations import hf  # noqa: E402
from tests.runs import differences  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning:transformers")
STEPS = 10
SKIPPED = 7


def quiet(**options: Any) -> NFICallback:
    return NFICallback(**{"console": False, "every": 1, **options})


def watched(callback: NFICallback) -> Monitor:
    assert callback.monitor is not None, "training never began"
    return callback.monitor


def pair(folder: Path, *arguments: Any, **options: Any) -> tuple[list[str], Monitor]:
    """Train without and with the callback: (paths at which the two differ, the monitor)."""
    torch.compiler.reset()  # a graph of the one would serve the other, and hooks are not among its guards
    plain = hf.trainer(folder / "plain", *arguments, **options)
    plain.train()
    expected = hf.state(plain)
    torch.compiler.reset()
    callback = quiet()
    seen = hf.trainer(folder / "watched", *arguments, callbacks=[callback], **options)
    seen.train()
    assert [note for note in watched(callback).notes if note.code.startswith("failed")] == []
    return differences(expected, hf.state(seen)), watched(callback)


# --- never changes the training, and what it sees ---------------------------------------------------


@pytest.mark.parametrize("name", hf.MODELS)
def test_each_kind_of_model_is_watched_and_trains_to_the_same_bits(
    name: str, tmp_path: Path, compatibility: Recorder
) -> None:
    different, monitor = pair(tmp_path, name)
    assert different == []
    assert monitor.step == STEPS
    row = compatibility("Transformers", name, monitor.history)
    assert row.rows and row.recomputed is ("fused" in name)
    assert row.weight_gradient is ("tied" not in name)
    assert row.second_moment
    assert row.loss


def smoothed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", label_smoothing=0.05)
    return loss / (num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != -100).sum())


MODES: dict[str, dict[str, Any]] = {
    "gradient accumulation": {"gradient_accumulation_steps": 3},
    "bf16": {"bf16": True},
    "fp16, gradient scaler that skips steps": {
        "fp16": True,
        "change": hf.half,
        "steps": STEPS + SKIPPED,
        "optim": "adamw_torch",
    },
    "label smoothing": {"label_smoothing_factor": 0.1},
    "own loss function (compute_loss_func)": {"options": {"compute_loss_func": smoothed}},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "clipping, fused AdamW": {"max_grad_norm": 0.01, "optim": "adamw_torch_fused"},
    "evaluation in between": {"eval_strategy": "steps", "eval_steps": 3},
    "SGD": {"optim": "sgd"},
}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_of_the_trainer_is_watched_and_trains_to_the_same_bits(
    mode: str, tmp_path: Path, compatibility: Recorder
) -> None:
    different, monitor = pair(tmp_path, **MODES[mode])
    assert different == []
    assert monitor.step == STEPS
    assert len(monitor.history["live_fraction"][0]) == STEPS
    row = compatibility("Transformers", mode, monitor.history)
    assert row.loss
    assert row.second_moment is (mode != "SGD")


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_what_a_skipped_step_leaves_of_its_loss_is_not_added_to_the_next(
    optimizer: str, tmp_path: Path
) -> None:
    """Losses that are shares of a step's are added up: twice, without this."""
    callback = quiet(run_dir=None)
    options = {"fp16": True, "change": hf.half, "optim": optimizer}
    trainer = hf.trainer(tmp_path, callbacks=[callback], steps=STEPS + SKIPPED, **options)
    trainer.train()
    assert trainer.accelerator.optimizer_step_was_skipped is False
    # A fused step runs even when it skips itself, and counts.
    assert watched(callback).step == (STEPS if optimizer == "adamw_torch" else STEPS + SKIPPED)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert watched(callback).history["loss"][1] == pytest.approx(logged[SKIPPED:], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_compiled_model_shows_the_heads_gradient_and_its_loss(
    accumulation: int, tmp_path: Path, compatibility: Recorder
) -> None:
    options = {"torch_compile": True, "gradient_accumulation_steps": accumulation}
    different, monitor = pair(tmp_path, **options)
    assert different == []
    assert monitor.history["loss"][1] == pytest.approx(logged_losses(tmp_path, **options), rel=1e-5)
    row = compatibility(
        "Transformers", f"torch_compile{', accumulation' * (accumulation > 1)}", monitor.history
    )
    assert (row.rows, row.weight_gradient, row.loss) == (False, True, True)
    [note] = [note.message for note in monitor.notes if note.code == "head_never_fired"]
    assert "torch.compile" in note and "weight gradient is read instead" in note


def logged_losses(folder: Path, **options: Any) -> list[float]:
    """What the Trainer itself says the losses were, step by step."""
    plain = hf.trainer(folder / "logged", steps=STEPS, **options)
    plain.train()
    return [entry["loss"] for entry in plain.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", [hf.LLAMA, "image classification (ViT)", "fused linear cross-entropy"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_loss_seen_is_the_one_the_trainer_logs(name: str, accumulation: int, tmp_path: Path) -> None:
    """Of a causal LM each micro-batch's loss is a share of the step's, of the others a mean of its own."""
    callback = quiet(run_dir=None)
    trainer = hf.trainer(
        tmp_path, name, callbacks=[callback], steps=4, gradient_accumulation_steps=accumulation
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert watched(callback).history["loss"][1] == pytest.approx(logged, rel=1e-5)


class Mirrored(transformers.Trainer):
    """Trains by a loss of its own, and leaves the labels in the inputs: the model returns its loss, too."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any) -> Any:
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = 100 * F.cross_entropy(logits, inputs["labels"][:, 1:].flatten().flip(0))
        return (loss, outputs) if return_outputs else loss


class Twice(transformers.Trainer):
    """Runs the backward pass in a training step of its own, where no accelerator sees it."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        loss = 2 * model(**self._prepare_inputs(inputs)).loss / self.args.gradient_accumulation_steps
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize(
    "options",
    [
        {"kind": Mirrored},
        {"kind": Twice},
        {"kind": Twice, "gradient_accumulation_steps": 2},
        {"kind": Mirrored, "gradient_accumulation_steps": 3},
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
        {"options": {"compute_loss_func": smoothed}, "gradient_accumulation_steps": 2},
    ],
    ids=[
        "own loss",
        "own step",
        "own step, accumulation",
        "own loss, accumulation",
        "label smoothing",
        "compute_loss_func",
    ],
)
def test_the_loss_is_the_one_that_trains_wherever_it_is_computed(
    options: dict[str, Any], tmp_path: Path
) -> None:
    callback = quiet(run_dir=None)
    trainer = hf.trainer(tmp_path, callbacks=[callback], steps=6, **options)
    backward = vars(trainer.accelerator).get("backward")
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert watched(callback).history["loss"][1] == pytest.approx(logged, rel=1e-5)
    assert not {"no_loss", "loss_not_trained"} & {note.code for note in watched(callback).notes}
    assert vars(trainer.accelerator).get("backward") is backward, "restored"
    assert "training_step" not in vars(trainer)


def test_rows_of_a_fused_loss_are_recomputed_and_named_so(tmp_path: Path) -> None:
    callback = quiet()
    hf.trainer(tmp_path, "fused linear cross-entropy", callbacks=[callback]).train()
    monitor = watched(callback)
    assert read_run(tmp_path / "nfi").info["level"] == "recomputed"
    [note] = [note.message for note in monitor.notes if note.code == "rows_recomputed"]
    assert "rows are recomputed" in note
    steps, violations = monitor.history["zero_sum_violation"]
    assert len(steps) == STEPS and max(violations) < 1e-4
    assert monitor.history["head_loss"][1] == pytest.approx(monitor.history["loss"][1], rel=0.1)
    assert len(monitor.history["zero_sum_violation_weight"][0]) == STEPS


def fused_forward(model: Any) -> Any:
    """What a fused linear cross-entropy makes of a causal language model's forward pass."""

    def forward(
        self: Any, input_ids: Tensor, labels: Tensor, num_items_in_batch: Any = None, **rest: Any
    ) -> Any:
        hidden = self.model(input_ids, **rest).last_hidden_state
        targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        loss = F.cross_entropy(
            F.linear(hidden.flatten(0, 1), self.lm_head.weight).float(), targets, reduction="sum"
        )
        return {"loss": loss / ((targets >= 0).sum() if num_items_in_batch is None else num_items_in_batch)}

    model.forward = types.MethodType(forward, model)
    return model


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}], ids=str)
def test_recomputed_rows_are_those_of_the_same_trainer_with_logits(
    options: dict[str, Any], tmp_path: Path
) -> None:
    histories, options = [], {"per_device_train_batch_size": 5, **options}  # 60 rows: all are recomputed
    for number, change in enumerate((lambda model: model, fused_forward)):
        callback = quiet(run_dir=None)
        transformers.set_seed(0)
        model = change(hf.llama())
        hf.trainer(tmp_path / str(number), model=model, callbacks=[callback], steps=6, **options).train()
        histories.append(watched(callback).history)
    true, made = histories
    assert made["recomputed_fraction"][1].tolist() == [1.0] * 6 and "recomputed_fraction" not in true
    for name in true:
        assert made[name][1] == pytest.approx(true[name][1], rel=2e-2, abs=2e-4, nan_ok=True), name


def test_evaluation_and_prediction_are_not_taken_for_training(tmp_path: Path) -> None:
    callback = quiet(run_dir=None)
    trainer = hf.trainer(tmp_path, callbacks=[callback], eval_strategy="steps", eval_steps=2)
    trainer.train()
    monitor = watched(callback)
    assert monitor.step == STEPS
    assert monitor.history["loss"][0].tolist() == list(range(1, STEPS + 1))
    trainer.predict(trainer.eval_dataset)
    assert monitor.step == STEPS


# --- attach and detach ------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_nothing_is_left_on_the_model_when_training_ends(tmp_path: Path) -> None:
    callback = quiet(run_dir=None)
    trainer = hf.trainer(tmp_path, callbacks=[callback], steps=2)
    before = hooks(trainer.model)
    trainer.train()
    assert hooks(trainer.model) == before
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks


def test_a_callback_that_is_kept_keeps_no_model_alive(tmp_path: Path) -> None:
    callback = quiet(run_dir=None)
    trainer = hf.trainer(tmp_path, callbacks=[callback], steps=2)
    trainer.train()
    left = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert left() is None and watched(callback).step == 2


class Interrupt(transformers.TrainerCallback):
    """Stops the process's training the hard way, once."""

    def __init__(self, step: int) -> None:
        self.step: int | None = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.step = None
            raise KeyboardInterrupt


def test_an_interrupted_training_can_be_started_again_with_the_same_or_another_trainer(
    tmp_path: Path,
) -> None:
    """The Trainer has no event for exceptions, so the first monitor is still attached."""
    callback = quiet(run_dir=None)
    trainer = hf.trainer(tmp_path, callbacks=[callback, Interrupt(2)], steps=4)
    for again in ("same trainer", "new trainer and callback, same model"):
        if again == "same trainer":
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        else:
            trainer.add_callback(Interrupt(2))
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            callback = quiet(run_dir=None)
            trainer = hf.trainer(tmp_path, callbacks=[callback], steps=4, model=trainer.model)
        interrupted = watched(callback) if callback.monitor is not None else None
        trainer.train()
        assert interrupted is None or interrupted.closed
        assert watched(callback).step == 4
        assert len(watched(callback).history["live_fraction"][0]) == 4


def test_a_monitor_of_the_users_own_on_the_same_model_is_not_closed_but_complained_of(tmp_path: Path) -> None:
    trainer = hf.trainer(tmp_path, callbacks=[quiet(run_dir=None)], steps=2)
    with (
        Monitor(trainer.model, trainer.create_optimizer(), console=False) as own,
        pytest.raises(AlreadyMonitoredError, match="is already watched by an open monitor"),
    ):
        trainer.train()
    assert own.closed


def test_a_new_training_in_the_same_folder_gets_a_run_directory_of_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        hf.trainer(tmp_path, callbacks=[quiet()], steps=3).train()
    assert [len(read_run(tmp_path / name).history["loss"][0]) for name in ("nfi", "nfi-2")] == [3, 3]


def test_wrong_options_are_refused_when_the_callback_is_made_not_when_the_job_starts() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'evry'"):
        NFICallback(evry=1)
    with pytest.raises(ValueError, match="save_on='spike': use any of 'at_risk', 'imminent', 'slingshot'"):
        NFICallback(save_on="spike")
    with pytest.raises(TypeError, match=r"remedy must be callable as remedy\(alert, context\), got str"):
        NFICallback(remedy="lr")


def test_a_model_without_a_head_is_refused_with_its_candidates_when_training_begins(tmp_path: Path) -> None:
    trainer = hf.trainer(tmp_path, callbacks=[quiet(head="output")], steps=2)
    with pytest.raises(HeadNotFoundError, match="has no module named 'output'"):
        trainer.train()


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "nfi_monitor.integrations.transformers")
    with pytest.raises(ImportError, match=r'pip install "nfi-monitor\[transformers\]"'):
        import nfi_monitor.integrations.transformers  # noqa: F401


# --- alerts: where they go and what they may do -----------------------------------------------------

SOON = Thresholds(absorbing_enter=1e-9, absorbing_exit=1e-10)
"""Any rounding at all counts as absorption: *at risk* fires within the first steps of any training."""


def at_risk(**options: Any) -> NFICallback:
    return quiet(thresholds=SOON, **options)


def test_an_alert_goes_to_console_run_directory_log_history_tensorboard_and_callback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Alert] = []
    callback = at_risk(console=True, on_alert=told.append)
    trainer = hf.trainer(tmp_path, callbacks=[callback])
    trainer.train()
    first = watched(callback).alerts[0]
    assert first.kind is AlertKind.AT_RISK
    assert "at risk" in capsys.readouterr().err
    assert told[0].id == first.id
    assert read_run(tmp_path / "nfi").alerts[0].id == first.id
    entries = [entry for entry in trainer.state.log_history if "nfi_alert" in entry]
    assert entries[0]["nfi_alert"]["id"] == first.id
    assert (entries[0]["nfi_change"], entries[0]["step"]) == ("begin", first.first_step - 1)
    json.dumps(trainer.state.log_history, allow_nan=False)
    assert list((tmp_path / "nfi").glob("events.out.tfevents.*"))


def test_what_is_told_at_the_very_end_leaves_the_runs_totals_the_last_log_entry(tmp_path: Path) -> None:
    """On an accelerator the last readings come late: after the Trainer has logged its totals."""
    callback = at_risk(run_dir=None)

    class Late(transformers.TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watched(callback)._loop.judge.report(Change.END, watched(callback).alerts[0])

    trainer = hf.trainer(tmp_path, callbacks=[Late(), callback])
    trainer.train()
    assert trainer.state.log_history[-2]["nfi_change"] == "end"
    assert "train_runtime" in trainer.state.log_history[-1]


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_an_alert_notifies_the_services_that_report_to_names(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    fake = types.ModuleType(service)
    if (
        service == "wandb"
    ):  # run.alert(title, text, level: "INFO" | "WARN" | "ERROR"), no run: wandb.run is None
        fake.run = types.SimpleNamespace(alert=lambda **given: calls.append(given))  # type: ignore[attr-defined]
    else:  # trackio.alert(title, text, level: AlertLevel), an enum whose values are info, warn, error
        fake.alert = lambda **given: calls.append(given)  # type: ignore[attr-defined]
        fake.AlertLevel = str  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, service, fake)
    trainer = hf.trainer(tmp_path, callbacks=[at_risk(run_dir=None)])
    trainer.args.report_to = [service, "somewhere else"]  # set late: the Trainer's own callback stays away
    trainer.train()
    assert calls[0].keys() == {"title", "text", "level"}
    assert len(calls[0]["title"]) < 64 and "at risk" in calls[0]["title"]
    assert "zero-sum violation" in calls[0]["text"] and "float64" in calls[0]["text"]
    assert calls[0]["level"].lower() == "info"


def test_a_service_that_fails_is_reported_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**given: Any) -> None:
        raise RuntimeError("Call trackio.init() before trackio.alert().")

    fake = types.SimpleNamespace(alert=refuse, AlertLevel=str)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    callback = at_risk(run_dir=None)
    trainer = hf.trainer(tmp_path, callbacks=[callback])
    trainer.args.report_to = ["trackio"]
    trainer.train()
    assert watched(callback).step == STEPS
    assert [
        "trackio.init()" in note.message for note in watched(callback).notes if "failed" in note.code
    ] == [True]
    assert [entry for entry in trainer.state.log_history if "nfi_alert" in entry], "the others go on"


def test_save_on_saves_a_checkpoint_at_the_step_of_the_alert_and_only_then(tmp_path: Path) -> None:
    callback = at_risk(save_on="at_risk")
    hf.trainer(tmp_path, callbacks=[callback]).train()
    first = watched(callback).alerts[0].first_step
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{first}"]
    hf.trainer(tmp_path / "other", callbacks=[at_risk(save_on=["imminent", AlertKind.SLINGSHOT])]).train()
    assert not list((tmp_path / "other").glob("checkpoint-*"))


def test_stop_on_ends_the_training_after_the_step_of_the_alert(tmp_path: Path) -> None:
    callback = at_risk(stop_on=AlertKind.AT_RISK, run_dir=None)
    trainer = hf.trainer(tmp_path, callbacks=[callback])
    trainer.train()
    assert trainer.state.global_step == watched(callback).alerts[0].first_step < STEPS


def test_a_remedy_gets_the_alert_and_what_it_may_change_once_an_alert(tmp_path: Path) -> None:
    seen: list[tuple[Alert, TrainerContext]] = []

    def remedy(alert: Alert, context: TrainerContext) -> None:
        seen.append((alert, context))
        for group in context.optimizer.param_groups:
            group["eps"] = 1e-6

    callback = at_risk(remedy=remedy, run_dir=None)
    trainer = hf.trainer(tmp_path, callbacks=[callback])
    trainer.train()
    (alert, context), *more = seen
    assert [other.kind for other, _ in more].count(AlertKind.AT_RISK) == 0
    assert alert.kind is AlertKind.AT_RISK
    assert context.model is trainer.model
    assert context.optimizer is trainer.optimizer.optimizer
    assert context.schedulers == (trainer.lr_scheduler,)
    assert context.native["state"] is trainer.state
    assert {group["eps"] for group in trainer.optimizer.param_groups} == {1e-6}


def test_a_remedy_that_fails_is_reported_and_training_goes_on(tmp_path: Path) -> None:
    callback = at_risk(remedy=lambda alert, context: 1 / 0, run_dir=None)
    hf.trainer(tmp_path, callbacks=[callback]).train()
    assert watched(callback).step == STEPS
    [note] = [note.message for note in watched(callback).notes if note.code == "failed_remedy"]
    assert "ZeroDivisionError" in note and "training is not affected" in note


# --- resume -----------------------------------------------------------------------------------------

CUT = 5


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Monitor, dict[str, Any]]:
    """A training with a checkpoint in the middle: (its folder, its monitor, its final state)."""
    folder = tmp_path_factory.mktemp("straight")
    callback = at_risk()
    trainer = hf.trainer(folder, callbacks=[callback], save_strategy="steps", save_steps=CUT)
    trainer.train()
    return folder, watched(callback), hf.state(trainer)


def alerts_without_steps_before(monitor: Monitor) -> list[tuple[Any, ...]]:
    return [
        (alert.id, alert.kind, alert.first_step, alert.last_step, alert.state) for alert in monitor.alerts
    ]


@pytest.mark.parametrize("restoring", [False, True])
def test_a_resumed_training_goes_on_with_alerts_and_detector_and_to_the_same_bits(
    restoring: bool, straight: tuple[Path, Monitor, dict[str, Any]]
) -> None:
    """With restore_callback_states_from_checkpoint the Trainer makes a new callback of what it saved."""
    folder, expected, state = straight
    told: list[Alert] = []
    callback = at_risk(on_alert=told.append, remedy=lambda alert, context: told.append(alert))
    trainer = hf.trainer(folder, callbacks=[callback], restore_callback_states_from_checkpoint=restoring)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{CUT}"))
    assert differences({**state, "logged": None}, {**hf.state(trainer), "logged": None}) == []
    assert trainer.callback_handler.callbacks.count(callback) == 1, "the callback given is the one that runs"
    monitor = watched(callback)
    assert monitor.step == expected.step == STEPS
    assert alerts_without_steps_before(monitor) == alerts_without_steps_before(expected)
    assert monitor.phases == expected.phases
    assert monitor.history["loss"][0].tolist() == list(range(CUT + 1, STEPS + 1))
    began = {alert.id for alert in told} & {alert.id for alert in monitor.alerts if alert.first_step <= CUT}
    assert all(alert.first_step > CUT or alert.id in began for alert in told)
    assert str(monitor.run_dir) == str(folder / "nfi"), "a resumed training goes on in its run directory"


def test_what_began_before_the_checkpoint_is_not_acted_on_again(
    straight: tuple[Path, Monitor, dict[str, Any]],
) -> None:
    folder, expected, _ = straight
    assert expected.alerts[0].first_step < CUT
    acted: list[str] = []
    callback = at_risk(remedy=lambda alert, context: acted.append(alert.id))
    hf.trainer(folder, callbacks=[callback]).train(resume_from_checkpoint=str(folder / f"checkpoint-{CUT}"))
    assert acted == [alert.id for alert in expected.alerts if alert.first_step > CUT]


def test_a_callback_added_to_a_run_of_before_can_be_resumed_and_saved(tmp_path: Path) -> None:
    """The Trainer's own save looks up each callback's state by name: a KeyError where there is none."""
    hf.trainer(tmp_path, steps=4, save_strategy="steps", save_steps=2).train()
    callback = quiet()
    trainer = hf.trainer(tmp_path, callbacks=[callback], steps=4, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert watched(callback).step == 2
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    assert saved["stateful_callbacks"]["NFICallback"]["nfi_monitor"]["monitor"]["step"] == 2


def test_a_second_training_of_the_same_trainer_starts_anew(tmp_path: Path) -> None:
    callback = at_risk()
    trainer = hf.trainer(tmp_path, callbacks=[callback], steps=4)
    trainer.train()
    first = watched(callback)
    trainer.train()
    assert watched(callback) is not first
    assert watched(callback).step == 4
    assert math.isfinite(watched(callback).history.last("loss"))
    assert watched(callback).alerts[0].first_step == first.alerts[0].first_step


def test_a_damaged_state_in_a_checkpoint_is_reported_and_training_goes_on(tmp_path: Path) -> None:
    hf.trainer(tmp_path, callbacks=[quiet()], steps=4, save_strategy="steps", save_steps=2).train()
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved["stateful_callbacks"]["NFICallback"]["nfi_monitor"]["monitor"] = {"of": "another kind"}
    file.write_text(json.dumps(saved), encoding="utf-8")
    callback = quiet()
    trainer = hf.trainer(tmp_path, callbacks=[callback], steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert [
        "Not a monitor's state" in n.message for n in watched(callback).notes if n.code == "failed_resume"
    ] == [True]


def test_a_checkpoint_is_strict_json_and_holds_the_same_state(tmp_path: Path) -> None:
    """NaN and Infinity are no JSON: programs in other languages could not read trainer_state.json."""
    states: list[str] = []

    class Kept(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            states.append(json.dumps(watched(callback).state_dict(), sort_keys=True))

    callback = quiet()
    hf.trainer(tmp_path, callbacks=[callback, Kept()], steps=4, save_strategy="steps", save_steps=2).train()
    text = (tmp_path / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8")

    def refused(constant: str) -> None:
        pytest.fail(f"{constant} in trainer_state.json")

    saved = json.loads(text, parse_constant=refused)["stateful_callbacks"]["NFICallback"]["nfi_monitor"]
    assert "-Infinity" in json.dumps(saved) or "Infinity" in json.dumps(saved), "nothing to convert"
    # Python's own JSON has NaN and Infinity.
    assert json.dumps(from_strict_json(saved)["monitor"], sort_keys=True) == states[0]


def test_of_two_callbacks_one_watches_and_says_that_the_other_does_not(tmp_path: Path) -> None:
    acted: list[str] = []
    first, second = at_risk(), at_risk(remedy=lambda alert, context: acted.append(alert.id))
    hf.trainer(tmp_path, callbacks=[first, second], steps=6, save_strategy="steps", save_steps=3).train()
    monitor = watched(first)
    assert watched(second) is monitor and monitor.closed
    assert monitor.history["loss"][0].tolist() == list(range(1, 7)) and monitor.alerts and not acted
    (note,) = [note for note in monitor.notes if note.code == "second_callback"]
    assert "more than one NFICallback" in note.message and note.step == 0
    assert not (tmp_path / "nfi-2").exists()
    for again in (first, second):  # each of them watches a later training alone
        hf.trainer(tmp_path / "later", callbacks=[again], steps=2).train()
        assert watched(again) is not monitor and watched(again).step == 2


def test_a_trainers_run_is_replayed_to_the_last_bit_as_the_recipe_says(tmp_path: Path) -> None:
    """Accumulated, clipped, on a schedule; several epochs of shuffled batches."""
    taken: list[Snapshot] = []

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                taken.append(watched(callback).take_snapshot())

    callback, accumulated = quiet(), 2
    done = hf.trainer(
        tmp_path,
        callbacks=[callback, Keep()],
        gradient_accumulation_steps=accumulated,
        lr_scheduler_type="cosine",
        steps=8,
    )
    done.train()
    monitor = watched(callback)
    with pytest.raises(MonitorError, match=r"A closed monitor.*one of monitor\.snapshots.*get_batch_samples"):
        monitor.replay(lambda step: 0.0)
    loader = done.get_train_dataloader()
    per_epoch = len(loader) // accumulated

    def step_fn(step: int) -> Tensor:
        epoch, within = divmod(step - 1, per_epoch)
        loader.set_epoch(epoch)
        # An iterator draws a random number when it is made: the run does so once an epoch.
        with torch.random.fork_rng(enabled=within > 0):
            batches = iter(loader)
            for _ in range(within * accumulated):
                next(batches)
        inputs, items = done.get_batch_samples(batches, accumulated, done.args.device)
        losses = [done.training_step(done.model, micro_batch, items) for micro_batch in inputs]
        done.accelerator.clip_grad_norm_(done.model.parameters(), done.args.max_grad_norm)
        done.optimizer.step()
        done.lr_scheduler.step()
        done.model.zero_grad()
        return sum(losses[1:], losses[0])

    verdict = replay(
        taken[0],
        step_fn,
        steps=5,
        model=done.model,
        optimizer=done.optimizer,
        stateful=[done.lr_scheduler],
        recorded=dict(zip(*(column.tolist() for column in monitor.history["loss"]), strict=True)),
    )
    assert verdict.reproduced is True and verdict.spiked_at is None
    assert len(verdict.outcomes["as_it_was"].losses) == 5
