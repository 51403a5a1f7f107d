"""A step never waits for the device on the monitor's account, nor holds a second tensor of the logits' size.

No accelerator is needed to see this: told that no tensor lies on the host, the monitor goes the way that it
goes on one, and every operation it calls is looked at.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nfi_monitor import Monitor
from nfi_monitor.capture import placement
from nfi_monitor.capture.outbox import Outbox

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")
CLASSES, ROWS = 4_096, 512


class Operations(TorchDispatchMode):
    """Counts what would wait, and notes the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = str(operation)
        if any(word in name for word in WAITING):
            self.waited[name] += 1
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            # Views make nothing.
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.largest = max(self.largest, tensor.numel())
        return result


@contextmanager
def looked_at(monitor: Monitor, operations: Operations):
    """Only what the monitor's own hooks do."""
    originals = {name: getattr(monitor, name) for name in ("_before_step", "_after_step")}
    probe_call, deliver = type(monitor._probe).__call__, monitor._probe._deliver

    def within(function):
        def run(*arguments: Any) -> Any:
            with operations:
                return function(*arguments)

        return run

    steps = monitor._handles[0]
    steps._before, steps._after = (within(originals[name]) for name in originals)
    monitor._probe._deliver = within(deliver)
    type(monitor._probe).__call__ = lambda self, *arguments: within(probe_call.__get__(self))(*arguments)
    try:
        yield
    finally:
        type(monitor._probe).__call__ = probe_call
        monitor._probe._deliver = deliver


def train(monitor: Monitor, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    torch.manual_seed(1)
    inputs, targets = torch.randn(ROWS, 8), torch.randint(CLASSES, (ROWS,))
    for _ in range(steps):
        loss = F.cross_entropy(model(inputs), targets)
        monitor.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nothing lies on the host; packed numbers arrive when the test says so."""
    monkeypatch.setattr(placement, "on_host", lambda tensor: False)
    taken: list[int] = []
    monkeypatch.setattr(Outbox, "take", lambda self, **_: taken.append(1) or [])
    return taken


@pytest.mark.parametrize("arguments", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("every", ["auto", 1])
def test_neither_a_healthy_step_nor_a_reading_waits_for_the_device(elsewhere, arguments, every) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    # Capturable: the step counts on the device, as with fused steps.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **arguments)
    operations = Operations()
    with Monitor(model, optimizer, console=False, every=every) as monitor:
        train(monitor, model, optimizer, 2)
        with looked_at(monitor, operations):
            train(monitor, model, optimizer, 40)
        assert not [note for note in monitor.notes if note.code.startswith("failed")]
    assert elsewhere
    assert not operations.waited


def test_a_call_that_waits_would_be_seen(elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    from nfi_monitor.measure import weight_norm

    torch.manual_seed(0)
    model = nn.Linear(8, CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    operations = Operations()
    real = weight_norm.norm
    monkeypatch.setattr(weight_norm, "norm", lambda *a: torch.tensor(real(*a).item()))
    with (
        Monitor(model, optimizer, console=False, every=1) as monitor,
        looked_at(monitor, operations),
    ):
        train(monitor, model, optimizer, 2)
    assert operations.waited


def test_a_reading_never_makes_a_second_tensor_of_the_logits_size() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    operations = Operations()
    with (
        Monitor(model, optimizer, console=False, every=1) as monitor,
        looked_at(monitor, operations),
    ):
        train(monitor, model, optimizer, 4)
        assert len(monitor.history["zero_sum_violation"][0]) == 4
    # 2^18 logits are read of 2^21: one row in eight.
    assert ROWS * CLASSES // 8 <= operations.largest <= ROWS * CLASSES // 4
