"""What adapters call is one documented port; the old names on the monitor work, with a warning."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from nfi_monitor import Monitor
from nfi_monitor.engine.port import MOVED_TO_PORT, AdapterPort
from tests.runs import batch, mlp


@pytest.fixture
def monitor():
    model = mlp()
    with Monitor(model, torch.optim.AdamW(model.parameters()), console=False, every=1) as made:
        yield made


def test_every_part_of_the_port_says_what_it_is_for():
    parts = {name: part for name, part in vars(AdapterPort).items() if not name.startswith("_")}
    newer = {"backward_of", "explain_note", "micro_batch", "recompute_rows", "trained_by", "wrapped_by"}
    assert set(parts) == set(MOVED_TO_PORT.values()) | newer
    assert all(inspect.getdoc(part) for part in parts.values())
    assert all(name in AdapterPort.__doc__ for name in ("at_close", "begin_step", "guarded", "may_act"))


@pytest.mark.parametrize("name", sorted(MOVED_TO_PORT))
def test_an_old_name_warns_and_does_the_same(monitor, name):
    new = MOVED_TO_PORT[name]
    with pytest.warns(DeprecationWarning, match=rf"monitor\.{name} is now monitor\.port\.{new}"):
        old = getattr(monitor, name)
    assert old == getattr(monitor.port, new)


def test_a_name_that_never_was_is_an_attribute_error(monitor):
    with pytest.raises(AttributeError, match="'Monitor' object has no attribute 'begin_stepp'"):
        monitor.begin_stepp()


def test_the_loss_of_a_step_that_was_skipped_is_forgotten_where_the_next_begins(monitor):
    model, optimizer = monitor._loop.model, monitor.optimizer
    inputs, targets = batch()
    monitor.observe_loss(1e9)  # the gradient scaler skips this step
    monitor.port.begin_step()
    loss = F.cross_entropy(model(inputs), targets)
    monitor.observe_loss(loss)
    loss.backward()
    optimizer.step()
    assert monitor.history["loss"][1].tolist() == [pytest.approx(loss.item())]


def test_what_is_to_be_called_at_close_is_called_once_and_may_fail(monitor):
    called = []

    def broken() -> None:
        raise RuntimeError("broken on purpose")

    monitor.port.at_close(lambda: called.append("first"), broken, lambda: called.append("last"))
    monitor.close()
    monitor.close()
    assert called == ["first", "last"]
    assert [note.code for note in monitor.notes] == ["failed_close"]


def test_what_belongs_to_a_state_is_given_until_the_monitor_is_closed():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    generator = torch.Generator()
    monitor = Monitor(model, optimizer, console=False, stateful=[generator])
    assert monitor.port.stateful == (generator,)
    monitor.close()
    assert monitor.port.stateful == ()
