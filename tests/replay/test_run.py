"""Replays: exact, without a trace in the run, and right about causes that are known."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import (
    Alert,
    AlertKind,
    AlertState,
    Autopilot,
    Monitor,
    MonitorError,
    Phase,
    Severity,
    Snapshot,
)  # fmt: skip
from nfi_monitor.cli import main
from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.spike import SpikeDetector
from nfi_monitor.remedies import cool_down, project_zero_sum
from nfi_monitor.replay.run import (
    ARMS,
    AS_IT_WAS,
    FLOAT64_LOSS,
    LARGER_EPS,
    LR_HELD,
    OTHER_DATA,
    SMALLER_LR,
    ZERO_SUM,
    Arm,
    ArmContext,
    larger_eps,
    replay,
)
from nfi_monitor.report.run_directory.reader import read_run
from nfi_monitor.types import Mechanism, Thresholds
from tests.replay.scene import Run
from tests.runs import batch, differences, mlp

# --- exact ----------------------------------------------------------------------------------------


def test_the_replay_of_the_run_as_it_was_is_the_run_to_the_last_bit() -> None:
    run = Run()
    run.go(20)
    taken = run.take()
    run.go(50)
    run.model.eval()  # where most loops end; step_fn need not know
    verdict = run.replay(taken, [AS_IT_WAS], steps=30)
    assert not run.model.training
    assert verdict.reproduced is True
    assert list(verdict.outcomes["as_it_was"].losses) == [run.losses[step] for step in range(21, 51)]
    assert verdict.mechanism is Mechanism.UNKNOWN
    assert verdict.reasons == (
        "the slingshot did not happen again: the unchanged run has none in the 30 steps after step 20",
    )


def cooled(run: Run) -> None:
    cool_down(run.optimizer, 0.1, steps=50)


def projected(run: Run) -> None:
    project_zero_sum(run.model[-1])


def piloted(run: Run) -> None:
    assert run.pilot is not None
    run.pilot(
        Alert("at_risk-1", AlertKind.AT_RISK, Severity.WARNING, AlertState.FIRING, Phase.INFLATING, 25, 25,
              Mechanism.NUMERICAL_FEATURE_INFLATION, 0.9)
    )  # fmt: skip


@pytest.mark.parametrize("remedy", [cooled, projected, piloted])
@pytest.mark.parametrize("taken_at", [20, 30])
def test_a_remedy_acts_in_a_replay_where_it_did_in_the_run_and_is_not_used_up(
    remedy: Callable[[Run], None], taken_at: int
) -> None:
    def gone(*, replayed: bool) -> Run:
        run = Run()
        run.pilot = Autopilot()
        monitor = Monitor(
            run.model,
            run.optimizer,
            console=False,
            stateful=[run.scheduler],
            on_alert=run.pilot,
            snapshots=False,
        )
        taken = []
        with monitor:
            for step in (20, 25, 30, 40):
                run.go(step)
                if step == taken_at:
                    taken.append(run.take())
                if step == 25:
                    remedy(run)
            if replayed:
                verdict = run.replay(taken[0], [AS_IT_WAS], steps=60)
                assert verdict.reproduced is True
            run.go(80)
        return run

    assert gone(replayed=True).losses == gone(replayed=False).losses


def test_a_cool_down_of_which_nobody_knows_since_when_is_refused_by_name() -> None:
    run = Run()
    run.go(5)
    taken = run.take()
    cooling = cool_down(run.optimizer, 0.1, steps=50)
    with pytest.raises(MonitorError, match=r"A cool_down\(\.\.\.\) of this optimizer began .*undo\(\)"):
        run.replay(taken, [], steps=5)
    cooling.undo()
    run.replay(taken, [], steps=5)


def test_a_run_that_is_not_reproduced_is_said_to_be_so_and_why() -> None:
    run = Run()
    run.go(20)
    taken = Snapshot.take(20, run.model, run.optimizer)  # the scheduler is forgotten
    run.go(40)
    verdict = run.replay(taken, [], steps=20, stateful=[])
    assert verdict.reproduced is False
    assert "the scheduler is not among stateful=" in verdict.reasons[-1]
    assert run.replay(run.take(), [], steps=2).reproduced is None, "nothing recorded, nothing to compare"


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_after_a_replay_everything_is_as_it_was(arm: Arm) -> None:
    run = Run(spike_at=70)
    run.go(60)
    taken = run.take()
    run.go(75)
    before = run.state()
    verdict = run.replay(taken, [arm])
    assert verdict.spiked_at == 70 and len(verdict.outcomes) == (1 if arm is AS_IT_WAS else 2)
    assert differences(run.state(), before) == []


def test_training_on_after_a_replay_is_training_on_without_one() -> None:
    ends = []
    for replayed in (False, True):
        run = Run(spike_at=70)
        run.go(60)
        taken = run.take()
        run.go(75)
        if replayed:
            assert len(run.replay(taken).outcomes) == len(ARMS)
        run.go(90)
        ends.append(run.state())
    assert differences(*ends) == []


def test_a_step_that_fails_in_an_arm_leaves_the_run_as_it_was() -> None:
    run = Run(spike_at=70)
    run.go(60)
    taken = run.take()
    run.go(75)
    before = run.state()

    def step(number: int) -> Tensor:
        if run.optimizer.param_groups[0]["eps"] > 1e-7 and number == 64:
            run.model.eval()
            raise IndexError("no batch 64")
        return run.step(number)

    with pytest.raises(
        MonitorError, match=r"'larger_eps' failed at step 64: IndexError: no batch 64. .*Leave"
    ):
        replay(
            taken,
            step,
            model=run.model,
            optimizer=run.optimizer,
            stateful=[run.scheduler],
            recorded=run.losses,
        )
    assert differences(run.state(), before) == []


# --- right ----------------------------------------------------------------------------------------


def test_a_slingshot_of_rounding_is_averted_by_float64_and_by_the_zero_sum() -> None:
    """Modular division a/b mod 23 as in the demo: the loss leaves its floor near step 900."""
    p = 23
    torch.manual_seed(0)
    a, b = (g.flatten() for g in torch.meshgrid(torch.arange(p), torch.arange(1, p), indexing="ij"))
    inverse = torch.tensor([0, *(pow(k, -1, p) for k in range(1, p))])
    x, y = torch.cat([F.one_hot(a, p), F.one_hot(b, p)], dim=1).float(), a * inverse[b] % p
    rows = torch.randperm(len(y))[: len(y) // 2]
    x, y = x[rows], y[rows]
    sizes = [2 * p, 128, 128, 128]
    hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(128, p))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))

    def step_fn(step: int) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        return loss

    detector, losses, taken = SpikeDetector(), {}, []
    step = 0
    while detector.state == "quiet":
        step += 1
        losses[step] = step_fn(step).item()
        detector.update(step, losses[step], 20.0, Thresholds())
        if step % 25 == 0:
            taken = [*taken[-4:], Snapshot.take(step, model, optimizer, [warm_up], detector.state_dict())]
        assert step < 1500
    early = [s for s in taken if s.step <= detector.start - 40][-1]
    arms = (FLOAT64_LOSS, ZERO_SUM, LR_HELD, LARGER_EPS)
    verdict = replay(
        early, step_fn, arms, model=model, optimizer=optimizer, stateful=[warm_up], recorded=losses
    )
    spiked = {name: outcome.spiked_at for name, outcome in verdict.outcomes.items()}
    assert verdict.reproduced is True and spiked["as_it_was"] == detector.start
    assert spiked["float64_loss"] is None and spiked["zero_sum"] is None and "larger_eps" in spiked
    assert verdict.mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION
    assert not verdict.outcomes["lr_held"].applied, "the rate was constant: holding it changes nothing"
    assert "had no effect: lr held" in verdict.reasons
    assert verdict.outcomes["float64_loss"].steps == detector.start - early.step + 40


def kicked(
    lr_of: Callable[[int], float],
    batch_of: Callable[[int], tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Any:
    """Train on one batch to a small loss, with a kick at step 160; returns the replay from step 140."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.9))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_of(step + 1))

    def step_fn(step: int) -> Tensor:
        inputs, targets = batch_of(step)
        optimizer.zero_grad()
        loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    losses = {}
    for step in range(1, 181):
        losses[step] = step_fn(step).item()
        if step == 140:
            taken = Snapshot.take(step, model, optimizer, [scheduler])
    assert losses[158] < 1e-2 and max(losses[step] for step in range(159, 181)) > 0.5
    return replay(
        taken, step_fn, model=model, optimizer=optimizer, stateful=[scheduler], recorded=losses, steps=40
    )


def test_a_kick_of_the_learning_rate_is_averted_by_holding_it() -> None:
    # A squared error: along the gradient of a separated batch a giant step only widens the margins.
    def squared(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, F.one_hot(targets, 7).float())

    verdict = kicked(lambda step: 100.0 if step == 160 else 1.0, lambda step: batch(), squared)
    assert verdict.reproduced is True and verdict.spiked_at == 161
    assert verdict.mechanism is Mechanism.EXTERNAL
    assert "lr held averts it: the learning-rate schedule is the cause" in verdict.reasons
    assert verdict.outcomes["float64_loss"].spiked_at == verdict.spiked_at


def test_a_bad_batch_is_averted_by_other_data() -> None:
    inputs, targets = batch()

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        return (30 * inputs, (targets + 1) % 7) if step in (160, 161) else (inputs, targets)

    verdict = kicked(lambda step: 1.0, batch_of)
    assert verdict.reproduced is True
    assert verdict.mechanism is Mechanism.EXTERNAL
    assert "other data averts it: these steps' batches are the cause" in verdict.reasons


def test_the_rate_that_is_held_is_that_of_the_snapshots_own_step() -> None:
    """A schedule that kicks right after the snapshot has already set the rate when it is completed."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inside = Snapshot.take(1, model, optimizer)
    optimizer.param_groups[0]["lr"] = 50.0
    taken, used = inside.completed(optimizer), []

    def step_fn(step: int) -> float:
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        hook = optimizer.register_step_post_hook(lambda opt, *_: used.append(opt.param_groups[0]["lr"]))
        optimizer.step()
        hook.remove()
        used.append(optimizer.param_groups[0]["lr"])
        return 1.0

    context = ArmContext(model, optimizer, None, taken, 1)
    seen = []
    with LR_HELD.change(context):
        optimizer.register_step_pre_hook(lambda opt, *_: seen.append(opt.param_groups[0]["lr"]))
        step_fn(2)
    assert seen == [0.5] and used[-1] == 50.0


# --- errors ---------------------------------------------------------------------------------------


def test_what_step_fn_has_to_do_is_said() -> None:
    run = Run()
    run.go(3)
    taken = run.take()
    given = {"model": run.model, "optimizer": run.optimizer, "stateful": [run.scheduler], "steps": 30}
    for bad, message in (
        (
            None,
            r"needs a function, got NoneType. step_fn\(step\) has to do one whole .*trainer.training_step",
        ),
        (lambda step: None, r"returned NoneType, not a loss. step_fn\(step\) has to"),
        (lambda step: 1.0, "made no step of the given optimizer"),
        (lambda step: [run.step(step), run.step(step)][0], r"step_fn\(4\) made 2 optimizer steps"),
    ):
        with pytest.raises(MonitorError, match=message):
            replay(taken, bad, **given)
    with pytest.raises(ValueError, match="Two arms have the same name"):
        replay(taken, run.step, [larger_eps(1e-6), larger_eps(1e-5)], **given)
    with pytest.raises(ValueError, match="at least 1 step"):
        replay(taken, run.step, **{**given, "steps": 0})


@pytest.mark.parametrize(("betas", "tau"), [({}, 100), ({"betas": (0.9, 0.95)}, 20)])
def test_without_betas_a_replay_takes_the_tau_that_the_monitor_takes(betas: Any, tau: int) -> None:
    model = nn.Linear(3, 2)
    kind: Any = torch.optim.AdamW if betas else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=1e-3, **betas)
    with Monitor(model, optimizer, console=False) as monitor:
        assert monitor.tau == pytest.approx(tau)
    made: list[int] = []

    def step_fn(step: int) -> float:
        made.append(step)
        optimizer.step()
        return 1.0

    replay(Snapshot.take(0, model, optimizer), step_fn, [], model=model, optimizer=optimizer)
    assert len(made) == pytest.approx(max(10 * tau, 200), abs=1)


def test_a_loss_that_is_not_finite_counts_as_a_slingshot() -> None:
    run = Run()
    run.go(3)
    taken = run.take()

    def step_fn(step: int) -> float:
        run.step(step)
        return float("nan") if step == 8 else 1.0

    verdict = replay(
        taken, step_fn, [], 20, model=run.model, optimizer=run.optimizer, stateful=[run.scheduler]
    )
    assert verdict.spiked_at == 8


# --- the monitor ----------------------------------------------------------------------------------


@pytest.fixture
def always_at_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Detector, "at_risk", property(lambda self: True))


def watched(to: int, run_dir: Path | None = None, **options: Any) -> tuple[Run, Monitor]:
    run = Run(spike_at=100)
    run.monitor = Monitor(
        run.model,
        run.optimizer,
        **{"console": False, "run_dir": run_dir, "stateful": [run.scheduler], **options},
    )
    run.go(to)
    return run, run.monitor


@pytest.mark.usefixtures("always_at_risk")
def test_the_monitor_keeps_snapshots_until_the_slingshot_and_trains_alike() -> None:
    run, monitor = watched(130)
    assert [s.step for s in monitor.snapshots] == [21, 41, 61, 81]
    monitor.close()
    assert [s.step for s in monitor.snapshots] == [21, 41, 61, 81]
    plain = Run(spike_at=100)
    plain.go(130)
    assert differences(plain.state() | {"hooks": 0}, run.state() | {"hooks": 0}) == []


@pytest.mark.usefixtures("always_at_risk")
def test_what_the_second_moment_had_forgotten_is_known_whoever_took_the_snapshot() -> None:
    run, monitor = watched(60)
    steps, decays = monitor.history["second_moment_decay"]
    known = dict(zip(steps.tolist(), decays.tolist(), strict=True))
    assert all(kept.second_moment_decay == pytest.approx(known[kept.step]) for kept in monitor.snapshots)
    assert monitor.take_snapshot().second_moment_decay == pytest.approx(decays[-1])
    assert decays[-1] < 0
    own = Snapshot.take(60, run.model, run.optimizer, [run.scheduler])
    run.go(110)
    seen: list[float] = []

    @contextmanager
    def look(context: ArmContext) -> Iterator[None]:
        seen.append(context.snapshot.second_moment_decay)
        yield

    monitor.replay(run.step, [Arm("look", "what is known", look)], snapshot=own)
    monitor.close()
    assert seen == [pytest.approx(known[60])]


@pytest.mark.usefixtures("always_at_risk")
def test_going_back_to_a_checkpoint_drops_the_snapshots_of_what_will_not_have_been() -> None:
    run, monitor = watched(30)
    state = monitor.state_dict()
    run.go(70)
    assert monitor.snapshots
    monitor.load_state_dict(state)
    assert monitor.snapshots == []
    run.go(80)  # at step 40 again, and sooner than 2 τ after the last one that was dropped
    assert [kept.step for kept in monitor.snapshots] == [31]
    monitor.close()


@pytest.mark.usefixtures("always_at_risk")
def test_a_replay_leaves_no_trace_in_the_monitor() -> None:
    run, monitor = watched(110)
    before = (monitor.state_dict(), len(monitor.history), monitor.step, monitor.notes, monitor.phases[:])
    verdict = monitor.replay(run.step, [FLOAT64_LOSS, OTHER_DATA])
    after = (monitor.state_dict(), len(monitor.history), monitor.step, monitor.notes, monitor.phases[:])
    assert json.dumps(after, default=str) == json.dumps(before, default=str)
    assert "snapshots" not in monitor.state_dict()
    assert (verdict.snapshot_step, verdict.spiked_at, verdict.reproduced) == (61, 100, True)
    assert verdict.slingshot == "slingshot-1"
    assert verdict.outcomes["float64_loss"].steps == 101 - 61  # a slingshot needs a second high loss
    run.go(115)
    assert monitor.step == 115
    monitor.close()


@pytest.mark.usefixtures("always_at_risk")
def test_training_on_after_the_monitors_replay_is_training_on_without_one() -> None:
    ends = []
    for replayed in (False, True):
        run, monitor = watched(110)
        if replayed:
            monitor.replay(run.step, [FLOAT64_LOSS, SMALLER_LR])
        run.go(130)
        ends.append((run.state(), monitor.state_dict()))
        monitor.close()
    assert differences(*ends) == []


@pytest.mark.usefixtures("always_at_risk")
def test_the_verdict_is_on_disk_and_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, monitor = watched(110, tmp_path / "run")
    verdict = monitor.replay(run.step, [SMALLER_LR])
    said = str(monitor.summary())
    monitor.close()
    record = read_run(tmp_path / "run")
    assert record.problems == []
    assert [v.to_json() for v in record.replays] == [verdict.to_json()]
    with open(tmp_path / "run" / "replays.jsonl", "a") as file:
        file.write('{"snapshot_step": 3}\n{"torn')
    assert main(["report", str(tmp_path / "run"), "--no-figure"]) == 0
    printed = capsys.readouterr().out
    for text in (said, printed):
        flat = " ".join(text.split())
        assert re.search("slingshot-1, from step 61 · monitor: .{5,40} · replay: mechanism not clear", flat)
        assert "unchanged, the run has the slingshot at step 100" in flat
        assert "as it was: step 100, smaller lr: no difference" in flat
        assert "the original losses were reproduced to the last bit" in flat
    assert "replays.jsonl: skipped 1 torn line" in printed and "cannot read: 'outcomes'" in printed
    assert main(["report", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["replays"][0]["arms"][1]["arm"] == "smaller_lr"


def test_without_a_snapshot_the_monitor_says_what_to_do() -> None:
    run, monitor = watched(30, snapshots=False)
    with pytest.raises(
        MonitorError, match=r"takes no snapshots \(snapshots=False or 0\). Pass snapshots=<bytes> to Monitor"
    ):
        monitor.replay(run.step)
    with pytest.raises(MonitorError, match=r"needs a function, got Trainer.*HuggingFace Trainer"):
        monitor.replay(type("Trainer", (), {})())  # type: ignore[arg-type]
    monitor.close()
    with pytest.raises(MonitorError, match=r"closed monitor .*nfi_monitor.replay.replay\(snapshot"):
        monitor.replay(run.step)
    run, monitor = watched(30)
    with pytest.raises(MonitorError, match="when an at-risk alert begins; no such alert began"):
        monitor.replay(run.step)
    monitor.close()


@pytest.mark.usefixtures("always_at_risk")
def test_snapshots_only_after_the_slingshot_are_no_help_and_named() -> None:
    run, monitor = watched(110)
    monitor._loop.recent_snapshots._kept.clear()
    monitor._loop.recent_snapshots.take(110, None)
    monitor._loop.recent_snapshots.complete()
    with pytest.raises(
        MonitorError, match="the monitor's snapshots are of steps 110–110, after the slingshot began"
    ):
        monitor.replay(run.step)
    monitor.close()


@pytest.mark.usefixtures("always_at_risk")
def test_a_ring_that_fails_or_is_too_small_is_a_note_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    _, monitor = watched(30, snapshots=1000)
    assert [note.code for note in monitor.notes if "snapshots" in note.code] == ["no_snapshots"]
    monitor.close()

    def broken(*_: Any, **__: Any) -> Snapshot:
        raise MemoryError("no memory left")

    monkeypatch.setattr(Snapshot, "take", broken)
    _, monitor = watched(60)
    notes = [note for note in monitor.notes if note.code == "failed_snapshots"]
    assert len(notes) == 1 and "MemoryError: no memory left" in notes[0].message
    assert monitor.step == 60 and monitor.snapshots == []
    monitor.close()


def test_bad_arguments_of_the_ring_are_refused() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    for bad in (True, -1, "all", 1.5):
        with pytest.raises(ValueError, match='use "auto", False, or bytes'):
            Monitor(model, optimizer, snapshots=bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="stateful holds a int"):
        Monitor(model, optimizer, stateful=[3])
