"""How often a healthy run is read: within its budget, never so seldom that a slingshot could hide."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nfi_monitor import Monitor
from nfi_monitor.capture.sampling import auto_interval
from nfi_monitor.detect.attention import Attention
from nfi_monitor.engine.schedule import FIRST_CHANGE, SAMPLES, Schedule, next_read


def clock_of(
    training: float, passing: float, reading: float, budget: float | None = 0.01, stirs: int = 0
) -> Schedule:
    """A clock that has seen 64 steps of these costs in seconds, every fourth of them read, ``stirs`` of them
    because the loss stirred."""
    clock = Schedule(budget)
    now = clock._last
    for step in range(64):
        own = passing if step % 4 else reading
        now += training + own
        clock.own_seconds += own
        clock.step_done(step % 4 == 0, now, unplanned=step < 4 * stirs)
    return clock


def test_a_reading_that_is_cheap_beside_the_step_leaves_the_interval_alone():
    clock = clock_of(training=1.0, passing=1e-5, reading=3e-3)
    assert not clock.decide(64, tau=1000)
    assert clock.healthy_interval is None


def test_the_interval_grows_until_a_healthy_step_keeps_within_the_budget():
    clock = clock_of(training=10e-3, passing=1e-5, reading=5e-3)
    assert clock.decide(4096, tau=1000)
    assert clock.healthy_interval == 64  # 16 costs 3.2%, 32 1.7%, 64 0.9%
    assert clock.expected(1000) <= clock.budget


def test_no_budget_makes_the_interval_longer_than_a_tenth_of_tau():
    clock = clock_of(training=1e-3, passing=1e-3, reading=1.0)
    clock.decide(4096, tau=1000)
    assert clock.healthy_interval == 100
    assert clock.expected(1000) > clock.budget


@pytest.mark.parametrize(("step", "healthy"), [(64, None), (512, None), (1024, 32), (2048, 64), (4096, 100)])
def test_early_on_the_interval_is_a_small_part_of_the_steps_done(step, healthy):
    """In its first τ steps a second moment remembers no more than those."""
    clock = clock_of(training=1e-3, passing=1e-5, reading=1.0)
    assert clock.decide(step, tau=1000) is (healthy is not None)
    assert clock.healthy_interval == healthy


@pytest.mark.parametrize("tau", [1, 20, 160])
def test_where_tau_is_short_readings_hold_less_instead_of_coming_less_often(tau):
    clock = clock_of(training=1e-3, passing=1e-5, reading=1.0)
    assert clock.decide(4096, tau=tau)
    assert clock.healthy_interval is None and clock.reduced_sample
    assert not clock.decide(8192, tau=tau), "once is enough"


@pytest.mark.parametrize(("step", "lowered"), [(2048, False), (4096, True)])
def test_readings_hold_less_only_once_the_interval_is_as_long_as_it_will_be(step, lowered):
    clock = clock_of(training=1e-3, passing=1e-5, reading=1.0)
    clock.decide(step, tau=1000)
    assert clock.reduced_sample is lowered


@pytest.mark.parametrize("tau", [20, 1000])
def test_within_the_budget_readings_hold_all_they_may(tau):
    clock = clock_of(training=1.0, passing=1e-5, reading=3e-3)
    assert not clock.decide(4096, tau=tau)
    assert not clock.reduced_sample


def test_without_a_budget_the_clock_decides_nothing():
    assert not clock_of(1e-3, 1e-5, 1.0, budget=None).decide(64, tau=1000)


def test_the_interval_is_decided_on_once_after_each_power_of_two_and_shrinks_when_steps_become_dear():
    clock = clock_of(training=1e-3, passing=1e-6, reading=5e-3)
    assert not any(clock.decide(step, tau=1000) for step in (1, 8, FIRST_CHANGE, 513, 1023))
    assert clock.decide(1030, tau=1000)
    assert clock.healthy_interval == 32
    assert not any(clock.decide(step, tau=1000) for step in (1031, 1600, 2047))
    now = clock._last
    for _ in range(4 * SAMPLES):  # the batch became larger
        now += 10.0
        clock.step_done(False, now)
    assert not clock.decide(2047, tau=1000)
    assert clock.healthy_interval == 32
    assert not clock.decide(2048, tau=1000)
    assert clock.healthy_interval is None


def test_what_a_stirring_loss_has_read_counts_against_the_budget():
    costs = {"training": 40e-3, "passing": 1e-5, "reading": 4.5e-3}
    assert not clock_of(**costs).decide(4096, tau=1000)
    clock = clock_of(**costs, stirs=4)  # a sixteenth of the steps: .28 of .4 ms
    assert clock.decide(4096, tau=1000) and clock.healthy_interval == 64 and not clock.reduced_sample
    assert clock.expected(1000) <= clock.budget
    assert not clock.decide(8192, tau=1000) and clock.healthy_interval is None, (
        "it has stirred no more since then"
    )
    clock = clock_of(**costs, stirs=8)  # more than the budget by itself
    assert clock.decide(4096, tau=1000) and clock.healthy_interval == 100 and clock.reduced_sample


@pytest.mark.parametrize(("every", "unplanned"), [("auto", (6, 40)), (1, (0, 0)), (7, (0, 0))])
def test_readings_that_only_the_loss_called_for_are_told_from_those_of_the_cadence(every, unplanned):
    with small(every=every) as monitor:
        for step in range(120):
            low = 0.005 if step % 40 == 39 else 0.001
            monitor.observe_loss(1.0 if step < 25 else low)  # a loss of its own: its unit is its first level
            F.cross_entropy(
                monitor._loop.model(torch.ones(2, 8)), torch.zeros(2, dtype=torch.long)
            ).backward()
            monitor.optimizer.step()
        found = monitor._loop.schedule._unplanned
        assert unplanned[0] <= found <= unplanned[1]


def test_one_slow_step_is_no_cost():
    clock = clock_of(training=1.0, passing=1e-5, reading=3e-3)
    clock.own_seconds += 30.0
    clock.step_done(True, clock._last + 31.0)
    assert not clock.decide(64, tau=1000)


def test_time_left_out_belongs_to_nobody():
    clock = clock_of(training=1.0, passing=1e-5, reading=3e-3)
    before = clock._last
    clock.leave_out(100.0)
    assert clock._last == before + 100.0


@pytest.mark.parametrize("healthy", [None, 64])
@pytest.mark.parametrize(("attention", "times"), [(Attention.RARELY, 2), (Attention.SELDOM, 4)])
def test_a_run_is_read_in_pairs_of_neighbours_with_a_pause_between(healthy, attention, times):
    pause = times * (healthy or auto_interval(1000))
    read = [step for step in range(9, 4000) if next_read(step - 1, "auto", attention, 1000, healthy) == step]
    assert [step for step in read if step + 1 in read] == list(range(pause, 4000, pause))
    assert len(read) == 2 * len(range(pause, 4000, pause))


@pytest.mark.parametrize(("attention", "times"), [(Attention.SOON, 1), (Attention.SOMETIMES, 2)])
def test_the_budget_of_a_healthy_run_makes_no_pause_before_a_slingshot_longer(attention, times):
    pause = times * auto_interval(1000)
    assert next_read(pause, "auto", attention, 1000, 64) == pause + 1
    assert next_read(pause + 1, "auto", attention, 1000, 64) == 2 * pause


def train(monitor: Monitor, steps: int) -> None:
    torch.manual_seed(1)
    inputs, targets = torch.randn(16, 8), torch.randint(4, (16,))
    for _ in range(steps):
        loss = F.cross_entropy(monitor._loop.model(inputs), targets)
        monitor.observe_loss(loss)
        monitor.optimizer.zero_grad()
        loss.backward()
        monitor.optimizer.step()


def small(beta2=0.999, **arguments) -> Monitor:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, beta2))
    return Monitor(model, optimizer, console=False, **arguments)


def test_a_model_smaller_than_its_reading_is_read_seldom_and_told_so_once():
    with small() as monitor:
        train(monitor, 2_200)
    (note,) = [note for note in monitor.notes if note.code == "overhead_budget"]
    assert note.step == 1024
    assert "one step in 32 is read instead of one in 16, and never fewer than one in 100" in note.message
    assert "costs more than the 1% that was asked for" in note.message
    assert "overhead_budget=None" in note.message
    read = monitor.history["rms_t_max"][0]
    assert read[read > 2_048].tolist() == [2_049, 2_176, 2_177]


def test_without_a_budget_the_cadence_never_depends_on_the_clock():
    with small(overhead_budget=None) as monitor:
        train(monitor, 200)
    assert not [note for note in monitor.notes if note.code == "overhead_budget"]
    assert monitor.summary()["overhead"]["measured_steps"] == 1 + len(
        [step for step in range(2, 201) if step <= 8 or step % 32 <= 1]
    )


def wide(**arguments) -> Monitor:
    """More parameters and rows than a lowered reading holds."""
    torch.manual_seed(0)
    model = nn.Linear(300, 200)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.9))
    return Monitor(model, optimizer, console=False, **arguments)


def sampled(monitor: Monitor, steps: int) -> list[tuple[int, int]]:
    """(rows, coordinates) of each reading of so many steps on 2,000 rows."""
    found, deliver, reader = [], monitor._loop.probe._deliver, monitor._loop.reader
    rows: list[int] = []

    def delivered(given):
        rows.append(len(given.grad))
        deliver(given)

    monitor._loop.probe._deliver = delivered
    model, optimizer = monitor._loop.model, monitor.optimizer
    inputs, targets = torch.randn(2_000, 300), torch.randint(200, (2_000,))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        monitor.observe_loss(loss)
        loss.backward()
        if rows:  # the step is read
            found.append((rows.pop(), reader.layout(needs_gradient=True).sample.spans[-1][1]))
        optimizer.step()
    return found


def test_a_lowered_reading_holds_a_quarter_of_the_rows_and_coordinates_and_says_so_once():
    with wide(overhead_budget=1e-9) as monitor:
        found = sampled(monitor, 80)
    full, less = found[0], found[-1]
    assert found[7] == full and full[0] == 1_000
    assert 250 <= less[0] <= 290 and 2_000 < less[1] < 0.6 * full[1] < 6_000
    (note,) = [note for note in monitor.notes if note.code == "overhead_samples"]
    assert 64 <= note.step <= 80 and "one in 4 of its rows and coordinates" in note.message


def test_a_model_that_is_read_whole_anyway_is_told_nothing_of_fewer_rows():
    with small(overhead_budget=1e-9, beta2=0.9) as monitor:
        train(monitor, 200)
    assert not monitor._loop.schedule.reduced_sample
    assert monitor.notes == []


@pytest.mark.parametrize("attention", [Attention.OFTEN, Attention.ALWAYS])
def test_while_something_is_going_on_the_sample_stays_what_it_was(monkeypatch, attention):
    """Growth is told from less than two samples differ by."""
    monkeypatch.setattr("nfi_monitor.detect.detector.Detector.attention", attention)
    with wide(overhead_budget=1e-9) as monitor:
        assert len(set(sampled(monitor, 80))) == 1
        assert monitor._loop.reader.can_reduce and not monitor._loop.can_reduce()
        monkeypatch.undo()
        assert monitor._loop.can_reduce()
        found = sampled(monitor, 80)
        assert found[-1][0] < 300 <= found[0][0]
        monkeypatch.setattr("nfi_monitor.detect.detector.Detector.attention", attention)
        rows = {rows for rows, _ in sampled(monitor, 20)}
    assert max(rows) < 300, "and lowered, it stays lowered"


@pytest.mark.parametrize("arguments", [{"overhead_budget": None}, {"overhead_budget": 1e-9, "every": 2}])
def test_who_asks_for_a_cadence_or_no_budget_gets_full_readings(arguments):
    with wide(**arguments) as monitor:
        assert len(set(sampled(monitor, 80))) == 1


def test_a_lowered_reading_stays_lowered_over_a_resume():
    with wide(overhead_budget=1e-9) as first:
        sampled(first, 80)
        state = first.state_dict()
    with wide(overhead_budget=1e-9) as second:
        second.load_state_dict(state)
        assert all(rows < 300 for rows, _ in sampled(second, 20))


@pytest.mark.parametrize("arguments", [{"overhead_budget": None}, {"every": 1}])
def test_a_run_resumed_at_a_cadence_of_its_own_gets_full_readings(arguments):
    with wide(overhead_budget=1e-9) as first:
        sampled(first, 80)
        state = first.state_dict()
    assert state["lowered"]
    with wide(**arguments) as second:
        second.load_state_dict(state)
        assert all(rows == 1_000 for rows, _ in sampled(second, 20))


def test_the_interval_survives_a_resume():
    with small() as first:
        train(first, 1_024)
        state, weights = first.state_dict(), first._loop.model.state_dict()
    assert state["interval"] == 32
    with small() as second:
        second._loop.model.load_state_dict(weights)
        second.load_state_dict(state)
        train(second, 60)
        assert second.history["rms_t_max"][0].tolist() == [1_025]  # at one step in 16 there would be more


@pytest.mark.parametrize("budget", [0, -0.1, float("nan"), float("inf")])
def test_a_budget_that_is_no_share_is_refused(budget):
    with pytest.raises(ValueError, match=r"use a share such as 0\.01, or None"):
        small(overhead_budget=budget)
