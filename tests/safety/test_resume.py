"""Stop anywhere, load the state, go on: readings and alerts are those of the uninterrupted run, every bit."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch

from nfi_monitor import Monitor
from nfi_monitor.types import Alert, Change, Note, Phase, Reading
from tests.safety.table import Shown
from tests.spiking import scene

AHEAD = 40
"""Steps that a resumed run is followed for: two readings of the healthy cadence, 2 τ."""


class Heard:
    """A sink that keeps everything it is told, with every bit of every number."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self._now = 0  # an alert's own steps may be of before: a slingshot is told when it is certain

    def start(self, info: Mapping[str, Any]) -> None: ...

    def note(self, note: Note) -> None:
        self.told.append((note.step, "note", note.code))

    def reading(self, reading: Reading, phase: Phase) -> None:
        values = {name: value.hex() for name, value in sorted(reading.values.items())}
        self._now = reading.step
        self.told.append((reading.step, str(phase), values))

    def alert(self, alert: Alert, change: Change) -> None:
        self.told.append((self._now, str(change), repr(alert)))

    def replay(self, verdict: Any) -> None: ...

    def close(self, info: Mapping[str, Any], summary: Any) -> None: ...


def attach(model: Any, optimizer: Any, heard: Heard, every: int | str) -> Monitor:
    inputs, targets = scene().data()
    # overhead_budget=None: the cadence is the run's own, and not that of a busy machine's clock.
    return Monitor(
        model,
        optimizer,
        console=False,
        every=every,
        overhead_budget=None,
        sinks=[heard],
        probe=(inputs[:5], targets[:5]),
    )


def save(*parts: Any) -> bytes:
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    return file.getvalue()


class Uninterrupted:
    def __init__(self, every: int | str, cuts: Iterable[int]) -> None:
        model, optimizer, step = scene().division()
        self.steps = scene().steps
        self.heard = Heard()
        self.every = every
        self.saved: dict[int, bytes] = {}
        wanted = set(cuts)
        monitor = attach(model, optimizer, self.heard, every)
        for n in range(1, self.steps + 1):
            step(monitor, n)
            if n in wanted:
                self.saved[n] = save(model, optimizer, monitor)
        self.alerts = monitor.alerts
        kinds = {str(alert.kind) for alert in self.alerts}
        assert {"at_risk", "imminent", "slingshot"} <= kinds, "this run is meant to slingshot"

    def between(self, cut: int, end: int) -> list[tuple[Any, ...]]:
        return [item for item in self.heard.told if cut < item[0] <= end]

    def resumed(self, cut: int, end: int, through: Callable[[Any], Any] = lambda state: state) -> Heard:
        """From the checkpoint after step ``cut`` to step ``end``, in new objects."""
        model, optimizer, step = scene().division()
        for parameter in model.parameters():
            parameter.data.fill_(1.0)  # everything must come from the checkpoint
        heard = Heard()
        monitor = attach(model, optimizer, heard, self.every)
        states = torch.load(io.BytesIO(self.saved[cut]), weights_only=True)
        for part, state in zip((model, optimizer, monitor), states, strict=True):
            part.load_state_dict(through(state) if part is monitor else state)
        for n in range(cut + 1, end + 1):
            step(monitor, n)
        # Not closed: that would tell of alerts that still fire.
        if end == self.steps:
            assert repr(monitor.alerts) == repr(self.alerts)
        return heard

    def wrong(self, cut: int, end: int, through: Callable[[Any], Any] = lambda state: state) -> list[str]:
        told, expected = self.resumed(cut, end, through).told, self.between(cut, end)
        if told == expected:
            return []
        pairs = zip(told, expected, strict=False)
        first = next((a for a, b in pairs if a != b), "one of the two ends sooner")
        return [f"every={self.every}, stopped after step {cut}: {first}"]


def at_risk() -> int:
    """A step at which every step is read, because a slingshot is imminent."""
    return scene().onset - 4


@pytest.fixture(scope="module")
def run() -> Uninterrupted:
    return Uninterrupted("auto", [*range(3, scene().steps, 97), at_risk()])


def test_a_run_stopped_anywhere_goes_on_bit_for_bit(run: Uninterrupted) -> None:
    assert len(run.saved) >= 7
    assert [problem for cut in run.saved for problem in run.wrong(cut, min(cut + AHEAD, run.steps))] == []


def test_a_state_that_went_through_json_does_the_same_to_the_end(run: Uninterrupted) -> None:
    assert run.wrong(at_risk(), run.steps, lambda state: json.loads(json.dumps(state))) == []


def test_the_comparison_sees_a_state_without_what_the_next_step_is_compared_with(run: Uninterrupted) -> None:
    def forget(state: dict[str, Any]) -> dict[str, Any]:
        assert state["last_step"] is not None, "the step is read"
        return state | {"last_step": None}

    assert "secant_curvature" in run.resumed(at_risk(), at_risk() + 1).told[0][2]
    assert "secant_curvature" not in run.resumed(at_risk(), at_risk() + 1, forget).told[0][2]
    assert run.wrong(at_risk(), at_risk() + 1, forget) != []


@pytest.mark.slow
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(shown: Shown) -> None:
    ends, wrong = Counter[str](), []
    for every in ("auto", 1, 7):
        run = Uninterrupted(every, range(1, scene().steps))
        for cut in run.saved:
            end = run.steps if cut % 64 == 0 else min(cut + AHEAD, run.steps)
            wrong += run.wrong(cut, end)
            ends["on" if end == cut + AHEAD else "far" if end > cut + AHEAD else "near"] += 1
    assert wrong == []
    shown("resume", ends["on"], f"stops followed for {AHEAD} steps")
    shown("resume", ends["far"], "stops followed for more, to the run's end")
    shown("resume", ends["near"], f"stops in its last {AHEAD} steps, followed to the end")
