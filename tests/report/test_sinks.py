"""What a sink must have: as little as one method."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import nfi_monitor
from nfi_monitor import Monitor, SinkBase
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report.console import ConsoleSink
from nfi_monitor.report.loggers import AlertLog, ScalarLog
from nfi_monitor.report.run_directory.writer import RunDirectory
from nfi_monitor.report.sink import Sink
from nfi_monitor.report.sinks import Sinks
from nfi_monitor.report.summary import Summary
from nfi_monitor.report.tensorboard.sink import TensorBoardSink
from nfi_monitor.types import Alert, Change, Mechanism, Note, Phase, Reading
from tests.report.builders import AT_RISK

CALLS: dict[str, tuple[Any, ...]] = {
    "start": ({},),
    "reading": (Reading(1, {"loss": 1.0}), Phase.HEALTHY),
    "losses": ([(2, 1.0)], Phase.HEALTHY),
    "alert": (AT_RISK, Change.BEGIN),
    "note": (Note("code", "message", 1),),
    "replay": (ReplayVerdict(0, {}, Mechanism.UNKNOWN, (), None),),
    "went_back": (),
    "close": ({}, Summary()),
}


class Inherits(SinkBase):
    def __init__(self) -> None:
        self.alerts: list[str] = []

    def alert(self, alert: Alert, change: Change) -> None:
        self.alerts.append(alert.id)


class Plain:
    """Inherits from nothing."""

    def __init__(self) -> None:
        self.alerts: list[str] = []

    def alert(self, alert: Alert, change: Change) -> None:
        self.alerts.append(alert.id)


def never(name: str, error: BaseException) -> None:
    raise AssertionError(f"{name} was dropped: {error}")


def call_all(sinks: Sinks) -> None:
    for name, arguments in CALLS.items():
        getattr(sinks, name)(*arguments)


@pytest.mark.parametrize("make", [Inherits, Plain])
def test_a_sink_that_has_only_alert_gets_alerts_and_is_not_dropped(make: Callable[[], Any]) -> None:
    sink = make()
    sinks = Sinks([sink], never)
    for name, arguments in CALLS.items():
        if name != "close":
            getattr(sinks, name)(*arguments)
    assert sink.alerts == [AT_RISK.id] and sinks.sinks == [sink]
    sinks.close(*CALLS["close"])
    assert sinks.sinks == []


@pytest.mark.parametrize("make", [Inherits, Plain])
def test_a_monitor_keeps_a_sink_that_has_only_alert(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, sink = torch.nn.Linear(4, 3), make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inputs, targets = torch.randn(8, 4), torch.randint(3, (8,))
    with Monitor(model, optimizer, console=False, every=1, sinks=[sink]) as monitor:
        for step in range(6):
            optimizer.zero_grad()
            scale = float("nan") if step == 3 else 1.0
            (scale * F.cross_entropy(model(inputs), targets)).backward()
            optimizer.step()
    assert sink.alerts and sink.alerts[0].startswith("non_finite")
    assert not [note for note in monitor.notes if note.code.startswith("failed")]


class Misspelt:
    def alerts(self, alert: Alert, change: Change) -> None:
        raise AssertionError("nobody calls this")


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        ([Misspelt()], "Misspelt in sinks has none of the methods start, reading, losses, alert"),
        ([5], "int in sinks has none of the methods"),
        ([Inherits], r"got the class Inherits: sinks=\[Inherits\(...\)\]"),
        (Inherits(), r"sinks must be a list, got Inherits: sinks=\[it\]"),
    ],
)
def test_what_can_never_be_called_is_refused_where_it_is_passed(sinks: Any, message: str) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(TypeError, match=message):
        Monitor(model, optimizer, console=False, sinks=sinks)


def test_the_base_class_has_every_method_that_is_called_and_each_does_nothing() -> None:
    sink = SinkBase()
    methods = {name for name, _ in inspect.getmembers(SinkBase, inspect.isfunction) if name[0] != "_"}
    assert methods == CALLS.keys()
    for name, arguments in CALLS.items():
        getattr(sink, name)(*arguments)
        assert getattr(SinkBase, name).__doc__


def test_the_base_class_is_public_and_the_built_in_sinks_inherit_from_it() -> None:
    assert nfi_monitor.SinkBase is SinkBase and "SinkBase" in nfi_monitor.__all__
    for kind in (ConsoleSink, RunDirectory, TensorBoardSink, ScalarLog, AlertLog):
        assert issubclass(kind, SinkBase)
    complete: Sink = SinkBase()  # for the type checker
    assert complete


@pytest.mark.parametrize(
    ("members", "listening"),
    [
        ({}, False),
        ({"reading": lambda *_: None}, True),
        ({"reading": lambda *_: None, "takes_readings": False}, False),
        ({"takes_readings": True}, True),
        ({"reading": lambda *_: None, "losses": lambda *_: None}, False),
    ],
)
def test_a_sink_listens_if_it_has_a_method_for_readings_or_says_so(
    members: dict[str, Any], listening: bool
) -> None:
    sink = type("Some", (), {name: staticmethod(x) if callable(x) else x for name, x in members.items()})()
    assert Sinks([sink], never).listening is listening
    assert Sinks([SinkBase()], never).listening
    assert Sinks([mock.Mock()], never).listening  # it has whatever it is asked for
    assert not Sinks([], never).listening


def test_what_a_run_is_written_to_takes_losses_together(tmp_path: Path) -> None:
    for sink in (RunDirectory(tmp_path), TensorBoardSink(tmp_path)):
        assert not Sinks([sink], never).listening
        assert Sinks([sink, ScalarLog(lambda values, step: None)], never).listening


def test_a_sink_that_raises_is_dropped_once_and_the_others_go_on() -> None:
    failed: list[tuple[str, str]] = []

    class Broken(SinkBase):
        def note(self, note: Note) -> None:
            raise OSError("the disk is full")

    class Odd:
        @property
        def reading(self) -> Any:
            raise RuntimeError("not today")

    good = Inherits()
    odd: Any = Odd()
    sinks = Sinks([Broken(), odd, good], lambda name, error: failed.append((name, str(error))))
    call_all(sinks)
    assert failed == [("Odd", "not today"), ("Broken", "the disk is full")]
    assert good.alerts == [AT_RISK.id]


def test_a_failure_that_is_said_as_a_note_reaches_the_sinks_that_are_left() -> None:
    heard: list[str] = []

    class Broken(SinkBase):
        def reading(self, reading: Reading, phase: Phase) -> None:
            raise OSError("the disk is full")

    class Hears(SinkBase):
        def note(self, note: Note) -> None:
            heard.append(note.message)

    def failed(name: str, error: BaseException) -> None:
        sinks.note(Note("failed", f"{name}: {error}", 1))

    sinks = Sinks([Broken(), Hears()], failed)
    sinks.reading(*CALLS["reading"])
    sinks.reading(*CALLS["reading"])
    assert heard == ["Broken: the disk is full"]


def test_methods_are_looked_up_once_and_again_where_the_list_changes() -> None:
    looked: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            looked.append(name)
            raise AttributeError(name)

    watched: Any = Watched()
    late = Inherits()
    sinks = Sinks([watched], never)
    sinks.reading(*CALLS["reading"])
    seen = len(looked)
    for _ in range(10):
        sinks.reading(*CALLS["reading"])
        assert not sinks.listening
    assert len(looked) == seen
    sinks.sinks.append(late)
    sinks.alert(*CALLS["alert"])
    assert late.alerts == [AT_RISK.id]


def test_a_sink_that_lacks_a_handle_for_a_moment_stays_and_one_that_must_be_opened_anew_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nfi_monitor.report.sinks.TRY_AGAIN", 0.0)

    class Short(SinkBase):
        def __init__(self, reopens: bool, fails: list[str]) -> None:
            self.reopens, self.fails, self.calls = reopens, fails, []

        def _call(self, name: str) -> None:
            self.calls.append(name)
            if self.fails and self.fails[0] == name:
                self.fails.pop(0)
                raise OSError(errno.EMFILE, "Too many open files")

        def start(self, info: object) -> None:
            self._call("start")

        def reading(self, reading: object, phase: object) -> None:
            self._call("reading")

        def note(self, note: object) -> None:
            self._call("note")

    plain, anew, late = Short(False, ["reading"]), Short(True, ["reading", "start"]), Short(False, ["start"])
    dropped, missed = [], []
    sinks = Sinks(
        [plain, anew, late],
        lambda name, error: dropped.append(name),
        lambda name, error: missed.append(str(error)),
    )
    sinks.start({})
    for step in range(3):
        sinks.reading(Reading(step, {}), Phase.HEALTHY)
        sinks.note(Note("code", "message", step))
    assert plain.calls == ["start"] + ["reading", "note"] * 3
    assert anew.calls == ["start", "reading", "start", "start", "reading", "note", "reading", "note"]
    assert late.calls == ["start", "start"] + ["reading", "note"] * 3
    assert dropped == [] and len(missed) == 4 and sinks.sinks == [plain, anew, late]
