"""The Autopilot: on a real run that slingshots without it, and step by step under alerts told to it."""

from __future__ import annotations

import gc
import io
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nfi_monitor
from nfi_monitor import (
    Alert,
    AlertKind,
    AlertState,
    Autopilot,
    Mechanism,
    Monitor,
    Phase,
    Severity,
    Snapshot,
)
from nfi_monitor.errors import MonitorError
from nfi_monitor.integrations.attach import Attachment
from nfi_monitor.ranks import processes
from nfi_monitor.remedies import AutopilotStop, Policy, autopilot, project_zero_sum
from nfi_monitor.report.run_directory.reader import read_run
from tests.runs import batch, differences, mlp
from tests.spiking import CUTS, Recorded, scene

NUMERIC, EDGE = Mechanism.NUMERICAL_FEATURE_INFLATION, Mechanism.EDGE_OF_STABILITY


def test_it_is_a_public_name() -> None:
    assert nfi_monitor.Autopilot is Autopilot and "Autopilot" in nfi_monitor.__all__


# --- the run that slingshots without it --------------------------------------------------------------


START = CUTS[0]


def fly(
    recorded: Recorded,
    pilot: Autopilot,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    **options: Any,
) -> tuple[Monitor, nn.Module]:
    """The training of ``spiking_run`` from its first checkpoint on, its loss computed by ``loss_of``."""
    model, optimizer, _ = scene().division()
    inputs, targets = scene().data()
    with Monitor(model, optimizer, on_alert=pilot, **{"console": False, **options}) as monitor:
        states = torch.load(io.BytesIO(recorded.checkpoints[START]), weights_only=True)
        for part, state in zip((model, optimizer, monitor), states, strict=True):
            part.load_state_dict(state)
        for _ in range(scene().cuts[START], scene().steps):
            loss = loss_of(model(inputs), targets)
            monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return monitor, model


def kinds(monitor: Monitor) -> set[AlertKind]:
    return {alert.kind for alert in monitor.alerts}


def test_the_run_that_slingshots_does_not_once_its_loss_may_be_exchanged(
    spiking_run: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert AlertKind.SLINGSHOT in kinds(spiking_run.monitor)
    pilot = Autopilot()
    monitor, _ = fly(spiking_run, pilot, pilot.loss, console=True, run_dir=tmp_path / "run")
    assert AlertKind.SLINGSHOT not in kinds(monitor) and pilot.swapped
    [at_risk] = monitor.alerts
    assert at_risk.state is AlertState.RESOLVED, "the condition has cleared"
    [action] = pilot.actions
    assert (action.what, action.alert) == ("loss", "at_risk-1")
    assert at_risk.first_step <= action.step <= at_risk.last_step
    # One event, wherever events are shown.
    assert action.message in [note.message for note in read_run(tmp_path / "run").notes]
    assert action.message in [note["message"] for note in monitor.summary()["notes"]]
    assert "zero_sum_cross_entropy from now on" in " ".join(capsys.readouterr().err.split())


def test_without_its_loss_it_projects_the_gradient_and_lets_the_learning_rate_come_back(
    spiking_run: Recorded,
) -> None:
    pilot = Autopilot(Policy(loss_at="imminent"))
    monitor, _ = fly(spiking_run, pilot)
    assert kinds(monitor) == {AlertKind.AT_RISK, AlertKind.IMMINENT}
    assert [action.what for action in pilot.actions] == ["projection", "cool", "release"]
    assert {action.alert for action in pilot.actions} == {"imminent-1"}
    assert not pilot.swapped and not pilot.cooling


def test_a_dry_run_says_what_it_would_do_and_leaves_the_training_as_it_is_to_the_last_bit(
    spiking_run: Recorded,
) -> None:
    pilot = Autopilot(dry_run=True)
    monitor, model = fly(spiking_run, pilot, pilot.loss)
    assert differences(model.state_dict(), spiking_run.model.state_dict()) == []
    assert AlertKind.SLINGSHOT in kinds(monitor)
    assert [(action.what, action.alert) for action in pilot.actions] == [
        ("loss", "at_risk-1"), ("cool", "imminent-1")
    ]  # fmt: skip
    assert all("dry run, nothing is changed" in action.message for action in pilot.actions)
    assert not pilot.swapped and not pilot.should_stop and pilot.snapshot is None


# --- alerts told to it, step by step -----------------------------------------------------------------


class Cockpit:
    """A quiet training whose learning rate, as the optimizer used it, is on record; alerts are made up."""

    def __init__(self, pilot: Autopilot, **options: Any) -> None:
        self.pilot = pilot
        self.model = mlp()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.9))  # τ = 10
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.999)
        self.rates: list[float] = []
        self.monitor = Monitor(
            self.model,
            self.optimizer,
            on_alert=pilot,
            stateful=[self.scheduler],
            **{"console": False, "every": 10_000, **options},
        )
        # What is used is what stands in the group when the last of the hooks before a step is called.
        self.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: self.note(optimizer))

    def note(self, optimizer: torch.optim.Optimizer) -> None:
        group = optimizer.param_groups[0]
        self.rates.append(group["lr"] / (1e-3 * 0.999 ** len(self.rates)))

    def train(self, steps: int) -> list[float]:
        """Returns what the rate was multiplied by in each step."""
        inputs, targets = batch()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.pilot.loss(self.model(inputs), targets).backward()
            self.optimizer.step()
            self.scheduler.step()
        return [round(rate, 6) for rate in self.rates[len(self.rates) - steps :]]

    def tell(self, alert: Alert) -> Alert:
        alert = replace(alert, first_step=self.monitor.step, last_step=self.monitor.step)
        self.monitor._loop.judge.report(nfi_monitor.Change.BEGIN, alert)
        return alert

    def end(self, alert: Alert) -> None:
        alert = replace(alert, state=AlertState.RESOLVED, last_step=self.monitor.step)
        self.monitor._loop.judge.report(nfi_monitor.Change.END, alert)

    def enter(self, phase: Phase) -> None:
        self.monitor._loop.detector.phase = phase
        self.monitor.phases.append((self.monitor.step, phase))


def alert(
    kind: AlertKind, mechanism: Mechanism = EDGE, number: int = 1, severity: Severity = Severity.WARNING
) -> Alert:
    return Alert(
        f"{kind}-{number}", kind, severity, AlertState.FIRING, Phase.IMMINENT, 0, 0, mechanism, 0.9
    )  # fmt: skip


IMMINENT = alert(AlertKind.IMMINENT)
NON_FINITE = alert(AlertKind.NON_FINITE, Mechanism.UNKNOWN, severity=Severity.CRITICAL)


def whats(pilot: Autopilot) -> list[str]:
    return [action.what for action in pilot.actions]


def test_until_something_is_done_its_loss_is_torchs_to_the_last_bit() -> None:
    pilot, logits = Autopilot(), torch.randn(5, 7, requires_grad=True)
    target, weight = torch.tensor([0, 1, -100, 3, 4]), torch.rand(7)
    for options in ({}, {"weight": weight}, {"label_smoothing": 0.1}, {"reduction": "sum"}):
        ours, theirs = pilot.loss(logits, target, **options), F.cross_entropy(logits, target, **options)  # type: ignore[arg-type]
        assert ours == theirs
        assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


def test_it_never_acts_twice_for_one_event() -> None:
    cockpit = Cockpit(Autopilot())
    cockpit.train(2)
    numeric = alert(AlertKind.IMMINENT, NUMERIC)
    for severity in (Severity.WARNING, Severity.CRITICAL, Severity.CRITICAL):
        cockpit.tell(replace(numeric, severity=severity))
        cockpit.train(3)
    assert whats(cockpit.pilot) == ["loss", "cool"]


def test_a_cool_down_lasts_as_long_as_its_alarm_and_a_while_longer_and_comes_back_by_equal_factors() -> None:
    cockpit = Cockpit(Autopilot(Policy(hold=2.0, calm=1.0)))
    assert cockpit.train(3) == [1.0] * 3
    told = cockpit.tell(IMMINENT)
    assert cockpit.pilot.cooling and cockpit.train(30) == [0.1] * 30, "longer than the 20 steps of hold"
    cockpit.end(told)
    rates = cockpit.train(21)
    assert rates[:10] == [0.1] * 10, "τ steps of calm"
    assert rates[10:20] == pytest.approx([0.1 ** (1 - k / 11) for k in range(1, 11)], abs=1e-5)
    assert rates[20] == 1.0 and not cockpit.pilot.cooling
    assert whats(cockpit.pilot) == ["cool", "release"]


def test_an_alarm_that_comes_back_soon_is_held_twice_as_long_and_a_later_one_is_not() -> None:
    cockpit = Cockpit(Autopilot(Policy(hold=2.0, calm=1.0)))
    held = []
    for number, pause in ((1, 5), (2, 5), (3, 150), (4, 0)):
        cockpit.end(cockpit.tell(alert(AlertKind.IMMINENT, number=number)))
        rates = cockpit.train(100)
        held.append(rates.count(0.1))
        cockpit.train(pause)
    # The pauses begin when the rate is back; 10 τ after one the count begins anew.
    assert held[:3] == [20, 40, 80] and held[3] == 20


def test_what_outlasts_the_cool_down_ends_in_a_snapshot_from_which_the_run_goes_on_to_the_last_bit(
    tmp_path: Path,
) -> None:
    cockpit = Cockpit(Autopilot(), run_dir=tmp_path)
    cockpit.train(5)
    cockpit.tell(IMMINENT)
    for _ in range(200):
        cockpit.train(1)
        if cockpit.pilot.should_stop:
            break
    assert whats(cockpit.pilot) == ["cool", "stop"]
    assert cockpit.monitor.step == 5 + 100, "patience"
    assert "the alert goes on; training should end" in cockpit.pilot.actions[-1].message
    snapshot = Snapshot.load(tmp_path / "autopilot-105.pt")
    assert snapshot.step == 105
    expected = [cockpit.train(3), cockpit.model.state_dict(), cockpit.scheduler.state_dict()]
    expected = (
        json.loads(json.dumps(expected[0])),
        {k: v.clone() for k, v in expected[1].items()},
        expected[2],
    )
    cockpit.rates = cockpit.rates[:105]
    snapshot.restore(cockpit.model, cockpit.optimizer, [cockpit.scheduler])
    again = cockpit.train(3), cockpit.model.state_dict(), cockpit.scheduler.state_dict()
    assert differences(again, expected) == []


def test_an_end_is_raised_only_where_the_policy_says_so_and_once() -> None:
    cockpit = Cockpit(Autopilot(Policy(stop="raise")))
    cockpit.train(2)
    cockpit.tell(NON_FINITE)
    with pytest.raises(AutopilotStop, match=r"non_finite-1: training should end; no snapshot\. Catch"):
        cockpit.train(1)
    cockpit.train(2)
    never = Cockpit(Autopilot(Policy(stop="never")))
    never.tell(NON_FINITE)
    never.train(120)
    assert not never.pilot.should_stop and never.pilot.actions == []


def test_after_a_slingshot_that_does_not_end_the_snapshot_is_one_from_before_it() -> None:
    cockpit = Cockpit(Autopilot(), snapshots=1 << 30)
    cockpit.train(3)
    cockpit.monitor._loop.recent_snapshots.take(3, None)
    cockpit.train(2)
    cockpit.tell(alert(AlertKind.SLINGSHOT))
    cockpit.enter(Phase.SLINGSHOT)
    cockpit.train(101)
    assert cockpit.pilot.should_stop and cockpit.pilot.snapshot is not None
    assert cockpit.pilot.snapshot.step == 3


def test_a_run_whose_loss_came_back_is_not_ended_though_its_slingshot_still_fires() -> None:
    cockpit = Cockpit(Autopilot())
    cockpit.tell(alert(AlertKind.SLINGSHOT))
    cockpit.enter(Phase.SLINGSHOT)
    cockpit.train(60)
    cockpit.enter(Phase.RECOVERING)
    cockpit.train(60)
    cockpit.enter(Phase.SLINGSHOT)
    cockpit.train(90)
    assert not cockpit.pilot.should_stop, "an aftershock has a patience of its own"
    cockpit.train(11)
    assert cockpit.pilot.should_stop


def test_growth_that_goes_on_under_the_exchanged_loss_is_met_by_a_smaller_rate_while_it_grows() -> None:
    cockpit = Cockpit(Autopilot())
    cockpit.train(1)
    cockpit.tell(alert(AlertKind.AT_RISK, NUMERIC))
    cockpit.monitor._loop.detector.phase = Phase.ABSORBING
    assert set(cockpit.train(110)) == {1.0}, "it does not grow"
    cockpit.monitor._loop.detector.phase = Phase.INFLATING
    assert cockpit.train(30)[1:] == [0.1] * 29
    cockpit.monitor._loop.detector.phase = Phase.ABSORBING
    assert cockpit.train(30)[-1] == 1.0
    assert whats(cockpit.pilot) == ["loss", "cool", "release"]


def train_nothing(optimizer: torch.optim.Optimizer) -> None:
    """A step without gradients: the clock goes on."""
    optimizer.step()


def test_where_neither_loss_nor_head_can_be_reached_it_says_what_is_needed() -> None:
    pilot, model = Autopilot(), mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, optimizer, head=False, console=False, on_alert=pilot) as monitor:
        for severity in (Severity.WARNING, Severity.CRITICAL):  # the same event, told again
            train_nothing(optimizer)
            pilot(replace(alert(AlertKind.AT_RISK, NUMERIC), severity=severity))
    [action] = pilot.actions
    assert action.what == "nothing" and "compute it as autopilot.loss(logits, target)" in action.message
    assert [note.message for note in monitor.notes] == [action.message]


def test_where_the_head_never_fires_no_projection_is_announced_that_would_do_nothing() -> None:
    pilot, model = Autopilot(), mlp()
    body, head = model[:-1], model[-1]
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=1, on_alert=pilot) as monitor:
        for _ in range(6):  # like a fused loss: it reads the head's weight
            F.cross_entropy(F.linear(body(inputs), head.weight), targets).backward()
            optimizer.step()
        pilot(alert(AlertKind.SLINGSHOT, NUMERIC))
    assert whats(pilot) == ["nothing"] and not monitor.port.sees_rows
    assert (
        "no gradient reaches the output of 4, where it could be projected: compute it as autopilot.loss"
        in pilot.actions[0].message
    )


# --- coming and going ---------------------------------------------------------------------------------


def test_a_resumed_run_has_its_loss_its_rate_and_its_memory_back() -> None:
    first = Cockpit(Autopilot())
    first.train(3)
    told = first.tell(alert(AlertKind.IMMINENT, NUMERIC))
    first.train(4)
    state = json.loads(json.dumps(first.pilot.state_dict()))
    second = Cockpit(Autopilot())
    second.monitor._loop.step = 7
    second.pilot.load_state_dict(state)
    assert second.pilot.swapped and second.pilot.cooling
    assert second.train(2) == [0.1] * 2
    second.tell(told)
    assert whats(second.pilot) == ["loss", "cool"], "answered by the run before"
    second.end(told)
    assert second.train(60)[-1] == 1.0
    assert second.pilot.state_dict()["actions"][:2] == state["actions"]


def test_a_state_that_was_loaded_before_the_monitor_was_made_counts_and_a_new_run_begins_anew() -> None:
    first = Cockpit(Autopilot())
    first.train(1)
    first.tell(alert(AlertKind.AT_RISK, NUMERIC))
    pilot = Autopilot()
    pilot.load_state_dict(first.pilot.state_dict())
    second = Cockpit(pilot)
    assert pilot.swapped
    second.monitor.close()
    third = Cockpit(pilot)
    assert not pilot.swapped and pilot.actions == []
    third.train(1)
    third.tell(alert(AlertKind.AT_RISK, NUMERIC))
    assert whats(pilot) == ["loss"], "its at_risk-1 is another one"


def test_the_projection_is_there_again_after_a_resume() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    pilot = Autopilot()
    with Monitor(model, optimizer, console=False, on_alert=pilot):
        pilot(alert(AlertKind.AT_RISK, NUMERIC))
        assert len(model[-1]._forward_hooks) == 2
        state = pilot.state_dict()
        pilot.load_state_dict(state)
        assert len(model[-1]._forward_hooks) == 2, "not twice"
    fresh = mlp()
    again = Autopilot()
    again.load_state_dict(state)
    with Monitor(fresh, torch.optim.AdamW(fresh.parameters()), console=False, on_alert=again):
        assert len(fresh[-1]._forward_hooks) == 2
    project_zero_sum(fresh[-1]).undo()


def test_when_its_monitor_is_closed_the_rate_comes_back() -> None:
    cockpit = Cockpit(Autopilot())
    cockpit.train(2)
    cockpit.tell(IMMINENT)
    assert cockpit.train(2) == [0.1] * 2
    cockpit.monitor.close()
    assert cockpit.train(30)[-1] == 1.0


def test_where_other_processes_run_that_it_is_not_read_with_it_acts_no_more_and_takes_nothing_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cockpit = Cockpit(Autopilot(Policy(hold=2.0, calm=1.0)))
    told = cockpit.tell(IMMINENT)
    assert cockpit.train(2) == [0.1] * 2
    monkeypatch.setattr(processes, "processes", lambda group: 2)
    cockpit.end(told)
    cockpit.tell(NON_FINITE)
    assert cockpit.train(150) == [0.1] * 150 and not cockpit.pilot.should_stop
    cockpit.monitor.close()
    assert cockpit.train(30) == [0.1] * 30, "closed on this rank, and who knows where else"
    assert whats(cockpit.pilot) == ["cool"]
    assert [note.code for note in cockpit.monitor.notes].count("no_action") == 1
    Monitor(cockpit.model, cockpit.optimizer, console=False, on_alert=cockpit.pilot)
    assert cockpit.train(1) == [1.0], "a new run"


@pytest.mark.parametrize("on", ["save_on", "stop_on", "remedy", "on_alert"])
def test_an_adapter_acts_only_on_what_all_processes_agree_on_and_tells_the_user_all_the_same(
    on: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    heard: list[Alert] = []
    done: list[Alert] = []
    option = {"remedy": lambda alert, context: done.append(alert), "on_alert": None}.get(on, "non_finite")
    attachment = Attachment(
        **{"on_alert": heard.append, "run_dir": None, "console": False}, **{on: option} if option else {}
    )
    model = mlp()
    monitor = attachment.open(model, torch.optim.AdamW(model.parameters()), directory=tmp_path)
    monitor._loop.judge.report(nfi_monitor.Change.BEGIN, NON_FINITE)
    monkeypatch.setattr(processes, "processes", lambda group: 2)
    due = attachment.act()  # of an alert of before, when all ranks had the same
    assert (due.save, due.stop, len(done)) == (on == "save_on", on == "stop_on", on == "remedy")
    later = replace(NON_FINITE, id="non_finite-2")
    monitor._loop.judge.report(nfi_monitor.Change.BEGIN, later)
    due = attachment.act()
    assert (due.save, due.stop, len(done)) == (False, False, on == "remedy")
    assert heard == [NON_FINITE, later]
    assert [note.code for note in monitor.notes] == (["no_action"] if option else []), "only if it would act"
    attachment.close()


def test_a_projection_that_stays_keeps_no_closed_monitor_alive() -> None:
    cockpit = Cockpit(Autopilot())
    cockpit.tell(alert(AlertKind.AT_RISK, Mechanism.NUMERICAL_FEATURE_INFLATION))
    assert whats(cockpit.pilot) == ["projection"]
    cockpit.monitor.close()
    cockpit.train(1)  # in which it takes its own hooks off
    gone = [weakref.ref(cockpit.monitor), weakref.ref(cockpit.pilot)]
    model = cockpit.model
    del cockpit
    gc.collect()
    assert [one() for one in gone] == [None, None]
    assert len(model[-1]._forward_hooks) == 1


def test_an_error_of_its_own_is_said_once_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no rate to be found")

    monkeypatch.setattr(autopilot, "cool_down", broken)
    cockpit = Cockpit(Autopilot())
    cockpit.train(1)
    cockpit.tell(IMMINENT)
    assert cockpit.train(120) == [1.0] * 120
    [note] = [note for note in cockpit.monitor.notes if note.code.startswith("failed")]
    assert "no rate to be found" in note.message


def test_a_framework_s_attachment_hands_it_the_monitor_and_its_end_to_the_framework(tmp_path: Path) -> None:
    pilot = Autopilot()
    attachment = Attachment(on_alert=pilot, run_dir=None, console=False)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    monitor = attachment.open(model, optimizer, directory=tmp_path)
    assert attachment.act().stop is False
    monitor._loop.judge.report(nfi_monitor.Change.BEGIN, NON_FINITE)
    assert attachment.act().stop is True and attachment.act().stop is True
    state = json.loads(json.dumps(attachment.state()))
    attachment.close()
    resumed = Attachment(on_alert=Autopilot(), run_dir=None, console=False)
    resumed.open(model, optimizer, directory=tmp_path, state=state)
    assert resumed.act().stop is True
    resumed.close()


# --- bad input ----------------------------------------------------------------------------------------


def test_what_it_cannot_work_with_is_refused_with_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"policy must be a Policy\(...\), got str"):
        Autopilot("bold")  # type: ignore[arg-type]
    with pytest.raises(MonitorError, match=r"no monitor\. Pass the Autopilot itself, .*on_alert=autopilot"):
        Autopilot()(IMMINENT)
    with pytest.raises(ValueError, match=r"expected keys 'taken' and 'exchanged', found \['step'\]"):
        Autopilot().load_state_dict({"step": 3})
    cockpit = Cockpit(Autopilot())
    assert cockpit.monitor.port.stateful == (cockpit.scheduler,) and cockpit.monitor.tau == pytest.approx(
        10.0
    )
    other = mlp()
    with pytest.raises(ValueError, match="serves an open monitor already"):
        Monitor(other, torch.optim.AdamW(other.parameters()), console=False, on_alert=cockpit.pilot)
    Monitor(other, torch.optim.AdamW(other.parameters()), console=False).close()  # nothing was left attached
    cockpit.monitor.close()
    with pytest.raises(MonitorError, match="A closed monitor does not hold the model"):
        cockpit.monitor.take_snapshot()
    assert cockpit.monitor.head is None and cockpit.monitor.port.stateful == ()
