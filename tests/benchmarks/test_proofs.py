"""The proofs of causes and advice: kicks, actions and the page on made-up input, the rest on tiny runs."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from nfi_monitor import AlertKind, Mechanism, Monitor
from nfi_monitor.detect.advice import ADVICE, advice_for
from tests.benchmarks.detection import setups
from tests.benchmarks.detection.experiments.trials import NoMonitor
from tests.benchmarks.detection.families import EXTERNAL, NUMERIC, SECOND_MOMENT, Family
from tests.benchmarks.detection.proofs import __main__ as command
from tests.benchmarks.detection.proofs import page, trial
from tests.benchmarks.detection.proofs.actions import FLOAT32, Action, first_actions
from tests.benchmarks.detection.proofs.kept import Kept
from tests.benchmarks.detection.proofs.kicks import BOTH, GARBAGE, INPUTS, KINDS, LABELS, RATE, Kick, kicked
from tests.benchmarks.detection.proofs.subjects import Subject, net_of, subjects, unkicked
from tests.benchmarks.detection.training import LogitChange, Training
from tests.spiking import onset

KICKED = {"of": "digits_mlp", "rows": 60, "width": 16, "depth": 1, "lr": 1e-2, "beta2": 0.9}


def losses(training: Training, steps: int) -> list[float]:
    nobody, seen = NoMonitor(), []
    for number in range(1, steps + 1):
        training.step(number, cast(Monitor, nobody))
        seen.append(nobody.loss())
    return seen


# --- kicks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [name for names in KINDS.values() for name in names])
def test_a_kick_changes_its_own_steps_and_the_rate_and_the_data_come_back(what: str) -> None:
    kick = Kick(what, 30, 2, 50.0)
    training = kicked(0, LogitChange(), kick=kick, **KICKED)
    calm = losses(setups.digits_mlp(0, LogitChange(), rows=60, width=16, depth=1, lr=1e-2, beta2=0.9), 32)
    hit = losses(training, 32)
    assert hit[:29] == calm[:29] and hit[29:] != calm[29:]
    assert training.optimizer.param_groups[0]["lr"] == 1e-2
    assert torch.equal(training.micro_batches(29)[0][1], training.micro_batches(32)[0][1])
    assert (30 in kick, 31 in kick, 32 in kick) == (True, True, False) and kick.kind in KINDS


def test_a_bad_batch_has_the_rows_and_labels_that_its_name_says() -> None:
    good = setups.digits_mlp(0, LogitChange(), rows=60, width=16, depth=1).micro_batches(5)[0]
    for what, scaled, permuted in ((LABELS, False, True), (INPUTS, True, False), (BOTH, True, True)):
        training = kicked(0, LogitChange(), kick=Kick(what, 5, 1, 30.0), **KICKED)
        [(inputs, target)] = training.micro_batches(5)
        assert torch.equal(inputs, 30.0 * good[0] if scaled else good[0])
        assert torch.equal(target, good[1]) != permuted
        assert torch.equal(target.sort().values, good[1].sort().values)


def test_an_unkicked_run_is_the_same_training() -> None:
    subject = tiny_kick()
    plain = unkicked(subject).build(0, LogitChange())
    assert losses(plain, 20) == losses(subject.family.build(0, LogitChange()), 20)


# --- advice as actions --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(ADVICE))
@pytest.mark.parametrize("kind", [AlertKind.AT_RISK, AlertKind.IMMINENT])
def test_the_first_advice_of_every_alarm_of_a_mechanism_is_an_action(key: str, kind: AlertKind) -> None:
    if kind not in ADVICE[key]:
        pytest.skip("no such advice")
    lines = advice_for(kind, Mechanism.UNKNOWN, 20.0, keys=[key])
    actions = first_actions(lines)
    # Where something came from outside, the first advice may be to look at the data: nothing to switch on.
    assert actions or key == EXTERNAL or key.startswith("outside")


def test_an_action_has_the_numbers_of_the_line() -> None:
    line = "Multiply it by 0.1: nfi_monitor.remedies.cool_down(optimizer, 0.1, None). Or raise_epsilon."
    assert first_actions((line,)) == (Action("cool_down", (0.1, None)),)
    line = "nfi_monitor.remedies.cool_down(optimizer, 0.1, 40)"
    assert first_actions((line,)) == (Action("cool_down", (0.1, 40)),)
    both = f"{line} and nfi_monitor.remedies.raise_epsilon(optimizer, 1e-5)"
    assert first_actions((both,)) == (Action("cool_down", (0.1, 40)), Action("raise_epsilon", (1e-5,)))
    half = "nfi_monitor.remedies.zero_sum_cross_entropy(logits.float(), target)"
    assert first_actions((half,)) == (Action("zero_sum_cross_entropy", (FLOAT32,)),)
    clip = "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"
    assert first_actions((f"Clip: {clip}.",)) == (Action("clip_grad_norm_", (1.0,)),)
    assert first_actions(("criterion(logits.double(), target)",)) == (Action("float64_cross_entropy"),)
    assert first_actions(("Look at the batch.",)) == () == first_actions(())


@pytest.mark.parametrize(
    "action",
    [
        Action("zero_sum_cross_entropy"), Action("float64_cross_entropy"), Action("cool_down", (0.1, None)),
        Action("raise_epsilon", (1e-5,)), Action("project_zero_sum"), Action("clip_grad_norm_", (0.1,)),
    ],
)  # fmt: skip
def test_an_action_changes_the_training_from_the_next_step_on(action: Action) -> None:
    make = partial(setups.modular_mlp, 0, LogitChange(), p=7, width=16, depth=1, lr=1e-2)
    plain, remedied = make(), make()
    losses(plain, 30)
    losses(remedied, 30)
    action.apply(remedied)
    assert losses(plain, 2)[0] == pytest.approx(losses(remedied, 2)[0])
    ends = [torch.cat([p.detach().flatten() for p in each.model.parameters()]) for each in (plain, remedied)]
    assert not torch.equal(*ends)


# --- tiny runs ------------------------------------------------------------------------------------------


def tiny_kick() -> Subject:
    kick = Kick(RATE, 150, 1, 300.0)
    family = Family("digits-full-batch-tiny", partial(kicked, kick=kick, **KICKED), 210, (0,), EXTERNAL)
    return Subject(EXTERNAL, family, 0, kick)


def test_a_kicked_run_rises_only_with_its_kick(tmp_path: Path) -> None:
    kick = Kick(RATE, 70, 5, 100.0)
    family = Family("digits-full-batch-x", partial(kicked, kick=kick, **KICKED), 135, (0,), EXTERNAL)
    record = trial.prove(Subject(EXTERNAL, family, 0, kick), Kept(tmp_path))
    found = record["external"]
    assert found["rises"] and found["clean"] and found["kick"] == "rate jump"
    assert found["net"] == "digits-full-batch" and record["steps"] == 135 and 0 < record["read"] <= 135
    assert found["replay"] is None or found["replay"]["reproduced"]


def test_a_loss_has_risen_after_two_readings_in_a_row() -> None:
    assert not trial._rises([0.1, 9.0, 0.1, 9.0], 0.1)
    assert trial._rises([0.1, 9.0, math.nan], 0.1)
    assert not trial._rises([0.04, 0.04], 1e-9), "below a twentieth of a nat"


@pytest.fixture(scope="module")
def numeric() -> Subject:
    """A run that ends right after its first slingshot."""
    make = partial(setups.modular_mlp, p=13, width=48, beta2=0.9, lr=3e-3)
    for seed in range(20):
        if (start := onset(losses(make(seed, LogitChange()), 650))) is not None:
            return Subject(NUMERIC, Family("tiny", make, start + 33, (seed,), NUMERIC), seed)
    raise AssertionError("of 20 seeds none slingshots by step 650")


def test_a_slingshot_is_replayed_and_averted_by_the_first_advice_and_its_warning_confirmed(
    numeric: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(tmp_path)
    record = trial.prove(numeric, kept)
    [event] = record["events"]
    assert event["named"] == NUMERIC and page.truth_of(event) == NUMERIC and event["replay"]["reproduced"]
    alarm = event["imminent"] or event["first"]
    assert alarm["action"] == "zero_sum_cross_entropy() + raise_epsilon(1e-05)"
    assert alarm["spiked_at"] is None and alarm["averted"] and alarm["in_reach"]
    assert record["twins"] and all(twin["confirmed"] for twin in record["twins"])
    assert page.in_a_line(record).startswith("read ")

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("it is kept")

    monkeypatch.setattr(trial, "hear", forbidden)
    assert trial.prove(numeric, kept) == record
    with pytest.raises(AssertionError, match="kept"):
        trial.prove(replace(numeric, seed=99), kept)


def test_a_twin_that_differs_no_more_than_by_chance_confirms_nothing() -> None:
    norms = {"start": 1.0, "run": 2.0, "float64": 1.5, "nudged": 1.99}
    assert trial._grows_less(norms, 1e-3)["confirmed"]
    assert not trial._grows_less({**norms, "nudged": 1.4}, 1e-3)["confirmed"]
    assert not trial._grows_less({**norms, "float64": 2.1}, 1e-3)["confirmed"]
    assert not trial._grows_less({**norms, "float64": math.nan}, 1e-3)["confirmed"]


# --- subjects, page, command ------------------------------------------------------------------------------


def test_there_are_enough_kicks_of_every_kind_and_names_are_unique() -> None:
    found = subjects()
    assert len({subject.name for subject in found}) == len(found)
    kicks = [subject for subject in found if subject.kick is not None]
    for kind in KINDS:
        own = [subject for subject in kicks if subject.kick is not None and subject.kick.kind == kind]
        assert len(own) >= 20 and len({net_of(subject) for subject in own}) >= 5
    assert GARBAGE in {subject.kick.what for subject in kicks if subject.kick is not None}


def test_a_loss_in_float32_is_one_without_the_cast() -> None:
    training = setups.modular_mlp(0, LogitChange("float16"), p=7, width=16, depth=1)
    Action("zero_sum_cross_entropy").apply(training)
    assert training.arm.loss_dtype == "float16"
    Action("zero_sum_cross_entropy", (FLOAT32,)).apply(training)
    assert training.arm.loss_dtype is None
    assert all(math.isfinite(loss) for loss in losses(training, 3))


def event(named: str, truth: str, *, averted: bool = True, in_reach: bool = True) -> dict[str, Any]:
    alarm = {
        "step": 90,
        "lead": 0.5,
        "action": "x()",
        "spiked_at": None if averted else 100,
        "averted": averted,
        "in_reach": in_reach,
    }
    replay = {"mechanism": truth, "reproduced": True, "reasons": ["unchanged", "an arm averts it"]}
    return {"start": 100, "named": named, "replay": replay, "first": alarm, "imminent": None}


def test_the_page_counts_agreement_by_replay_and_lists_what_disagrees() -> None:
    run = {"kind": NUMERIC, "family": "f", "seed": 3, "tau": 20.0, "steps": 200, "read": 50, "warned": []}
    events = [event(NUMERIC, NUMERIC), event("unknown", NUMERIC, averted=False), event(NUMERIC, "unknown"),
              event("none", SECOND_MOMENT)]  # fmt: skip
    grown = {"confirmed": False, "run": 0.1}
    twin = {"step": 5, "confirmed": False, "slingshot": None, "float64_averts": None}
    twins = [{**twin, "feature_mean": grown, "weight_norm": grown}]
    made = page.sheets([{**run, "events": events, "twins": twins}])
    rows = {row[0]: row[2:] for row in made[0].rows}
    assert rows["mechanism, numerical feature inflation"][0].startswith("0.500: 1/2")
    assert rows["mechanism, second moment, edge of stability"] == ["–", "not measured"]
    assert rows["averted from the first alarm on, numeric"][0].startswith("0.500: 1/2")
    assert rows["at risk confirmed by the float64 twin"][1] == "**no**"
    said = [row[1] for row in made[-1].rows]
    assert said == ["named unknown", "not averted (first)", "named none", "warning not confirmed"]
    assert "f-3 at 100" in page.page(made, 1, 2) and "1 of 2 runs" in page.page(made, 1, 2)


def test_the_page_says_how_many_slingshots_no_advice_can_avert_any_more() -> None:
    run = {"kind": NUMERIC, "family": "f", "seed": 3, "tau": 20.0, "steps": 200, "read": 50, "warned": []}
    events = [event(NUMERIC, NUMERIC), event(NUMERIC, NUMERIC, averted=False, in_reach=False)]
    made = page.sheets([{**run, "events": events}])
    rows = {row[0]: row[2:] for row in made[0].rows}
    said, reached = rows["averted from the first alarm on, numeric"]
    assert said.startswith("0.500: 1/2") and "1 come even if training stops at the alarm" in said
    assert "of the others 1/1" in said and reached == "**no**", "the target counts all of them"
    assert "as if training had stopped" in made[-1].rows[0][2]


def test_the_command_makes_so_many_runs_and_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [replace(tiny_kick(), seed=seed) for seed in (0, 1)]
    monkeypatch.setattr(command, "subjects", lambda: both)
    options = ["--cache", str(tmp_path / "kept"), "--out", str(tmp_path / "PROOFS.md")]
    assert command.main([*options, "--limit", "1"]) == 0
    assert "0 of 2 runs are kept" in capsys.readouterr().out
    assert "1 of 2 runs were made" in (tmp_path / "PROOFS.md").read_text(encoding="utf-8")
    assert command.main([*options, "--part", "1/2"]) == 0
    assert "1 of 1 runs are kept" in capsys.readouterr().out
    monkeypatch.setattr(command, "prove", lambda *_: 1 / 0)
    assert command.main(options) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--part", "3/2"])
