"""The remedies' benchmark: that it measures what its page says, on made-up records and a few real steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from nfi_monitor import Alert, AlertKind, AlertState, Mechanism, Monitor, Phase, Severity
from tests.benchmarks.detection.experiments.trials import NoMonitor
from tests.benchmarks.detection.families import NUMERIC
from tests.benchmarks.remedies import __main__ as command
from tests.benchmarks.remedies import losscost, page, trials
from tests.benchmarks.remedies.matrix import REMEDIES, Case, cases, exchange_loss, has_classes, held_out


def short(name: str, steps: int = 3, **options: Any) -> Case:
    [case] = cases([name])
    return replace(case, family=replace(case.family, steps=steps), **options)


# --- what is tried --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [case.family.name for case in cases()])
def test_held_out_rows_are_of_the_same_task_and_none_of_those_trained_on(name: str) -> None:
    case = short(name)
    training = case.family.build(1, case.family.arm)
    [(inputs, target)] = training.micro_batches(1)
    others, answers = held_out(case.family, 1)
    assert others.shape[1:] == inputs.shape[1:] and len(answers) == len(others) > 50
    seen = {tuple(row.tolist()) for row in inputs}
    assert not any(tuple(row.tolist()) in seen for row in others)
    assert set(answers.tolist()) <= set(range(max(int(target.max()) + 1, 2)))


def test_a_loss_that_is_exchanged_for_itself_changes_nothing_and_for_another_is_the_other() -> None:
    case = short("division-17")
    losses = []
    for exchanged in (None, F.cross_entropy, lambda z, y, **options: 2.0 * F.cross_entropy(z, y)):
        training = case.family.build(0, case.family.arm)
        if exchanged is not None:
            exchange_loss(training, exchanged)
        unmonitored = NoMonitor()
        training.step(1, cast(Monitor, unmonitored))
        losses.append(unmonitored.loss())
    assert losses == [losses[0], losses[0], 2.0 * losses[0]]


def test_what_needs_classes_is_not_tried_on_hinge_and_names_are_those_of_the_package() -> None:
    import nfi_monitor.remedies as package

    for case in cases():
        tried = [remedy for remedy in case.remedies() if remedy.needs_classes]
        assert bool(tried) == has_classes(case.family)
    for remedy in REMEDIES.values():
        for name in remedy.name.partition(" (")[0].split(" + "):
            assert name in (*package.__all__, *package.experimental.__all__)


def test_a_run_from_the_start_an_autopilot_and_a_run_from_an_alarm_leave_their_records() -> None:
    case = short("parity-hinge-95", steps=40)
    start = trials.from_start(trials.Trial(case, 0, "cool_down (for good)", "start"))
    plain = trials.live(trials.Trial(case, 0, trials.PLAIN, "live"))
    flown = trials.live(trials.Trial(case, 0, "Autopilot", "live"))
    assert plain["slingshots"] == start["slingshots"] == [] and plain["loss"] < 1
    assert start["loss"] > plain["loss"], "a tenth of the learning rate"
    assert {key: flown[key] for key in ("loss", "accuracy")} == {
        key: plain[key] for key in ("loss", "accuracy")
    }
    # As if it had been seen to slingshot where it does not: what is gone back to then differs from it.
    claimed = {**plain, "slingshots": [35], "alarms": [{"at risk": None, "imminent": 30}]}
    with pytest.raises(RuntimeError, match=r"not the run that was monitored: \[\], \[35\]"):
        trials.from_alarms(case, 0, ["cool_down"], claimed)


# --- alarms ------------------------------------------------------------------------------------------------


def told(step: int, kind: AlertKind, number: int, **options: Any) -> tuple[int, Alert]:
    alert = Alert(f"{kind}-{number}", kind, Severity.WARNING, AlertState.FIRING, Phase.INFLATING, step, step,
                  Mechanism.NUMERICAL_FEATURE_INFLATION, 0.9)  # fmt: skip
    return step, replace(alert, **options)


def test_an_alarm_is_the_first_since_the_slingshot_before_that_did_not_end_long_ago() -> None:
    over = {"state": AlertState.RESOLVED}
    heard = [
        told(100, AlertKind.AT_RISK, 1, severity=Severity.INFO),
        told(120, AlertKind.IMMINENT, 1),
        told(125, AlertKind.IMMINENT, 1, last_step=125, **over),  # long before: of nothing that came
        told(300, AlertKind.AT_RISK, 1),  # now the feature mean grows
        told(380, AlertKind.IMMINENT, 2),
        told(400, AlertKind.IMMINENT, 2, last_step=400, **over),
        told(450, AlertKind.IMMINENT, 3),
    ]
    first, second = (trials._alarms(heard, [400, 460], index, within=200) for index in (0, 1))
    assert first == {"at risk": 300, "imminent": 380}
    assert second == {"at risk": None, "imminent": 450}
    other = [told(10, AlertKind.AT_RISK, 1, severity=Severity.INFO, mechanism=Mechanism.SECOND_MOMENT)]
    assert trials._alarms(other, [20], 0, within=200)["at risk"] == 10, "there is no warning to wait for"


def test_slingshots_are_counted_by_the_monitors_rule_and_a_loss_that_is_not_finite_is_one() -> None:
    spikes = trials.Spikes(tau=20.0)
    losses = [1e-4] * 60 + [5.0] * 2 + [1e-4] * 60 + [float("nan")]
    for step, loss in enumerate(losses, 1):
        spikes.saw(step, loss)
    assert spikes.starts == [61, 123]


# --- the page ---------------------------------------------------------------------------------------------


def record(slingshots: int, accuracy: float = 0.5, loss: float | None = 1e-6) -> dict[str, Any]:
    return {"slingshots": [7] * slingshots, "loss": loss, "accuracy": accuracy, "weight_norm": 3.0}


def found(remedied: list[dict[str, Any]], averted: list[bool]) -> page.Found:
    """Two slingshots in each plain run; ``remedied`` from the start, ``averted`` at imminent."""
    [case] = cases(["division-17"])
    everything = page.Found()
    for seed, (run, one) in enumerate(zip(remedied, averted, strict=True)):
        spiked = {"at risk": None, "imminent": None if one else 9, "0.5 τ before": 9}
        event = {"start": 8, "spiked_at": spiked, "leads": dict.fromkeys(spiked, 2.0)}
        unwarned = {"start": 9, "spiked_at": dict.fromkeys(spiked, 9), "leads": {}}
        records = {
            "live/nothing": {**record(2), "mechanisms": [NUMERIC]},
            "start/zero_sum_cross_entropy": run,
            "alarms/zero_sum_cross_entropy": {"events": [event, unwarned]},
        }
        everything.add(case, seed, records)
    return everything


@pytest.mark.parametrize(("remedied", "verdict"), [
    ([record(0)] * 2, page.AVERTS), ([record(1)] * 2, page.HELPS), ([record(2)] * 2, page.USELESS),
    ([record(3)] * 2, page.WORSE), ([record(0, loss=0.7)] * 2, page.USELESS),
    ([record(0, loss=None)] * 2, page.USELESS),
])  # fmt: skip
def test_verdicts_come_from_the_counts_and_can_be_read_back_from_the_page(
    remedied: list[dict[str, Any]], verdict: str
) -> None:
    text = page.render(found(remedied, [True, False]), {"torch": "x", "date": "today"})
    words = page.read_verdicts(text)["zero_sum_cross_entropy", NUMERIC]
    assert words == {
        page.START: verdict, "at risk": page.AVERTS, "imminent": page.HELPS, "0.5 τ before": page.USELESS
    }  # fmt: skip
    assert "torch x; date today" in text and "helps: 1 of 2, 2 not warned of" in text


def test_accuracy_that_is_lost_is_told_beside_the_verdict() -> None:
    text = page.render(found([record(0, accuracy=0.4)], [True]), {})
    assert "averts: 2 → 0, at a price: accuracy 50.0% → 40.0%" in text


def test_a_page_without_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No table of verdicts: run python -m tests\.benchmarks\.remedies"):
        page.read_verdicts("# Remedies")


# --- cost and cache ----------------------------------------------------------------------------------------


def test_peak_memory_is_what_was_held_at_once() -> None:
    logits, target = torch.randn(64, 4096, requires_grad=True), torch.zeros(64, dtype=torch.int64)

    def loss(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        (z.detach() + 1.0).sum()  # made and let go before the next
        return (z * 1.0).sum()

    size = logits.numel() * 4
    # z·1 itself (freed by the sum), then the expanded gradient times 1.
    assert size <= losscost.peak(loss, logits, target) < 2.5 * size


def test_peak_memory_counts_the_arrays_of_numpy_as_well() -> None:
    logits, target = torch.randn(64, 256, requires_grad=True), torch.zeros(64, dtype=torch.int64)

    def loss(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z.detach().numpy().repeat(16)
        return z.sum()

    assert losscost.peak(loss, logits, target) >= 16 * logits.numel() * 4


def test_costs_are_ratios_of_paired_passes_and_written_into_a_page_whose_trials_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = page.render(found([record(0)] * 2, [True, False]), {"torch": "x"})
    out = tmp_path / "page.md"
    out.write_text(before)
    cost = losscost.measure(32, 10, seconds=0.0)
    assert all(item["ratio"] == [1.0, 1.0, 1.0] for name, item in cost.items() if name == losscost.BASE)
    assert 0 < cost["zero_sum_cross_entropy"]["ratio"][0] < cost["zero_sum_cross_entropy"]["ratio"][2]
    assert losscost.NOTHING_COMPUTED in cost and losscost.NOTHING_COMPUTED not in losscost.LOSSES
    monkeypatch.setattr(losscost, "SHAPES", ((32, 10),))
    monkeypatch.setattr(losscost, "measure", lambda rows, classes: cost)
    steps = {"ratio": 1.25, "low": 1.2, "high": 1.3}
    monkeypatch.setattr(trials, "step_time", lambda case, remedy: steps)
    arguments = ["--costs", "--families", "division-17", "--cache", str(tmp_path), "--out", str(out)]
    assert command.main(arguments) == 0
    after = out.read_text()
    trials_of, costs_of = (text.partition("## Cost of a step") for text in (before, after))
    assert trials_of[0] == costs_of[0] and after.count("## Cost of") == 2
    assert "| `cool_down` | division-17 | 1.25 (1.20–1.30) |" in after and "Taken 20" in after
    low, middle, high = cost["zero_sum_cross_entropy"]["ratio"]
    assert f"| {middle:.2f} ({low:.2f}–{high:.2f}) |" in after
    assert command.main(arguments) == 0 and out.read_text() == after, "kept, and put where it was"
    with pytest.raises(ValueError, match="No section 'Cost of a step'"):
        page.with_costs("# Remedies", page.Found())


def test_a_trial_that_is_kept_is_not_made_again_and_one_of_other_code_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = short("parity-hinge-95", steps=20, only=("cool_down (for good)",))
    _, _, first, problem = command.runs_of(case, 0, tmp_path)
    assert problem == "" and "start/cool_down (for good)" in first
    assert command.runs_of(case, 1, tmp_path, make=False)[2:] == ({}, "")
    assert "parity-hinge-95-1 has not been run" in command.alarms_of(case, 1, tmp_path)[3]

    def made_again(*args: Any) -> None:
        raise AssertionError("made again")

    for name in ("live", "from_start"):
        monkeypatch.setattr(trials, name, made_again)
    assert command.runs_of(case, 0, tmp_path)[2:] == (first, "")
    monkeypatch.setattr(command, "code_key", lambda: "other")
    assert "made again" in command.runs_of(case, 0, tmp_path)[3]


def test_an_unknown_family_and_no_seed_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (
        (["--families", "nowhere"], "No family nowhere here. Known: division-17"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            command.parse(arguments)
        assert complaint in capsys.readouterr().err
