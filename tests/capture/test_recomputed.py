"""Rows of losses that make no logits, recomputed from hidden states and held against the true rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor
from nfi_monitor.capture.recomputed import ROWS
from nfi_monitor.capture.recomputed_rows import cross_entropy_gradient
from tests.capture.recomputed_rows import MODELS, PAGE, PRECISIONS, compare
from tests.runs import batch, differences, snapshot

Loss = Callable[[Tensor, nn.Linear, Tensor], Tensor]
"""(hidden states, head, targets) → loss."""


class Fused(nn.Module):
    """Its head is called only by :func:`unfused`."""

    def __init__(self, width: int = 32, classes: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, width), nn.ReLU())
        self.head = nn.Linear(width, classes)


def unfused(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden), targets)


def chunked(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    parts = [
        F.cross_entropy(F.linear(h, head.weight, head.bias).float(), y, reduction="sum")
        for h, y in zip(hidden.split(5), targets.split(5), strict=True)
    ]
    return torch.stack(parts).sum() / (targets >= 0).sum()


def train(
    loss_of: Loss,
    *,
    steps: int = 6,
    far: float = 200.0,
    watched: bool = True,
    tapped_as: torch.dtype = torch.int64,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Six steps with many absorbed rows; one row in four does not count."""
    model = Fused()
    inputs, targets = batch()
    with torch.no_grad():
        model.head.weight.mul_(far)
        targets = torch.where(torch.arange(24) % 3 > 0, model.head(model.body(inputs)).argmax(1), targets)
        targets[::4] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer, console=False, every=1, **options) if watched else None
    for _ in range(steps):
        hidden = model.body(inputs)
        if monitor is not None:
            assert monitor.tap_features(hidden, targets.to(tapped_as)) is hidden
        loss_of(hidden, model.head, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return monitor, snapshot(model, optimizer)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_targets_may_be_smaller_integers(dtype: torch.dtype) -> None:
    expected, _ = train(chunked)
    monitor, _ = train(chunked, tapped_as=dtype)
    assert set(monitor.history) == set(expected.history)
    assert monitor.history["margin_median"][1].tolist() == expected.history["margin_median"][1].tolist()
    assert [note.code for note in monitor.notes] == [note.code for note in expected.notes]


def test_recomputed_rows_are_those_of_the_same_run_with_logits() -> None:
    expected, _ = train(unfused)
    monitor, trained = train(chunked)
    assert not differences(trained, train(chunked, watched=False)[1])
    assert monitor.history["recomputed_fraction"][1].tolist() == [1.0] * 6
    assert "recomputed_fraction" not in expected.history, "true rows go first"
    assert max(expected.history["absorbed_fraction"][1]) > 0.3
    for name in expected.history:
        steps, values = expected.history[name]
        assert monitor.history[name][0].tolist() == steps.tolist(), name
        assert monitor.history[name][1] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    run = monitor.summary()["run"]
    assert run["level"] == "recomputed" and expected.summary()["run"]["level"] == "rows"
    assert [note.code for note in monitor.notes] == ["rows_recomputed"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_recomputed_rows_are_of_the_same_kind_as_the_true_rows(name: str, precision: str) -> None:
    found = compare(name, precision, steps=24)
    assert found.refused == 0 and found.rows >= 1000
    assert max(found.different.values()) <= found.rows / 1000
    assert found.margin <= {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.05}[precision]


def test_a_model_and_loss_in_bfloat16_are_recomputed_in_it() -> None:
    found = compare("transformer, width 64", "bfloat16", half_loss=True)
    assert found.refused == 0 and found.found["absorbed"] > 100
    assert max(found.different.values()) <= found.rows / 1000


def test_the_page_says_what_the_command_finds() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if "float" in line]
    table = [row for row in rows if len(row) == 8]
    assert {(row[0].removeprefix("| "), row[1]) for row in table} == {
        (name, precision) for name in MODELS for precision in PRECISIONS
    }
    assert all(float(row[5].rstrip("%")) >= 99.9 for row in table)
    assert sum(int(row[3].replace(",", "")) for row in table) > 5000, "absorbed rows"


def scaled_by(factor: float) -> Loss:
    return lambda hidden, head, targets: factor * chunked(hidden, head, targets)


def weighted(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Each row has a weight of its own, as in a policy's loss."""
    each = F.cross_entropy(F.linear(hidden, head.weight, head.bias), targets, reduction="none")
    return (torch.linspace(0.1, 2.0, len(each)) * each).sum()


def two_passes(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    loss = chunked(hidden, head, targets) / 2
    loss.backward(retain_graph=True)
    return loss


@pytest.mark.parametrize(
    "loss_of",
    [scaled_by(1 / 3), scaled_by(2.0**16), scaled_by(18.0), scaled_by(1e-4), weighted, two_passes],
    ids=["third", "scaler", "sum", "small", "weights", "two passes"],
)
def test_the_factor_of_the_loss_and_the_weights_of_rows_change_no_kind_of_row(loss_of: Loss) -> None:
    expected, _ = train(unfused, steps=1)
    monitor, _ = train(loss_of, steps=1)
    for name in ("live_fraction", "absorbed_fraction", "ignored_fraction", "margin_median", "head_loss"):
        assert monitor.history[name][1] == pytest.approx(expected.history[name][1], rel=1e-5), name


def halved(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head.weight, head.bias) / 2, targets)


def other_labels(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return chunked(hidden, head, (targets + 1).clamp(min=0) % 7)


def capped(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return F.cross_entropy(2 * torch.tanh(F.linear(hidden, head.weight, head.bias) / 2), targets)


def smoothed(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head.weight, head.bias), targets, label_smoothing=0.05)


@pytest.mark.parametrize("far", [0.1, 8.0], ids=["small logits", "large logits"])
@pytest.mark.parametrize("loss_of", [halved, other_labels, capped, smoothed])
def test_rows_that_are_not_the_runs_are_refused_and_a_note_says_so(loss_of: Loss, far: float) -> None:
    """Nearly equal chances give nearly the same gradient: that of a factor on the logits is told apart."""
    monitor, trained = train(loss_of, far=far)
    assert not {"live_fraction", "recomputed_fraction", "logit_displacement"} & set(monitor.history)
    [note] = [note for note in monitor.notes if note.code == "head_never_fired"]
    assert "do not give the gradient that arrives" in note.message
    assert not differences(trained, train(loss_of, far=far, watched=False)[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda targets: targets[:2], "and got [2"),
        (lambda targets: targets.float(), "torch.float32"),
        (lambda targets: None, "NoneType"),
    ],
)
def test_targets_that_cannot_be_used_are_said_and_end_no_part(change: Any, said: str) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 8), "head": nn.Linear(8, 7)})
    optimizer = torch.optim.Adam(model.parameters())
    x, targets = torch.randn(12, 4), torch.arange(12) % 7
    with Monitor(model, optimizer, head="head", console=False, every=1) as monitor:
        for step in range(16):
            hidden = model["body"](x)
            assert monitor.tap_features(hidden, change(targets) if step < 8 else targets) is hidden
            chunked(hidden, model["head"], targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    notes = {note.code: note.message for note in monitor.notes}
    assert said in notes["features_unusable"]
    assert not notes.keys() & {"failed_rows", "head_never_fired"}
    assert len(monitor.history["live_fraction"][1]) == 8, "the later ones are read"


def test_a_loss_that_is_never_trained_shows_no_rows() -> None:
    def other(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        torch.autograd.grad(chunked(hidden, head, targets), hidden, retain_graph=True)
        return (head.weight**2).sum()

    assert "live_fraction" not in train(other)[0].history


def test_of_many_rows_a_rotating_sample_is_recomputed_and_never_all_logits() -> None:
    """``ROWS`` of 4,096 rows of 5,000 classes: the largest tensor of a reading is the sample's."""
    model = Fused(classes=5000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen: list[Any] = []
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        add = monitor._loop.step_reader.add
        monitor._loop.step_reader.add = lambda rows: (seen.append(rows), add(rows))  # type: ignore
        for _ in range(3):
            hidden = monitor.tap_features(model.body(torch.randn(4, 1024, 12)), torch.zeros(4, 1024).long())
            hidden.square().mean().backward()
            optimizer.step()
    assert [tuple(rows.logits.shape) for rows in seen] == [(ROWS, 5000)] * 3
    assert len({rows.features[0].sum().item() for rows in seen}) == 3
    assert all(rows.total == 4096 for rows in seen)


def test_hidden_states_that_do_not_fit_are_left_alone() -> None:
    model = Fused()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        hidden = model.body(torch.randn(24, 12))
        for features, targets in (
            (hidden, torch.zeros(23).long()),
            (hidden[:, :5], torch.zeros(24).long()),
            (hidden.detach(), torch.zeros(24).long()),
            (hidden, torch.zeros(24)),
            (hidden[:0], torch.zeros(0).long()),
        ):
            assert monitor.tap_features(features, targets) is features
        assert not [note for note in monitor.notes if note.code.startswith("failed")]
    assert monitor.tap_features(hidden, torch.zeros(24).long()) is hidden, "closed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_gradient_is_that_of_pytorchs_cross_entropy_to_the_last_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (10 * torch.randn(40, 9)).to(dtype).requires_grad_()
    targets = torch.randint(9, (40,))
    targets[::5] = -100
    F.cross_entropy(logits, targets).backward()
    weights = torch.full((40,), 1 / 32).to(dtype)
    assert torch.equal(cross_entropy_gradient(logits.detach(), targets, weights, dtype), logits.grad)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_logits_scaled_and_capped_as_the_models_configuration_says_are_recomputed(
    scale: float, cap: float | None, temperature: float
) -> None:
    class Configured(Fused):
        config = SimpleNamespace(logit_scale=scale, final_logit_softcapping=cap)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            logits = scale * F.linear(self.body(x), self.head.weight, self.head.bias)
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            seen.append(logits.detach() / temperature)
            return F.cross_entropy(logits / temperature, labels)

    seen: list[Tensor] = []
    model = Configured()
    with torch.no_grad():
        model.head.weight.mul_(20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        monitor.port.recompute_rows(temperature=temperature)
        for _ in range(3):
            loss = model(inputs, labels=targets)
            loss.backward()
            optimizer.step()
            assert monitor.history.last("head_loss") == pytest.approx(loss.item(), rel=1e-4)
            assert monitor.history.last("zero_sum_violation") < 1e-5
            chances = seen[-1].softmax(-1).amax(-1).mean()
            assert monitor.history.last("max_probability") == pytest.approx(chances.item(), rel=1e-4)


@pytest.mark.parametrize("classes", [7, 70_000])
def test_targets_beyond_the_classes_do_not_count_and_few_rows_of_many_classes_are_read(classes: int) -> None:
    model = Fused(classes=classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    targets = torch.arange(200) % 5
    targets[torch.arange(200) % 3 == 0] = classes + 3
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        hidden = monitor.tap_features(model.body(torch.randn(200, 12)), targets)
        counted = torch.where(targets < classes, targets, -100)
        F.cross_entropy(F.linear(hidden, model.head.weight, model.head.bias), counted).backward()
        optimizer.step()
        assert 0.5 < monitor.history.last("live_fraction") < 0.8
        assert monitor.history.last("head_loss") > 0


def test_a_copy_of_a_watched_model_recomputes_nothing() -> None:
    class WithLoss(Fused):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": chunked(self.body(x), self.head, labels)}

    model = WithLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        monitor.port.recompute_rows()
        copied = copy.deepcopy(model)
        for _ in range(2):
            copied(inputs, labels=targets)["loss"].backward()
            model(inputs, labels=targets)["loss"].backward()
            optimizer.step()
        assert monitor.history["recomputed_fraction"][1].tolist() == [1.0, 1.0]
        assert monitor._loop.probe.recomputed == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("inside", [False, True], ids=["called by a training step", "called by its wrapper"])
def test_the_labels_are_found_wherever_the_model_with_the_head_is_called(inside: bool) -> None:
    class WithLoss(Fused):
        def forward(self, x: Tensor, labels: Tensor | None = None, y: Tensor | None = None) -> Tensor:
            wanted = labels if y is None else y
            assert wanted is not None
            return chunked(self.body(x), self.head, wanted)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = WithLoss()

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.model(x, y=labels)  # type: ignore[no-any-return]

    model = Wrapper()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        monitor.port.recompute_rows()
        for _ in range(3):
            (model if inside else model.model)(inputs, labels=targets).backward()
            optimizer.step()
        assert monitor.history["recomputed_fraction"][1].tolist() == [1.0] * 3
        watch = monitor._loop.hooks._others[-1]
        assert watch._hidden is None, "no graph is kept"
        assert monitor.summary()["run"]["head"].endswith(", rows recomputed")
