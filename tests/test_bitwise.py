"""The core promise: the run with the monitor is the run without it, to the last bit."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nfi_monitor import Monitor
from tests.runs import batch, differences, snapshot

pytestmark = pytest.mark.usefixtures("both_ways")

STEPS = 100
"""A bit that differs once differs to the end; at ``every="auto"`` some of them are read."""


class Net(nn.Module):
    """Dropout draws random numbers, BatchNorm keeps running statistics: both would betray an extra pass."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1))
        self.middle = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(32, 7)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.checkpointed is None:
            return self.head(self.middle(x))
        # The head is inside the checkpointed part: its forward runs twice.
        return checkpoint(lambda h: self.head(self.middle(h)), x, use_reentrant=self.checkpointed)


def plain(model: nn.Module, optimizer: Any, seen: Callable[[Tensor], None], step: int) -> None:
    inputs, targets = batch(seed=step % 5)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(inputs), targets)
    seen(loss)
    loss.backward()
    optimizer.step()


def autocast(model: nn.Module, optimizer: Any, seen: Callable[[Tensor], None], step: int) -> None:
    inputs, targets = batch(seed=step % 5)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(inputs), targets)
    seen(loss)
    loss.backward()
    optimizer.step()


def accumulation(model: nn.Module, optimizer: Any, seen: Callable[[Tensor], None], step: int) -> None:
    optimizer.zero_grad()
    for part in range(3):
        inputs, targets = batch(rows=8, seed=(3 * step + part) % 7)
        loss = F.cross_entropy(model(inputs), targets) / 3
        seen(loss)
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def train(
    step_of: Callable[..., None],
    optimizer_of: Callable[[nn.Module], Any],
    model: nn.Module,
    monitored: dict[str, Any] | None,
) -> dict[str, Any]:
    optimizer = optimizer_of(model)
    monitor = Monitor(model, optimizer, console=False, **monitored) if monitored is not None else None
    for step in range(STEPS):
        step_of(model, optimizer, monitor.observe_loss if monitor else lambda loss: None, step)
    if monitor is not None:
        assert len(monitor.history["zero_sum_violation"][0]) > 0, (
            "the monitor saw nothing: the test shows nothing"
        )
        assert [note for note in monitor.notes if note.code.startswith("failed")] == []
        monitor.close()
    return snapshot(model, optimizer)


def adamw(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


CASES = {
    "plain": (plain, adamw(), None),
    "autocast_bf16": (autocast, adamw(), None),
    "accumulation_and_clipping": (accumulation, adamw(), None),
    "checkpoint_reentrant": (plain, adamw(), True),
    "checkpoint_non_reentrant": (plain, adamw(), False),
    "foreach": (plain, adamw(foreach=True), None),
    "fused": (plain, adamw(fused=True), None),
    "amsgrad": (plain, adamw(amsgrad=True), None),
    "sgd_momentum": (plain, lambda model: torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9), None),
    "rmsprop_centred": (plain, lambda model: torch.optim.RMSprop(model.parameters(), centered=True), None),
    "adagrad": (plain, lambda model: torch.optim.Adagrad(model.parameters(), lr_decay=0.1), None),
    "adadelta": (plain, lambda model: torch.optim.Adadelta(model.parameters()), None),
    "adamax": (plain, lambda model: torch.optim.Adamax(model.parameters()), None),
    "asgd": (plain, lambda model: torch.optim.ASGD(model.parameters()), None),
}


def trained(case: str, monitored: dict[str, Any] | None) -> dict[str, Any]:
    step_of, optimizer_of, checkpointed = CASES[case]
    torch.manual_seed(0)
    return train(step_of, optimizer_of, Net(checkpointed), monitored)


@functools.cache
def bare(case: str) -> dict[str, Any]:
    return trained(case, None)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the probe's own forward
@pytest.mark.parametrize("every", ["auto", 1])
@pytest.mark.parametrize("case", CASES)
def test_training_is_bitwise_equal_with_and_without_the_monitor(case: str, every: Any) -> None:
    watched = trained(case, {"every": every, "probe": batch(rows=6, seed=99)})
    assert differences(bare(case), watched) == []


def test_training_is_bitwise_equal_with_all_reports_on(tmp_path: Path) -> None:
    assert differences(bare("plain"), trained("plain", {"run_dir": tmp_path / "run"})) == []
    assert (tmp_path / "run" / "readings.jsonl").stat().st_size > 0


def test_the_comparison_sees_a_single_bit() -> None:
    torch.manual_seed(0)
    model = Net()
    before = snapshot(model, adamw()(model))
    with torch.no_grad():
        weight = model.head.weight.view(torch.int32)
        weight[0, 0] ^= 1
    assert differences(before, snapshot(model, adamw()(model))) == ["/model/head.weight"]


def test_a_gradient_scaler_that_skips_steps_trains_alike() -> None:
    """CPU scaler, float16: an overflow at step 3 makes it skip that step."""

    def step_of(model: nn.Module, optimizer: Any, seen: Callable[[Tensor], None], step: int) -> None:
        inputs, targets = batch(seed=step % 5)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        seen(loss)
        scaler.scale(loss * (1e38 if step == 3 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()

    for options in ({}, {"fused": True}):
        results = []
        for monitored in (None, {"every": 1}):
            torch.manual_seed(0)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            results.append(train(step_of, adamw(**options), Net(), monitored))
        assert differences(*results) == []


@pytest.mark.parametrize("place", ["head", "embedding"])
def test_parametrized_layers_are_not_run_by_looking_at_them(place: str) -> None:
    """Reading the weight of a spectrally normalised layer moves its buffers."""
    from torch.nn.utils import parametrizations

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.head = nn.Linear(16, 7)
            parametrizations.spectral_norm(self.head if place == "head" else self.embed)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed((x.abs() * 7).long() % 20).mean(1))

    results = []
    for monitored in (None, {"every": 1}):
        torch.manual_seed(0)
        results.append(train(plain, adamw(), Text(), monitored))
    assert differences(*results) == []


def test_a_copied_or_saved_model_carries_no_live_probe() -> None:
    model = Net()
    optimizer = adamw()(model)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        copied = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        for other in (copied, loaded):
            other.train()
            inputs, targets = batch()
            F.cross_entropy(other(inputs), targets).backward()
        plain(model, optimizer, monitor.observe_loss, 0)
        assert monitor.history["live_fraction"][0].tolist() == [1]
        sums = monitor.history["zero_sum_violation"][0]
        assert len(sums) == 1


def test_detaching_leaves_no_hook_behind() -> None:
    model = Net()
    optimizer = adamw()(model)
    monitor = Monitor(model, optimizer, console=False)
    monitor.close()
    assert not model.head._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
