"""Ctrl-C anywhere inside the monitor: the training goes on as without it, or the monitor can be closed.

The interrupt is raised by a trace function, at one line of the package at a time: at each line that runs
while a monitor attaches, in a step of a training, or while it closes.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nfi_monitor
from nfi_monitor import Monitor, open_monitors
from nfi_monitor.measure.step_plan import StepPlan
from nfi_monitor.native import library
from nfi_monitor.report.run_directory.lock import LOCK
from nfi_monitor.report.run_directory.reader import read_run
from tests.runs import batch, differences, mlp, snapshot
from tests.safety.table import Shown
from tests.safety.test_detach import hooks

PACKAGE = str(Path(nfi_monitor.__file__).parent) + os.sep
STEPS = 4


Place = tuple[str, int]
"""File and line."""


class Interrupt:
    """Raise KeyboardInterrupt where a line of the package is first reached inside a ``with`` block."""

    def __init__(self, at: Place | None) -> None:
        self.at, self.where = at, ""
        self.places: dict[Place, None] = {}
        """All lines of the package that ran, in their order."""

    def _called(self, frame: types.FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: types.FrameType, event: str, _: Any) -> Any:
        if event == "line":
            place = frame.f_code.co_filename, frame.f_lineno
            self.places[place] = None
            if place == self.at:
                self.where = f"{place[0].removeprefix(PACKAGE)}:{place[1]}"
                raise KeyboardInterrupt
        return self._line

    def __enter__(self) -> Interrupt:
        sys.settrace(self._called)
        return self

    def __exit__(self, *raised: object) -> None:
        sys.settrace(None)


class Training:
    """A small training with a probe batch, a scheduler and all files."""

    def __init__(self, run_dir: Path) -> None:
        self.model = mlp()
        self.model.insert(1, nn.BatchNorm1d(32))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.run_dir = run_dir
        self.told: list[Any] = []
        self.others = writers()

    def attach(self) -> Monitor:
        inputs, targets = batch(6, seed=1)
        return Monitor(
            self.model, self.optimizer, run_dir=self.run_dir, console=False, every=1,
            probe=(inputs, targets), on_alert=self.told.append,
        )  # fmt: skip

    def train(
        self, monitor: Monitor | None, interrupt: Interrupt | None = None, *, skip: bool = False
    ) -> bool:
        """Train ``STEPS`` steps, the second under ``interrupt``; what it ends is not repeated.

        ``skip``: leave out the optimizer's second step.  Returns whether each step was applied."""
        inputs, targets = batch(12)
        parameter, applied = next(self.model.parameters()), True
        for number in range(STEPS):
            version = parameter._version
            try:
                with interrupt if interrupt is not None and number == 1 else nullcontext():
                    loss = F.cross_entropy(self.model(inputs), targets)
                    if monitor is not None:
                        monitor.observe_loss(loss)
                    loss.backward()
                    if not (skip and number == 1):
                        self.optimizer.step()
            except KeyboardInterrupt:
                applied = parameter._version != version
            self.optimizer.zero_grad()
        return applied


def released(training: Training) -> list[str]:
    """What is left of a monitor after ``close()``."""
    left = [f"{count} hooks"] if (count := hooks(training.model, training.optimizer)) else []
    left += ["lock"] if (training.run_dir / LOCK).exists() else []
    left += ["open monitor"] if open_monitors() else []
    left += ["threads"] if writers() - training.others else []
    return left


def writers() -> set[threading.Thread]:
    """Return the threads of TensorBoard that write an event file."""
    return {thread for thread in threading.enumerate() if "event_file_writer" in type(thread).__module__}


def attach_again(training: Training) -> None:
    """A new monitor attaches to what an interrupted one has left, trains and closes."""
    with training.attach() as monitor:
        training.train(monitor)
        assert monitor.step == STEPS
    assert not released(training)
    assert read_run(training.run_dir).history["loss"][0].tolist()


def interrupted_close(at: Place | None, folder: Path) -> tuple[Interrupt, str]:
    training, interrupt = Training(folder), Interrupt(at)
    monitor = training.attach()
    training.train(monitor)
    try:
        with interrupt:
            monitor.close()
    except KeyboardInterrupt:
        if monitor.closed and hooks(training.model, training.optimizer) > 0:
            # Only in the first parts of close(); the hooks do nothing any more.
            steps = monitor.step
            training.train(None)
            assert monitor.step == steps
    monitor.close()
    wrong = released(training)
    monitor.close()
    if not wrong:
        assert monitor.history["loss"][0].tolist() == [1, 2, 3, 4]
        attach_again(training)
    return interrupt, f"{interrupt.where}: {wrong}" if wrong else ""


def interrupted_attach(at: Place | None, folder: Path) -> tuple[Interrupt, str]:
    training, interrupt = Training(folder), Interrupt(at)
    monitor = None
    try:
        with interrupt:
            monitor = training.attach()
    except KeyboardInterrupt:
        pass
    if monitor is not None:
        monitor.close()
    for lost in open_monitors():  # as a user does whose handle is lost
        lost.close()
    wrong = released(training)
    if not wrong:
        attach_again(training)
    return interrupt, f"{interrupt.where}: {wrong}" if wrong else ""


def interrupted_step(at: Place | None, folder: Path) -> tuple[Interrupt, str]:
    training, interrupt = Training(folder), Interrupt(at)
    monitor = training.attach()
    applied = training.train(monitor, interrupt)
    wrong = [] if all(one.training for one in training.model.modules()) else ["modules in eval mode"]
    monitor.close()
    wrong += released(training)
    bare = Training(folder)
    bare.train(None, skip=not applied)
    wrong += differences(snapshot(training.model, training.optimizer), snapshot(bare.model, bare.optimizer))
    return interrupt, f"{interrupt.where}: {wrong}" if wrong else ""


PHASES: dict[str, Callable[[Place | None, Path], tuple[Interrupt, str]]] = {
    "attach": interrupted_attach,
    "step": interrupted_step,
    "close": interrupted_close,
}


def sweep(
    phase: str, folder: Path, every: int = 1, chosen: Callable[[Place], bool] = lambda place: True
) -> tuple[int, list[str]]:
    """Interrupt at each ``every``-th of the ``chosen`` lines of the package that run in a phase.

    Returns the number of interrupts, and what went wrong."""
    PHASES[phase](None, folder / "first")  # imports what is imported late
    wrong, count = [], 0
    places = [place for place in PHASES[phase](None, folder / "all")[0].places if chosen(place)]
    for number, place in enumerate(places[::every]):
        interrupt, found = PHASES[phase](place, folder / str(number))
        wrong += [found] if found else []
        count += bool(interrupt.where)  # a few lines run at some times only
    return count, wrong


class InsideTorch:
    """Raise KeyboardInterrupt at the ``nth`` event in ``torch.no_grad`` where the package uses it."""

    def __init__(self, nth: int) -> None:
        self.nth, self.seen = nth, 0

    def __call__(self, frame: types.FrameType, event: str, _: Any) -> Any:
        inside = frame.f_code.co_filename.endswith("grad_mode.py") and _called_by_package(frame)
        return self._event if inside else None

    def _event(self, frame: types.FrameType, event: str, _: Any) -> Any:
        if event in ("line", "return"):
            self.seen += 1
            if self.seen == self.nth:
                raise KeyboardInterrupt
        return self._event


def _called_by_package(frame: types.FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return True
        frame = frame.f_back
    return False


def test_an_interrupt_inside_no_grad_leaves_gradients_enabled(tmp_path: Path) -> None:
    """Else every later training of the process would fail at ``backward()``."""
    tried = 0
    while True:
        training = Training(tmp_path / str(tried))
        monitor, trace = training.attach(), InsideTorch(tried + 1)
        training.train(monitor)
        training.optimizer.zero_grad()
        F.cross_entropy(training.model(batch(12)[0]), batch(12)[1]).backward()
        sys.settrace(trace)
        try:
            training.optimizer.step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert torch.is_grad_enabled(), f"event {tried + 1}"
        monitor.close()
        if trace.seen < trace.nth:
            break
        tried += 1
    assert tried >= 20


@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupt_at_one_line_of_forty_ends_no_training_and_leaves_nothing(
    phase: str, tmp_path: Path
) -> None:
    count, wrong = sweep(phase, tmp_path, every=40)
    assert count >= 8 and not wrong, "\n".join(wrong)


def test_an_interrupt_while_a_plan_is_set_leaves_the_library_no_wrong_address(tmp_path: Path) -> None:
    """It read from address 0: the process was gone."""
    lines, first = inspect.getsourcelines(StepPlan._ready)
    file = inspect.getsourcefile(StepPlan)
    count, wrong = sweep(
        "step", tmp_path, chosen=lambda place: place[0] == file and 0 <= place[1] - first < len(lines)
    )
    assert not wrong, "\n".join(wrong)
    assert count >= 12 or library.library() is None


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupt_at_any_line_ends_no_training_and_leaves_nothing(
    phase: str, tmp_path: Path, shown: Shown
) -> None:
    count, wrong = sweep(phase, tmp_path)
    assert count >= 300 and not wrong, "\n".join(wrong)
    shown("interrupts", count, f"in {phase}")
