"""A damaged state is refused with a ValueError, and the monitor is as it was before; or it does no harm."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from nfi_monitor import Autopilot, Monitor
from nfi_monitor.detect.detector import Detector
from nfi_monitor.report.sink import SinkBase
from tests.regression.golden import recorded_readings
from tests.safety.damage import damaged
from tests.safety.table import Shown

EXAMPLES = 2000
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


class Told(SinkBase):
    """Count the times that the run is said to have gone back."""

    def __init__(self) -> None:
        self.back = 0

    def went_back(self) -> None:
        self.back += 1


def watched() -> tuple[nn.Module, torch.optim.Optimizer, Monitor, Told]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    told = Told()
    monitor = Monitor(
        model, optimizer, console=False, every=1, probe=(X[:3], Y[:3]), sinks=[told], overhead_budget=None
    )
    return model, optimizer, monitor, told


def train(model: nn.Module, optimizer: torch.optim.Optimizer, monitor: Monitor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        monitor.observe_loss(loss)
        loss.backward()
        optimizer.step()


def states() -> Iterator[dict[str, Any]]:
    """The states of a run of our own, with the detectors of recorded runs at several places."""
    model, optimizer, monitor, _ = watched()
    train(model, optimizer, monitor, 12)
    state = monitor.state_dict()
    monitor.close()
    yield state
    for name in ("float16-loss", "parity-hinge-95"):
        context, readings = recorded_readings(name)
        detector = Detector(context=context)
        for number, reading in enumerate(readings):
            detector.update(reading)
            if number in (len(readings) // 2, len(readings) - 1):
                yield {**state, "detector": detector.state_dict()}


@pytest.fixture(scope="module")
def saved() -> list[dict[str, Any]]:
    return [json.loads(json.dumps(state)) for state in states()]  # with NaN, as Python's json has it


def look(monitor: Monitor, told: Told) -> str:
    """Everything that a state may change."""
    loop = monitor._loop
    parts = [
        monitor.state_dict(), monitor.step, [*monitor.history["loss"][0].tolist()], monitor.notes, told.back,
        loop.next_read, loop.wanted_step, loop.schedule.healthy_interval, len(loop.replays),
        [id(monitor._loop.detector.alerts)],
    ]  # fmt: skip
    return repr(parts)


def check(state: Any) -> str:
    """Load a damaged state into a running monitor; return "refused" or "accepted"."""
    model, optimizer, monitor, told = watched()
    with monitor:
        train(model, optimizer, monitor, 3)
        before = look(monitor, told)
        try:
            monitor.load_state_dict(state)
        except ValueError as error:
            assert "monitor.state_dict()" in str(error)
            assert look(monitor, told) == before
            train(model, optimizer, monitor, 2)
            assert monitor.step == 5
        train(model, optimizer, monitor, 3)
        failed = [note.message for note in monitor.notes if note.code.startswith("failed")]
        assert not failed, failed
        json.dumps(monitor.summary(), allow_nan=False)
    return "refused" if monitor.step == 8 else "accepted"


def test_the_states_themselves_are_accepted(saved: list[dict[str, Any]]) -> None:
    for state in saved:
        assert check(state) == "accepted"


@settings(max_examples=60, deadline=None, suppress_health_check=QUIET, database=None)
@given(data=st.data())
def test_a_damaged_state_changes_nothing_or_does_no_harm(
    saved: list[dict[str, Any]], data: st.DataObject
) -> None:
    check(data.draw(damaged(data.draw(st.sampled_from(saved)), files=False)))


@pytest.mark.slow
def test_no_damaged_state_changes_half(saved: list[dict[str, Any]], shown: Shown) -> None:
    tried = 0

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=QUIET, database=None)
    @given(data=st.data())
    def each(data: st.DataObject) -> None:
        nonlocal tried
        tried += 1
        check(data.draw(damaged(data.draw(st.sampled_from(saved)), files=False)))

    each()
    assert tried >= EXAMPLES  # the rest were drawn twice, or were not damaged
    shown("records", EXAMPLES, "damaged states")


def test_every_place_of_a_state_may_be_missing_or_wrong(saved: list[dict[str, Any]]) -> None:
    """Delete each key, and put a value of another type in each place: none raises anything but ValueError."""
    state = saved[-1]
    refused = 0
    for path in places(state):
        for wrong in (None, "x", [[]], -1.5):
            changed = copy.deepcopy(state)
            holder = changed
            for name in path[:-1]:
                holder = holder[name]
            if wrong is None:
                del holder[path[-1]]
            else:
                holder[path[-1]] = wrong
            detector = Detector()
            before = repr(detector.state_dict())
            try:
                detector.load_state_dict(changed["detector"])
            except ValueError:
                refused += 1
                assert repr(detector.state_dict()) == before
    assert refused > 100


def places(state: dict[str, Any]) -> Iterator[list[Any]]:
    def inside(value: Any, path: list[Any]) -> Iterator[list[Any]]:
        items = value.items() if isinstance(value, dict) else enumerate(value[:2])
        for name, item in items:
            yield [*path, name]
            if isinstance(item, (dict, list)):
                yield from inside(item, [*path, name])

    return inside(state["detector"], ["detector"])


@settings(max_examples=200, deadline=None, suppress_health_check=QUIET, database=None)
@given(data=st.data())
def test_a_damaged_state_of_an_autopilot_changes_nothing(data: st.DataObject) -> None:
    pilot = Autopilot()
    before = pilot.state_dict()
    good = {
        **before, "exchanged": "loss", "taken": {"imminent-1": {"loss": 3, "cool": 5}}, "held_since": 4,
        "actions": [{"step": 3, "what": "loss", "alert": "imminent-1", "message": "m"}],
    }  # fmt: skip
    state = data.draw(damaged(good, files=False))
    try:
        pilot.load_state_dict(state)
    except ValueError as error:
        assert "autopilot.state_dict()" in str(error) and pilot.state_dict() == before
