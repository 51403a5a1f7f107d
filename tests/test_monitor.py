"""The public API on ordinary and on bad input: a clear error or one clear note, and training goes on."""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Alert, AlreadyMonitoredError, HeadNotFoundError, Monitor, Phase, Severity
from nfi_monitor.native import library
from nfi_monitor.remedies import Autopilot, Policy
from nfi_monitor.types import AlertKind, AlertState
from tests.runs import batch, mlp, train


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=options.pop("lr", 1e-2), **options)


def watched(
    model: nn.Module,
    steps: int = 30,
    loss_of: Callable[..., Tensor] = F.cross_entropy,
    optimizer: Any = None,
    **options: Any,
) -> Monitor:
    """Train under a silent monitor that reads every step; returns the closed monitor."""
    optimizer = optimizer or adamw(model)
    with Monitor(model, optimizer, **{"console": False, "every": 1, **options}) as monitor:
        train(model, optimizer, steps, loss_of)
    return monitor


def codes(monitor: Monitor) -> list[str]:
    return [note.code for note in monitor.notes]


# --- what it does --------------------------------------------------------------------------------


def test_a_step_under_autocast_is_measured_as_precisely_as_one_outside() -> None:
    readings = []
    for around in (contextlib.nullcontext(), torch.autocast("cpu", torch.float16)):
        model = mlp()
        optimizer = adamw(model, foreach=False)
        inputs, targets = batch()
        with Monitor(model, optimizer, console=False, every=1) as monitor:
            for _ in range(4):
                optimizer.zero_grad()
                (F.cross_entropy(model(inputs), targets) * 1e-6).backward()
                with around:
                    optimizer.step()
        readings.append({name: monitor.history[name][1].tolist() for name in monitor.history})
    assert repr(readings[0]) == repr(readings[1])


def test_two_lines_attach_and_every_core_quantity_has_a_history() -> None:
    monitor = watched(mlp())
    for name in (
        "zero_sum_violation", "zero_sum_violation_weight", "zero_sum_violation_bias", "absorbed_fraction",
        "margin_median", "residual_mass", "classifier_mean_norm", "feature_mean_norm", "mean_alignment",
        "feature_mean_growth", "effective_learning_rate", "second_moment_decay", "rms_t_max", "update_rms",
        "logit_displacement", "weight_norm", "head_weight_norm", "secant_curvature", "head_loss",
    ):  # fmt: skip
        steps, values = monitor.history[name]
        assert steps.dtype == np.int64 and values.dtype == np.float64 and len(steps) == len(values) > 0, name
    assert monitor.phase is Phase.HEALTHY
    assert monitor.alerts == []
    assert monitor.notes == []


def test_the_loss_is_known_without_being_told() -> None:
    model = mlp()
    optimizer = adamw(model)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        losses = train(model, optimizer, 30)
    np.testing.assert_allclose(monitor.history["head_loss"][1], losses, rtol=1e-5)


def test_an_observed_loss_is_the_mean_of_its_micro_batches() -> None:
    model = mlp()
    optimizer = adamw(model)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for micro in (torch.tensor(1.0), torch.tensor(4.0)):
            monitor.observe_loss(micro)
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        monitor.observe_loss(7.0)
        optimizer.step()
    assert monitor.history["loss"][1].tolist() == [2.5, 7.0]


def test_tap_returns_the_tensor_itself_and_replaces_the_heads_rows() -> None:
    """Soft-capped logits break the zero-sum at the head, and keep it where they are tapped."""
    model = mlp()
    optimizer = adamw(model)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(30):
            optimizer.zero_grad()
            capped = 2.0 * torch.tanh(model(inputs) / 2.0)
            assert monitor.tap(capped) is capped
            F.cross_entropy(capped, targets).backward()
            optimizer.step()
    assert monitor.history["zero_sum_violation"][1].max() < 1e-6
    assert "not_shift_invariant" not in codes(monitor)
    assert monitor.history["feature_mean_norm"][0].tolist() == list(range(1, 31))
    assert "logit_displacement" not in monitor.history and "displacement_left_out" in codes(monitor)


def test_every_counts_optimizer_steps_not_micro_batches() -> None:
    model = mlp()
    optimizer = adamw(model)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=5) as monitor:
        for _ in range(20):
            for _ in range(3):
                F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert monitor.history["zero_sum_violation"][0].tolist() == [1, 5, 10, 15, 20]
    assert monitor.step == 20


def test_auto_reads_sparsely_while_nothing_goes_on() -> None:
    model = mlp()
    optimizer = adamw(model, lr=1e-4)
    with Monitor(model, optimizer, console=False, overhead_budget=None) as monitor:
        train(model, optimizer, 160)
    assert monitor.history["rms_t_max"][0].tolist() == [
        *range(1, 9),
        *(step for step in range(9, 161) if step % 32 <= 1),
    ]


def test_a_probe_batch_gives_margin_displacement() -> None:
    inputs, targets = batch(seed=5)
    model = mlp()
    monitor = watched(model, probe=(inputs, targets))
    steps, values = monitor.history["margin_displacement"]
    assert steps.tolist() == list(range(2, 31))
    assert (values > 0).all()


def test_of_several_ranks_only_the_first_speaks_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nfi_monitor.ranks.processes.rank", lambda: 3)
    monkeypatch.setattr("nfi_monitor.ranks.processes.processes", lambda group=None: 4)
    model = mlp()
    optimizer = adamw(model)
    with Monitor(model, optimizer, every=1, run_dir=tmp_path / "run") as monitor:
        monitor.observe_loss(float("nan"))
        train(model, optimizer, 3)
    assert monitor.alerts[0].rank == 3
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_weight_norms_are_given_per_layer_on_request() -> None:
    model = mlp()
    with Monitor(model, adamw(model), console=False) as monitor:
        norms = monitor.weight_norms()
    assert list(norms) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    assert norms["4.weight"] == pytest.approx(model[4].weight.norm().item(), rel=1e-6)


def test_summary_is_printable_and_dumpable() -> None:
    from rich.console import Console

    monitor = watched(mlp())
    assert json.loads(json.dumps(monitor.summary()))["last_step"] == 30
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(monitor.summary())
    assert "Linear 32→7" in console.export_text()


def test_state_survives_a_checkpoint(tmp_path: Path) -> None:
    """Alerts, phase and detector continue as if the run had not been interrupted."""
    model = mlp()
    optimizer = adamw(model)
    first = Monitor(model, optimizer, console=False, every=1)
    train(model, optimizer, 10)
    torch.save(first.state_dict(), tmp_path / "monitor.pt")
    first.close()
    second = Monitor(model, optimizer, console=False, every=1)
    second.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
    train(model, optimizer, 10)
    assert second.step == 20
    assert second.history["zero_sum_violation"][0].tolist() == list(range(11, 21))
    resumed = second.state_dict()["detector"]
    second.close()

    model = mlp()
    uninterrupted = watched(model, steps=20)
    expected = uninterrupted.state_dict()["detector"]
    # What compares two steps is missing at the first one after a resume: its predecessor was not read.
    for state in (resumed, expected):
        for name in (
            "curvature_peak",
            "alignment",
            "_alignment",
            "swing",
            "_swing",
            "_swing_lowest",
            "swell",
        ):
            state["signals"].pop(name)
        state["causes"].pop("curvature")
    assert _same(resumed, expected)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b or (a != a and b != b))


def test_a_state_of_another_kind_is_refused_with_what_to_pass() -> None:
    model = mlp()
    with (
        Monitor(model, adamw(model), console=False) as monitor,
        pytest.raises(ValueError, match=r"state_dict\(\)"),
    ):
        monitor.load_state_dict({"weights": 1})


# --- bad input: errors at construction ------------------------------------------------------------


def test_a_model_without_a_head_is_watched_without_one_and_says_how_to_name_one() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model = Scaled()
    with Monitor(model, torch.optim.Adam(model.parameters()), console=False, every=1) as monitor:
        for _ in range(8):
            loss = model(torch.randn(3, 4)).square().mean()
            loss.backward()
            monitor.observe_loss(loss)
            monitor.optimizer.step()
    assert codes(monitor) == ["no_head"]
    for part in ("found none", "head=", "monitor.tap", "*imminent*"):
        assert part in monitor.notes[0].message
    assert len(monitor.history["rms_t_max"][1]) == len(monitor.history["loss"][1]) == 8


def test_of_two_heads_the_one_with_most_classes_is_watched_and_the_other_is_named() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(12, 32)
            self.policy = nn.Linear(32, 7)
            self.value = nn.Linear(32, 1)

    model = TwoHeads()
    with Monitor(model, adamw(model), console=False) as monitor:
        assert "policy (Linear 32→7)" in json.dumps(monitor.summary(), ensure_ascii=False)
    (note,) = monitor.notes
    assert note.code == "several_heads"
    assert "value (Linear 32→1)" in note.message and "head='value'" in note.message
    with Monitor(model, adamw(model), head="value", console=False) as monitor:
        assert monitor.head is not None and monitor.head.name == "value" and monitor.notes == []
    with Monitor(model, adamw(model), head=["value", model.policy], console=False) as monitor:
        assert monitor.head is not None and monitor.head.name == "policy"
        assert codes(monitor) == ["several_heads"]


def test_two_heads_are_both_watched_by_a_monitor_for_each() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 7), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.first(x), self.second(x)

    torch.manual_seed(0)
    model, (inputs, targets) = TwoHeads(), batch()
    optimizer = adamw(model)
    with (
        Monitor(model, optimizer, head="first", console=False, every=1) as first,
        Monitor(model, optimizer, head="second", console=False, every=1) as second,
    ):
        for _ in range(4):
            losses = [F.cross_entropy(z, targets % z.shape[-1]) for z in model(inputs)]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
    for monitor, loss in zip((first, second), losses, strict=True):
        assert monitor.history["head_loss"][1][-1] == pytest.approx(loss.item(), rel=1e-5)
        assert monitor.notes == []


def test_a_misspelt_head_is_answered_with_the_candidates() -> None:
    model = mlp()
    with pytest.raises(HeadNotFoundError, match=r"no module named 'heed'[\s\S]*  4  in_features=32"):
        Monitor(model, adamw(model), head="heed")


def test_a_second_monitor_on_the_same_head_is_refused_until_the_first_closes() -> None:
    model = mlp()
    with (
        Monitor(model, adamw(model), console=False),
        pytest.raises(AlreadyMonitoredError, match=r"monitor.close\(\)"),
    ):
        Monitor(model, adamw(model), console=False)
    Monitor(model, adamw(model), console=False).close()


def test_closing_twice_is_fine() -> None:
    model = mlp()
    monitor = Monitor(model, adamw(model), console=False)
    monitor.close()
    monitor.close()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "resnet"}, TypeError, r"torch\.nn\.Module, got str"),
        ({"optimizer": "adam"}, TypeError, r"torch\.optim\.Optimizer, got str"),
        ({"every": 0}, ValueError, r"every=0"),
        ({"every": "often"}, ValueError, r"every='often'"),
        ({"overhead_budget": "1%"}, ValueError, r"overhead_budget='1%': use a share such as 0\.01"),
        (
            {"stateful": torch.Generator()},
            TypeError,
            r"stateful must be a list, got Generator: stateful=\[it\]",
        ),
        ({"head": True}, ValueError, r"head=True"),
        ({"on_alert": 3}, TypeError, r"on_alert must be callable"),
        ({"probe": (torch.zeros(2, 12), torch.zeros(2))}, ValueError, r"integer labels"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = mlp()
    keywords = {"model": model, "optimizer": adamw(model), "console": False, **arguments}
    with pytest.raises(error, match=message):
        Monitor(**keywords)
    # A failed construction leaves nothing behind.
    assert not model[-1]._forward_hooks
    Monitor(model, adamw(model), console=False).close()


# --- bad input: one note, and training goes on ------------------------------------------------------


def test_an_optimizer_without_the_heads_weight_is_said() -> None:
    model = mlp()
    monitor = watched(model, optimizer=adamw(model[0]))
    assert "optimizer_without_head" in codes(monitor)
    assert len(monitor.history["zero_sum_violation"][0]) == 30
    assert "logit_displacement" not in monitor.history


def test_a_head_that_never_fires_falls_back_to_its_weight_gradient() -> None:
    class Fused(nn.Module):
        """Like a fused linear cross-entropy: reads the head's weight, never calls the head."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(12, 32)
            self.lm_head = nn.Linear(32, 7)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.body(x), self.lm_head.weight, self.lm_head.bias)

    monitor = watched(Fused())
    assert codes(monitor) == ["head_never_fired", "no_loss"]
    assert "never fired" in monitor.notes[0].message and "monitor.tap(logits)" in monitor.notes[0].message
    assert "hidden = monitor.tap_features(hidden, targets)" in monitor.notes[0].message
    assert "*at risk* stays at *info* and *imminent* cannot be reached" in monitor.notes[0].message
    assert monitor.history["zero_sum_violation_weight"][1].max() < 1e-5
    assert monitor.summary()["run"]["level"] == "weight_gradient"


@pytest.mark.parametrize(("loss", "said"), [(-1e-9, []), (-1.0, ["loss_below_zero"])])
def test_a_loss_that_falls_below_zero_by_more_than_rounding_is_said_once(
    loss: float, said: list[str]
) -> None:
    model = mlp()
    optimizer = adamw(model)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(3):
            monitor.observe_loss(loss)
            train(model, optimizer, 1)
    assert codes(monitor) == said


@pytest.mark.parametrize(
    ("every", "observe", "said"),
    [("auto", False, True), ("auto", True, False), (10, False, True), (1, False, False)],
)
def test_losses_between_readings_that_nobody_reports_are_said_once(
    every: int | str, observe: bool, said: bool
) -> None:
    model = mlp()
    optimizer = adamw(model)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=every, overhead_budget=None) as monitor:
        for _ in range(120):
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            if observe:
                monitor.observe_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert codes(monitor) == (["loss_between_readings"] if said else [])
    if said:
        steps = [int(step) for step in monitor.history["head_loss"][0]]
        [note] = monitor.notes
        before = steps[steps.index(note.step) - 1]
        assert note.step - before > 1 and steps.index(note.step) >= 4
        assert f"after step {before:,} it read step {note.step:,}" in note.message
        assert "monitor.observe_loss(loss) before optimizer.step()" in note.message


def test_a_frozen_head_that_is_named_is_said_to_be_frozen() -> None:
    model = nn.ModuleDict({"student": mlp(), "teacher": mlp().requires_grad_(False)})
    optimizer = adamw(model["student"])
    inputs, targets = batch()
    head = list(model["teacher"].modules())[-1]
    with Monitor(model, optimizer, head=head, console=False, every=1) as monitor:
        for _ in range(6):
            model["teacher"](inputs)
            F.cross_entropy(model["student"](inputs), targets).backward()
            optimizer.step()
    [text] = [note.message for note in monitor.notes if note.code == "head_never_fired"]
    assert "frozen" in text and "eval mode" not in text


def test_a_head_that_fires_only_in_eval_mode_is_said() -> None:
    model = mlp().eval()
    monitor = watched(model)
    assert codes(monitor)[0] == "head_never_fired"
    assert "model.train()" in monitor.notes[0].message


def test_evaluation_between_steps_is_not_taken_for_training() -> None:
    model = mlp()
    optimizer = adamw(model)
    inputs, _ = batch()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(5):
            train(model, optimizer, 1)
            model.eval()
            with torch.no_grad():
                model(inputs * 100)
            model.train()
    assert len(monitor.history["live_fraction"][0]) == 5
    assert monitor.notes == []


@pytest.mark.parametrize("kind", ["hinge", "bce"])
def test_a_head_with_one_output_says_what_is_still_seen(kind: str) -> None:
    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        sign = (targets % 2).float()
        if kind == "bce":
            return F.binary_cross_entropy_with_logits(logits[:, 0], sign)
        return F.relu(1 - (2 * sign - 1) * logits[:, 0]).mean()

    monitor = watched(mlp(classes=1), loss_of=loss_of)
    assert codes(monitor) == ["single_output", "no_loss"]
    assert "zero_sum_violation" not in monitor.history
    assert len(monitor.history["rms_t_max"][0]) == 30


def z_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets) + 1e-3 * logits.logsumexp(-1).square().mean()


def logit_penalty(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets) + 1e-2 * logits.square().mean()


def soft_capped(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(5.0 * torch.tanh(logits / 5.0), targets)


def regression(logits: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(logits, F.one_hot(targets, 7).float())


def one_vs_rest(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(targets, 7).float())


@pytest.mark.parametrize("loss_of", [z_loss, logit_penalty, soft_capped, regression, one_vs_rest])
def test_a_loss_that_breaks_the_zero_sum_by_design_is_said_once_and_never_alarmed(loss_of: Any) -> None:
    monitor = watched(mlp(), steps=400, loss_of=loss_of, every=4)
    assert codes(monitor).count("not_shift_invariant") == 1
    assert [alert for alert in monitor.alerts if alert.mechanism == "numerical_feature_inflation"] == []
    assert monitor.phase in (Phase.HEALTHY, Phase.SLINGSHOT, Phase.RECOVERING)


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    own = logits.softmax(-1).gather(1, targets[:, None])[:, 0]
    return ((1 - own) ** 2 * F.cross_entropy(logits, targets, reduction="none")).mean()


@pytest.mark.parametrize(
    "loss_of",
    [
        F.cross_entropy,
        lambda z, y: F.cross_entropy(z, y, weight=torch.linspace(0.1, 3.0, 7)),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
        lambda z, y: F.kl_div(z.log_softmax(-1), F.one_hot(y, 7) * 0.7 + 0.3 / 7, reduction="batchmean"),
        focal,
        lambda z, y: F.multi_margin_loss(z, y),
    ],
    ids=["cross_entropy", "class_weights", "label_smoothing", "kl", "focal", "multi_margin"],
)  # fmt: skip
def test_a_shift_invariant_loss_is_never_taken_for_one_that_is_not(loss_of: Any) -> None:
    assert "not_shift_invariant" not in codes(watched(mlp(), steps=400, loss_of=loss_of, every=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_in_half_precision_is_not_taken_for_a_broken_zero_sum(dtype: torch.dtype) -> None:
    monitor = watched(mlp(), steps=200, loss_of=lambda z, y: F.cross_entropy(z.to(dtype), y).float())
    assert "not_shift_invariant" not in codes(monitor)
    assert monitor.history["absorbed_fraction"][1].max() > 0.5
    assert "logits.double()" in monitor.alerts[0].advice[0]


def test_soft_targets_are_said_instead_of_guessed_about() -> None:
    monitor = watched(mlp(), steps=70, loss_of=lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1))
    assert set(codes(monitor)) == {"soft_targets", "not_cross_entropy"}


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_is_an_alert_of_its_own_kind_and_no_exception(where: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    seen: list[Alert] = []
    with Monitor(model, optimizer, console=False, every=1, on_alert=seen.append) as monitor:
        train(model, optimizer, 5)
        monitor.observe_loss(float("nan") if where == "loss" else 1.0)
        if where == "gradient":
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(float("inf"))
        optimizer.step()
        alerts = monitor.alerts
    assert [alert.kind for alert in alerts] == [AlertKind.NON_FINITE]
    spoilt = where == "gradient"
    assert alerts[0].first_step == 6
    assert alerts[0].severity is (Severity.CRITICAL if spoilt else Severity.WARNING)
    assert alerts[0].advice[0].startswith("Stop and go back" if spoilt else "Look at the batch")
    assert json.loads(json.dumps(alerts[0].to_json()))["kind"] == "non_finite"
    assert seen[0].kind is AlertKind.NON_FINITE


def test_a_batch_of_ignored_rows_whose_mean_loss_is_nan_ends_no_run_and_the_next_step_is_read() -> None:
    model, pilot = mlp(), Autopilot(Policy(stop="raise"))
    optimizer = adamw(model)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, on_alert=pilot) as monitor:
        for step in range(1, 17):
            loss = F.cross_entropy(model(inputs), torch.full_like(targets, -100) if step == 13 else targets)
            monitor.observe_loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert step != 13 or math.isnan(loss.item())
    read = monitor.history["gradient_norm"][0].tolist()
    assert 13 not in read and 14 in read
    [alert] = monitor.alerts
    assert (alert.severity, alert.state, alert.last_step) == (Severity.WARNING, AlertState.RESOLVED, 14)
    assert list(alert.evidence) == ["loss"], "nothing else was measured at that step"
    assert "go back" not in " ".join(alert.advice)
    assert not pilot.should_stop and pilot.actions == []


def test_an_empty_batch_is_no_reading_of_rows_and_no_error() -> None:
    model = mlp()
    optimizer = adamw(model)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        train(model, optimizer, 3)
        optimizer.zero_grad()
        model(torch.empty(0, 12)).sum().backward()
        optimizer.step()
        train(model, optimizer, 3)
    assert monitor.history["zero_sum_violation"][0].tolist() == [1, 2, 3, 5, 6, 7]
    assert monitor.notes == [] and monitor.alerts == []


def test_a_step_with_all_rows_ignored_is_said_and_concludes_nothing() -> None:
    model = mlp()
    optimizer = adamw(model)
    inputs, _ = batch()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        train(model, optimizer, 3)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), torch.full((24,), -100), reduction="sum").backward()
        optimizer.step()
    assert codes(monitor) == ["all_rows_ignored"]
    assert monitor.history["ignored_fraction"][1].tolist() == [0, 0, 0, 1]
    assert monitor.history["absorbed_fraction"][0].tolist() == [1, 2, 3]


def test_a_step_the_gradient_scaler_skipped_is_not_judged() -> None:
    """Fused AdamW runs its hooks even on a skipped step, with gradients still scaled."""
    model = mlp()
    optimizer = adamw(model, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for step in range(6):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets) * (1e38 if step == 3 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert codes(monitor) == ["skipped_step"]
    assert monitor.alerts == []
    assert 4 not in monitor.history["gradient_norm"][0]
    assert monitor.history["gradient_norm"][1].max() < 10, "gradients are recorded without the scale"


def test_a_step_an_unfused_scaler_skipped_does_not_poison_the_next_one() -> None:
    """No hook runs for the skipped step: its Inf loss is still there at the next."""
    model = mlp()
    optimizer = adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for step in range(6):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets) * (float("inf") if step == 3 else 1.0)
            monitor.observe_loss(loss)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert monitor.alerts == []
    assert np.isfinite(monitor.history["loss"][1]).all() and len(monitor.history["loss"][1]) == 5


def test_an_exception_in_the_loop_comes_out_as_it_went_in() -> None:
    model = mlp()
    optimizer = adamw(model)
    with pytest.raises(ValueError, match="mine"), Monitor(model, optimizer, console=False):
        optimizer.param_groups.clear()
        raise ValueError("mine")


def test_a_closed_monitor_lets_go_of_model_and_optimizer() -> None:
    import gc
    import weakref

    model = mlp()
    optimizer = adamw(model)
    with Monitor(model, optimizer, console=False) as monitor:
        train(model, optimizer, 3)
    gone = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert gone() is None
    assert monitor.summary()["last_step"] == 3 and monitor.state_dict()["step"] == 3


def test_a_loss_observed_now_and_then_is_not_mixed_with_the_heads_own() -> None:
    model = mlp()
    optimizer = adamw(model)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for step in range(200):
            if step % 20 == 0:
                monitor.observe_loss(5.0)
            train(model, optimizer, 1)
    assert [alert for alert in monitor.alerts if alert.kind is AlertKind.SLINGSHOT] == []


def test_an_everyday_minibatch_run_never_slingshots() -> None:
    """Batches of eight: the loss crosses both of W. Wu's levels all the time."""
    torch.manual_seed(0)
    inputs = torch.randn(400, 12)
    targets = (inputs @ torch.randn(12, 7) + 0.8 * torch.randn(400, 7)).argmax(1)
    model = mlp(width=64)
    optimizer = adamw(model, lr=3e-3)
    losses = []
    with Monitor(model, optimizer, console=False) as monitor:
        for _ in range(1500):
            rows = torch.randint(0, 400, (8,))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[rows]), targets[rows])
            monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(x < 1e-2 for x in losses) > 20 and sum(x > 1e-1 for x in losses[300:]) > 20
    assert [alert for alert in monitor.alerts if alert.kind is AlertKind.SLINGSHOT] == []


def test_sgd_is_said_to_be_without_second_moment_and_the_rest_works() -> None:
    model = mlp()
    monitor = watched(model, optimizer=torch.optim.SGD(model.parameters(), 1e-2))
    assert codes(monitor) == ["no_second_moment"]
    assert "rms_t_max" not in monitor.history and "logit_displacement" in monitor.history


def test_a_tied_head_is_watched_by_rows_only() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 16)
            self.lm_head = nn.Linear(16, 7, bias=False)
            self.lm_head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(self.embed((x[:, 0].abs() * 10).long() % 7))

    monitor = watched(Tied())
    assert codes(monitor) == ["tied_head"]
    assert "zero_sum_violation_weight" not in monitor.history
    assert len(monitor.history["zero_sum_violation"][0]) == 30


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("nfi_monitor.measure.accumulator.row_statistics", "rows"),
        ("nfi_monitor.engine.step_reader.step_statistics", "optimizer"),
        ("nfi_monitor.capture.optimizer.OptimizerReader.before", "optimizer"),
        ("nfi_monitor.capture.probe_batch.ProbeBatch.displacement", "probe"),
        ("nfi_monitor.detect.detector.Detector.update", "detector"),
    ],
)
def test_an_exception_in_any_part_is_reported_once_and_training_goes_on(
    target: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def broken(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        raise RuntimeError("cosmic ray")

    expected = train(reference := mlp(), adamw(reference), 30)
    monkeypatch.setattr(target, broken)
    model = mlp()
    optimizer = adamw(model)
    with (
        library.disabled(),  # which reads steps without these functions
        Monitor(model, optimizer, console=False, every=1, probe=batch(rows=4)) as monitor,
    ):
        losses = train(model, optimizer, 30)
    assert losses == expected
    failures = [note for note in monitor.notes if note.code.startswith("failed")]
    assert [note.code for note in failures] == [f"failed_{part}"]
    assert "cosmic ray" in failures[0].message and "training is not affected" in failures[0].message
    assert len(calls) == 5, "tried again after 1, 2, 4 … readings"


def test_an_exception_in_the_users_callback_is_reported_once_and_training_goes_on() -> None:
    def broken(alert: Alert) -> None:
        raise KeyError("my own bug")

    model = mlp()
    optimizer = adamw(model)
    with Monitor(model, optimizer, console=False, every=1, on_alert=broken) as monitor:
        for _ in range(3):
            monitor.observe_loss(float("nan"))
            train(model, optimizer, 1)
            train(model, optimizer, 1)
    assert codes(monitor) == ["failed_on_alert"]


def test_a_run_directory_that_cannot_be_written_is_said_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = watched(mlp(), run_dir=tmp_path / "file" / "run", console=True)
    assert any(code.startswith("failed_RunDirectory") for code in codes(monitor))
    assert len(monitor.history["zero_sum_violation"][0]) == 30
    assert "RunDirectory" in capsys.readouterr().err


def test_a_disk_that_fills_up_is_said_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    model = mlp()
    optimizer = adamw(model)
    real = os.write
    with Monitor(model, optimizer, console=False, every=1, run_dir=tmp_path / "run") as monitor:
        train(model, optimizer, 5)

        def full(fd: int, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        train(model, optimizer, 5)
        monkeypatch.setattr(os, "write", real)
    assert [code for code in codes(monitor) if code.startswith("failed")] == ["failed_RunDirectory"]
    assert len(monitor.history["zero_sum_violation"][0]) == 10


def test_snapshots_that_fail_leave_each_step_its_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = adamw(model)
    inputs, targets = batch()
    told = []
    with Monitor(model, optimizer, console=False, every=1) as monitor:

        def broken() -> None:
            raise RuntimeError("broken on purpose")

        monkeypatch.setattr(monitor._loop, "_take_snapshot", broken)
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            monitor.observe_loss(loss)
            told.append(loss.item())
            loss.backward()
            optimizer.step()
    assert monitor.history["loss"][1].tolist() == pytest.approx(told)
    assert codes(monitor) == ["failed_step"]


def test_a_compiled_model_is_read_through_its_weight_gradient_without_a_graph_break() -> None:
    model = mlp()
    optimizer = adamw(model)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(compiled(inputs), targets).backward()
            optimizer.step()
        summary = monitor.summary()
    assert "torch.compile" in monitor.notes[0].message
    assert len(monitor.history["zero_sum_violation_weight"][0]) == 8
    assert json.loads(json.dumps(summary))


@pytest.mark.parametrize(("inside", "graphs"), [(False, 1), (True, 2)])
def test_rows_of_a_compiled_step_cost_at_most_one_graph_break(inside: bool, graphs: int) -> None:
    from torch._dynamo.testing import CompileCounter

    model = mlp()
    optimizer = adamw(model)
    inputs, targets = batch()
    counter = CompileCounter()
    with Monitor(model, optimizer, head=False, console=False, every=1) as monitor:

        def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
            logits = model(inputs)
            return F.cross_entropy(monitor.tap(logits) if inside else logits, targets)

        compiled = torch.compile(loss_of, backend=counter)
        compiled_model = torch.compile(model, backend=counter)
        for _ in range(8):
            optimizer.zero_grad()
            if inside:
                loss = compiled(inputs, targets)
            else:
                loss = F.cross_entropy(monitor.tap(compiled_model(inputs)), targets)
            loss.backward()
            optimizer.step()
    assert counter.frame_count == graphs  # what stands before the break, and what stands after it
    assert len(monitor.history["zero_sum_violation"][0]) == 8


def test_a_loss_that_is_observed_inside_a_compiled_step_costs_one_graph_break() -> None:
    from torch._dynamo.testing import CompileCounter

    model = mlp()
    optimizer = adamw(model)
    inputs, targets = batch()
    counter = CompileCounter()
    with Monitor(model, optimizer, console=False, every=1) as monitor:

        @torch.compile(backend=counter)
        def observed() -> Tensor:
            loss = F.cross_entropy(model(inputs), targets)
            monitor.observe_loss(loss)
            return loss * 1.0

        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = observed()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert counter.frame_count == 2
    assert monitor.history["loss"][1].tolist() == pytest.approx(losses)


def test_rows_of_a_compiled_model_can_be_tapped() -> None:
    model = mlp()
    optimizer = adamw(model)
    inputs, targets = batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with Monitor(compiled, optimizer, console=False, every=1) as monitor:
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(monitor.tap(compiled(inputs)), targets).backward()
            optimizer.step()
    assert len(monitor.history["zero_sum_violation"][0]) == 8
    assert codes(monitor) == ["no_features"]


@pytest.mark.parametrize(
    ("dtype", "said"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)]
)
def test_a_loss_in_half_precision_is_named_as_such_once(dtype: torch.dtype, said: bool) -> None:
    """Margins of 9 nats: absorbed in half precision, far from it in float32."""
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(9.0 * torch.eye(4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    x, y = torch.eye(4), torch.arange(4)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(x).to(dtype), y).backward()
            optimizer.step()
    notes = [note for note in monitor.notes if note.code == "half_precision_loss"]
    assert len(notes) == said
    if notes:
        name = str(dtype).removeprefix("torch.")
        assert f"half precision ({name})" in notes[0].message and "logits.float()" in notes[0].message
