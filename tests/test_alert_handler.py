"""``on_alert`` as an object: it gets its monitor once, may end the training, and keeps a state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nfi_monitor import Alert, AlertHandler, Autopilot, Monitor, Thresholds
from nfi_monitor.alert_handler import handler_of
from nfi_monitor.integrations.attach import Attachment
from tests.runs import mlp, train

SOON = Thresholds(absorbing_enter=1e-9, absorbing_exit=1e-10)
"""Any rounding at all counts as absorption: *at risk* fires within the first steps of any training."""


class Counting(AlertHandler):
    def __init__(self) -> None:
        self.attached: list[Monitor] = []
        self.alerts = 0

    def attach(self, monitor: Monitor) -> None:
        self.attached.append(monitor)

    def __call__(self, alert: Alert) -> None:
        self.alerts += 1

    @property
    def should_stop(self) -> bool:
        return self.alerts > 0

    def state_dict(self) -> dict[str, Any]:
        return {"alerts": self.alerts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.alerts = state["alerts"]


class OldKind:
    """As before AlertHandler: found by its methods."""

    def __init__(self) -> None:
        self.attached: list[Monitor] = []
        self.alerts = 0
        self.should_stop = False

    def attach_monitor(self, monitor: Monitor) -> None:
        self.attached.append(monitor)

    def __call__(self, alert: Alert) -> None:
        self.alerts += 1
        self.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"alerts": self.alerts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.alerts = state["alerts"]


def pair() -> tuple[nn.Sequential, torch.optim.Adam]:
    model = mlp()
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def test_a_handler_gets_its_monitor_once_and_every_alert() -> None:
    model, optimizer = pair()
    handler = Counting()
    with Monitor(model, optimizer, console=False, every=1, thresholds=SOON, on_alert=handler) as monitor:
        assert handler.attached == [monitor]
        train(model, optimizer, 5)
        assert monitor.alerts and handler.alerts >= 1


def test_what_attach_raises_closes_the_monitor() -> None:
    class Refusing(Counting):
        def attach(self, monitor: Monitor) -> None:
            super().attach(monitor)
            raise ValueError("not this one")

    model, optimizer = pair()
    handler = Refusing()
    with pytest.raises(ValueError, match="not this one"):
        Monitor(model, optimizer, console=False, on_alert=handler)
    assert handler.attached[0].closed
    Monitor(model, optimizer, console=False).close()


@pytest.mark.parametrize("kind", [Counting, OldKind])
def test_an_adapter_attaches_it_asks_it_to_stop_and_saves_its_state(kind: Any, tmp_path: Path) -> None:
    model, optimizer = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        handler, resumed = kind(), kind()
        attachment, again = (
            Attachment(console=False, every=1, thresholds=SOON, run_dir=None, on_alert=one)
            for one in (handler, resumed)
        )
    monitor = attachment.open(model, optimizer, directory=tmp_path)
    assert handler.attached == [monitor]
    assert not attachment.act().stop
    train(model, optimizer, 5)
    assert attachment.act().stop
    state = attachment.state()
    assert state["on_alert"] == {"alerts": handler.alerts}
    attachment.close()
    again.open(model, optimizer, directory=tmp_path, state=state)
    assert resumed.alerts == handler.alerts
    again.close()


def test_an_object_of_the_old_kind_works_and_is_warned_of() -> None:
    model, optimizer = pair()
    handler = OldKind()
    with (
        pytest.warns(DeprecationWarning, match=r"OldKind should inherit from nfi_monitor\.AlertHandler"),
        Monitor(model, optimizer, console=False, every=1, thresholds=SOON, on_alert=handler) as monitor,
    ):
        assert handler.attached == [monitor]
        train(model, optimizer, 5)
    assert handler.alerts >= 1


def test_a_function_is_no_handler_and_a_handler_without_call_says_what_is_missing() -> None:
    assert handler_of(None) is None and handler_of(lambda alert: None) is None
    pilot = Autopilot()
    assert handler_of(pilot) is pilot
    bare = AlertHandler()
    assert not bare.should_stop and bare.state_dict() == {} and bare.load_state_dict({}) is None
    with pytest.raises(NotImplementedError, match=r"AlertHandler must define __call__\(alert\)"):
        bare(None)  # type: ignore[arg-type]


def test_the_autopilots_old_method_works_and_warns() -> None:
    model, optimizer = pair()
    pilot = Autopilot()
    with Monitor(model, optimizer, console=False) as monitor:
        with pytest.warns(DeprecationWarning, match=r"attach_monitor is now autopilot\.attach"):
            pilot.attach_monitor(monitor)
        with pytest.raises(ValueError, match="serves an open monitor already"):
            pilot.attach(monitor)


def test_the_warning_about_an_old_handler_points_at_the_line_that_passed_it() -> None:
    model, optimizer = pair()
    with pytest.warns(DeprecationWarning, match="OldKind should inherit") as caught:
        Monitor(model, optimizer, console=False, on_alert=OldKind()).close()
    assert caught[0].filename == __file__


def test_a_handler_without_call_is_refused_where_it_is_passed() -> None:
    class Silent(AlertHandler):
        pass

    with pytest.raises(TypeError, match=r"Silent must define __call__\(alert\)"):
        Monitor(*pair(), console=False, on_alert=Silent())
