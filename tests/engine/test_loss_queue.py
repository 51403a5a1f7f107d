"""Losses that begin nothing wait to be judged together: nothing that is read, seen or said changes by it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nfi_monitor import Monitor
from nfi_monitor.capture import devices
from nfi_monitor.capture.host_transfer import HostTransfer
from nfi_monitor.engine import loss_queue
from nfi_monitor.engine.loss_queue import LossQueue
from nfi_monitor.report.run_directory.files import READINGS
from nfi_monitor.report.run_directory.reader import read_run
from nfi_monitor.types import Alert, AlertKind, Thresholds

STEPS = 400
LEAPT = 200
"""Steps of the runs below whose loss leaps by step 129: twice as many as wait together go by after it."""


class Listener:
    """A sink that takes readings: for it every loss is judged at its own step."""

    def start(self, info: Any) -> None: ...
    def reading(self, reading: Any, phase: Any) -> None: ...
    def alert(self, alert: Any, change: Any) -> None: ...
    def note(self, note: Any) -> None: ...
    def replay(self, verdict: Any) -> None: ...
    def close(self, info: Any, summary: Any) -> None: ...


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses wait however long this machine takes for a step."""
    monkeypatch.setattr(loss_queue, "SECONDS", math.inf)


def run(
    kicks: tuple[int, ...] = (),
    *,
    listen: bool = False,
    cut: int | None = None,
    dtype: torch.dtype = torch.float32,
    told: Callable[[int], float] | None = None,
    every: int | str = "auto",
    looked_at: int | None = None,
    steps: int = STEPS,
    run_dir: Path | None = None,
) -> tuple[Monitor, list[tuple[int, Alert]]]:
    """A small regression to classes whose told loss is multiplied by 1000 for a few steps from each kick, or
    is ``told(step)``."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999))
    inputs, targets = torch.randn(16, 8), torch.randint(4, (16,))
    heard: list[tuple[int, Alert]] = []

    def attach() -> Monitor:
        # overhead_budget=None: the same steps are read whatever the clock says.
        return Monitor(
            model,
            optimizer,
            console=False,
            overhead_budget=None,
            every=every,
            run_dir=run_dir,
            on_alert=lambda alert: heard.append((step, alert)),
            sinks=[Listener()] if listen else [],
        )

    monitor = attach()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        kicked = any(kick <= step < kick + 6 for kick in kicks)
        if told is not None:
            monitor.observe_loss(told(step))
        else:
            monitor.observe_loss((loss.detach() * (1000.0 if kicked else 1e-3)).to(dtype))
        optimizer.step()
        if step == looked_at:
            assert monitor.history["loss"][0][-1] == step
        if step == cut:
            state = json.loads(json.dumps(monitor.state_dict()))
            before = monitor
            before.close()
            monitor = attach()
            monitor.load_state_dict(state)
    return monitor, heard


def read(monitor: Monitor) -> dict[str, Any]:
    return {name: [column.tolist() for column in monitor.history[name]] for name in monitor.history}


@pytest.mark.parametrize("kicks", [(), (200,), (97, 333), (STEPS - 3,)])
def test_readings_alerts_and_phases_are_those_of_losses_judged_one_by_one(kicks):
    (waiting, heard), (prompt, heard_promptly) = run(kicks), run(kicks, listen=True)
    assert repr(read(waiting)) == repr(read(prompt))
    assert waiting.phases == prompt.phases
    assert heard == heard_promptly
    assert [alert.kind for _, alert in heard].count(AlertKind.SLINGSHOT) >= len(kicks)
    waiting.close()
    prompt.close()


@pytest.mark.parametrize("kicks", [(), (97, 333)])
def test_a_run_directory_holds_the_same_lines_as_if_each_loss_had_come_at_its_step(kicks, tmp_path):
    lines = []
    for name, listen in (("together", False), ("one by one", True)):
        monitor, _ = run(kicks, listen=listen, run_dir=tmp_path / name)
        assert kicks or bool(monitor._loop.losses.deferred) is not listen
        monitor.close()
        lines.append((tmp_path / name / READINGS).read_bytes())
    assert lines[0] == lines[1]


@pytest.mark.parametrize("cut", [151, 163])
def test_a_resumed_run_directory_lacks_no_loss_that_waited(cut, tmp_path):
    monitor, _ = run(run_dir=tmp_path, cut=cut)
    monitor.close()
    record = read_run(tmp_path)
    assert record.history["loss"][0].tolist() == list(range(1, STEPS + 1))


def test_a_loss_waits_for_a_tenth_of_a_second_at_most(monkeypatch):
    now = 0.0
    monkeypatch.setattr(loss_queue, "SECONDS", 0.1)
    monkeypatch.setattr(loss_queue.time, "monotonic", lambda: now)
    queue = LossQueue(lambda step, loss: False, Thresholds())
    queue.look_ahead(100.0)

    def waits(seconds: float) -> bool:
        nonlocal now
        now += seconds
        queue.forget()
        queue.observe(1.0)
        return queue.defer(1)

    waits(0.0)  # the first step of all
    assert [waits(0.03) for _ in range(5)] == [True] * 4 + [False]
    queue.take_deferred()
    assert [waits(0.03) for _ in range(5)] == [True] * 4 + [False]
    queue.take_deferred()
    assert not any(waits(0.2) for _ in range(3))


def young(step: int) -> float:
    """High from the beginning, and a jump when there is just enough of it to be held against."""
    return 1e6 if step >= 54 else 2.3


def fallen(step: int) -> float:
    """Falls to a tenth within three steps, while it waits, and comes back: 1 nat above an average of 3.6."""
    return 5.7 if step >= 118 else {100: 2.5, 101: 1.2}.get(step, 5.0 if step < 100 else 0.5)


def just_low(step: int) -> float:
    """Rises to ten times its average only if what waits is counted."""
    return 0.0115 if step < 107 else 0.11 if step >= 129 else 0.007


def in_cents(step: int) -> float:
    """A loss that is no cross-entropy in nats, whose unit is found in its first values."""
    return 1e5 * just_low(step)


def at_the_edge(step: int) -> float:
    """A jump at the last loss that is only remembered, right after a reading of every 49th step."""
    return 1e6 if step >= 50 else 2.3


def a_hair_below_zero(step: int) -> float:
    """As rounding leaves it, now and then; and a jump."""
    return 2.3 if step >= 89 or step < 12 else -1e-9 if step % 7 == 0 else 1e-3


@pytest.mark.parametrize("every", ["auto", 100, 49])
@pytest.mark.parametrize("told", [young, fallen, just_low, in_cents, at_the_edge, a_hair_below_zero])
def test_what_waits_does_not_make_a_loss_look_usual(told, every):
    (waiting, heard), (prompt, heard_promptly) = (
        run(told=told, every=every, listen=listen, steps=LEAPT) for listen in (False, True)
    )
    assert heard == heard_promptly
    assert any(alert.kind is AlertKind.SLINGSHOT for _, alert in heard)
    assert repr(read(waiting)) == repr(read(prompt))
    waiting.close()
    prompt.close()


def test_looking_at_the_history_changes_nothing_that_is_read():
    untouched, looked_at = (run(told=just_low, looked_at=step, steps=LEAPT)[0] for step in (None, 127))
    assert repr(read(untouched)) == repr(read(looked_at))
    untouched.close()
    looked_at.close()


@pytest.mark.parametrize("loss", [None, 0.5])
def test_a_reading_on_its_way_from_an_accelerator_is_judged_as_soon_as_it_is_there(monkeypatch, loss):
    put, take = HostTransfer.put, HostTransfer.take
    arrives = {}

    def later(self: HostTransfer, label: Any, packed: torch.Tensor) -> None:
        arrives[len(arrives)] = step + 1
        put(self, label, packed)

    def arrived(self: HostTransfer, **options: Any) -> list[Any]:
        return take(self, **options) if options.get("everything") or step >= max(arrives.values()) else []

    monkeypatch.setattr(HostTransfer, "put", later)
    monkeypatch.setattr(HostTransfer, "take", arrived)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer, console=False, every=32)
    inputs, targets = torch.randn(16, 8), torch.randint(4, (16,))
    judged = {}
    for step in range(1, 70):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        if loss is not None:
            monitor.observe_loss(loss)
        optimizer.step()
        for read_at in monitor._loop.judge.recorded["gradient_norm"][0].tolist():
            judged.setdefault(read_at, step)
    assert judged == {1: 2, 32: 33, 64: 65}
    if loss is not None:
        steps = monitor.history["loss"][0]
        assert (steps[1:] > steps[:-1]).all()
    monitor.close()


def test_a_loss_on_the_host_is_not_judged_before_the_reading_that_is_on_its_way(monkeypatch):
    put, take = HostTransfer.put, HostTransfer.take
    due = 0

    def later(self: HostTransfer, label: Any, packed: torch.Tensor) -> None:
        nonlocal due
        if not isinstance(label, list):
            due = step + 3
        put(self, label, packed)

    monkeypatch.setattr(HostTransfer, "put", later)
    monkeypatch.setattr(
        HostTransfer,
        "take",
        lambda self, **how: take(self, **how) if step >= due or how.get("everything") else [],
    )
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = torch.randn(16, 8), torch.randint(4, (16,))
    judged = []
    with Monitor(model, optimizer, console=False, every=32) as monitor:
        judge = monitor._loop.judge.judge
        monkeypatch.setattr(
            monitor._loop.judge, "judge", lambda r, *, full: (judged.append(r.step), judge(r, full=full))
        )
        for step in range(1, 70):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            monitor.observe_loss(1.0 / step)
            optimizer.step()
        steps, losses = monitor.history["loss"]
    assert judged == sorted(judged)
    assert losses.tolist() == pytest.approx([1.0 / step for step in steps])


def test_losses_really_wait_and_the_history_does_not_show_it():
    monitor, _ = run()
    assert monitor._loop.losses.deferred
    steps, losses = monitor.history["loss"]
    assert steps.tolist() == list(range(1, STEPS + 1))
    assert not monitor._loop.losses.deferred
    assert all(0 < loss < 1 for loss in losses)
    monitor.close()


def test_a_loss_that_may_begin_a_slingshot_is_judged_at_its_own_step():
    monitor, heard = run(kicks=(203,))
    step, alert = next(item for item in heard if item[1].kind is AlertKind.SLINGSHOT)
    assert alert.first_step == 203
    assert step == 204  # a slingshot needs a second high loss
    monitor.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_what_is_no_loss_waits_for_nobody(bad):
    monitor, _ = run()
    monitor.observe_loss(bad)
    monitor.optimizer.step()
    assert not monitor._loop.losses.deferred
    assert (monitor._loop.detector.alerts != []) == (not math.isfinite(bad))
    monitor.close()


@pytest.fixture(scope="module")
def whole():
    monitor, _ = run((300,))
    yield monitor
    monitor.close()


@pytest.mark.parametrize("cut", [151, 163, 331])
def test_a_run_that_is_resumed_while_losses_wait_ends_as_the_uninterrupted_one(whole, cut):
    resumed, _ = run((300,), cut=cut)
    assert whole.phases == resumed.phases
    assert [repr(alert) for alert in whole.alerts] == [repr(alert) for alert in resumed.alerts]
    for name, (steps, values) in read(resumed).items():
        reference = dict(zip(*read(whole)[name], strict=True))
        assert repr(values) == repr([reference[step] for step in steps]), name
    state, reference_state = resumed.state_dict(), whole.state_dict()
    assert repr(state["detector"]) == repr(reference_state["detector"])
    assert state["plain_losses"] == reference_state["plain_losses"]
    resumed.close()


def test_what_waited_before_a_resume_makes_no_loss_look_usual_after_it():
    heard, heard_resumed = (run(told=fallen, every=100, cut=cut, steps=LEAPT)[1] for cut in (None, 116))
    assert heard and [step for step, _ in heard] == [step for step, _ in heard_resumed]


def test_saving_a_state_changes_nothing():
    monitor, _ = run()
    waiting = list(monitor._loop.losses.deferred)
    assert waiting
    assert monitor.state_dict() == monitor.state_dict()
    assert monitor._loop.losses.deferred == waiting
    monitor.close()


def test_losses_of_half_precision_wait_with_the_value_they_have():
    (waiting, _), (prompt, _) = run(dtype=torch.bfloat16), run(dtype=torch.bfloat16, listen=True)
    assert repr(read(waiting)) == repr(read(prompt))
    waiting.close()
    prompt.close()


def test_closing_judges_what_waits():
    monitor, _ = run()
    assert monitor._loop.losses.deferred
    monitor.close()
    assert len(monitor.history["loss"][0]) == STEPS


def test_what_is_done_to_a_loss_after_its_step_is_not_taken_for_the_loss(monkeypatch):
    """Averaged over ranks in place for a log, or the buffer that the next step's loss is written to."""
    monkeypatch.setattr(devices, "on_host", lambda tensor: False)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs, targets = torch.randn(16, 8), torch.randint(4, (16,))
    buffer, told = torch.zeros(()), []
    with Monitor(model, optimizer, console=False, every=10) as monitor:
        for _ in range(25):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            monitor.observe_loss(buffer.copy_(loss.detach()))
            told.append(buffer.item())
            optimizer.step()
            buffer.mul_(8)
    assert monitor.history["loss"][1].tolist() == told


def test_losses_of_one_step_on_two_devices_make_one_mean():
    losses, outbox = LossQueue(lambda step, loss: False, Thresholds()), HostTransfer()
    losses.observed += [torch.tensor(1.0), torch.tensor(2.0, device="meta")]
    assert losses.mean().device.type == "meta"
    for step, loss in enumerate(losses.observed):
        losses.keep_late(step, loss)
    losses.flush(outbox)
    assert outbox._pending[0][0] == [0, 1] and outbox._pending[0][1].shape == (2,)


def test_losses_that_cannot_be_sent_fail_once():
    losses, outbox = LossQueue(lambda step, loss: False, Thresholds()), HostTransfer()
    losses.keep_late(1, torch.ones(2))
    with pytest.raises(RuntimeError):
        losses.flush(outbox)
    losses.keep_late(2, torch.tensor(3.0))
    losses.flush(outbox)
    [(steps, numbers)] = outbox.take(everything=True)
    assert (steps, numbers.tolist()) == ([2], [3.0])
