from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from rich.console import Console

from nfi_monitor.cli import main
from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.history import History
from nfi_monitor.report.explain.compose import explain, explain_run
from nfi_monitor.report.explain.explanation import Explanation, Seen
from nfi_monitor.report.explain.signal_history import SignalHistory
from nfi_monitor.report.run_directory.reader import read_run
from nfi_monitor.report.wording import headline
from nfi_monitor.types import (
    Alert,
    AlertKind,
    AlertState,
    Mechanism,
    Note,
    Outcome,
    Phase,
    Reading,
    Thresholds,
)
from tests.detect.series import numeric_slingshot, oscillation, second_moment_slingshot
from tests.detect.test_detector import steep_kick
from tests.detect.test_precursors import behind_a_layer_norm, long_memory
from tests.spiking import Recorded

NUMERIC = RunContext(beta2=0.95, layer="head")
HINGE = RunContext(beta2=0.999, decoupled_decay=True, no_classes=True)


class Run:
    """A detector's run over readings, recorded as a monitor records it."""

    def __init__(
        self, readings: Iterable[Reading], context: RunContext, notes: tuple[Note, ...] = ()
    ) -> None:
        self.context, self.notes = context, notes
        self.history, self.phases = History(), [(0, Phase.HEALTHY)]
        detector = Detector(None, context)
        for reading in readings:
            verdict = detector.update(reading)
            self.history.append(reading.step, {**reading.values, **verdict.derived})
            if verdict.phase is not self.phases[-1][1]:
                self.phases.append((reading.step, verdict.phase))
        self.alerts = {alert.id: alert for alert in detector.alerts}

    def explain(self, alert: str | Alert) -> Explanation:
        found = self.alerts[alert] if isinstance(alert, str) else alert
        return explain(found, self.history, self.phases, Thresholds(), self.context, self.notes)


def rich_numeric(until: int = 600, every: int = 1) -> Iterable[Reading]:
    """The synthetic numeric slingshot with everything else measured, and quiet."""
    for r in numeric_slingshot(100, 400, every=every):
        if r.step <= until:
            rest = {
                "secant_curvature": 1.5,
                "gradient_alignment": 0.9,
                "feature_displacement": 0.01,
                "learning_rate": 1e-3,
                "predicted_reduction": 0.1 * r.get("loss"),
            }
            yield Reading(r.step, {**r.values, **rest})


def at(explanation: Explanation, quantity: str) -> int | None:
    (step,) = [f.at for f in explanation.findings if f.quantity == quantity and f.seen is Seen.CROSSED]
    return step


def line(explanation: Explanation, what: str) -> str:
    return dict(explanation.lines()).get(what, "")


def test_an_explanation_reads_like_this() -> None:
    run = Run(rich_numeric(until=300), NUMERIC)
    alert = replace(run.alerts["imminent-1"], steps_to_spike=(27, 54, 109), advice=("Do this.", "Or that."))
    assert str(run.explain(alert)) == (
        "imminent-1, since step 255 (numerical feature inflation, confidence 95%).\n"
        "Steps searched: steps 134–300, since the run was last healthy.\n"
        "Crossed: smoothed zero-sum violation rose above 0.1 at step 135 (0.103 then, 0.582 when the alert "
        "began, 0.697 now); growth of ‖μ_G‖ rose above 5% per τ at step 170 (5.05% per τ then, 12% per τ "
        "when the alert began, 12% per τ now); logit displacement δ rose above "
        "0.201 nat at step 255 (0.203 nat then, 0.642 nat now).\n"
        "Did not cross: sqrt(v) against its maximum stayed above 50% (smallest 100%); RMS_t, averaged, "
        "stayed above 0.5 (smallest 1); gradient alignment stayed above -0.4 (smallest 0.9); RMS_t stayed "
        "below 2.3 (largest 1); secant curvature stayed below 38 (largest 1.5); feature displacement stayed "
        f"below {Thresholds().swing_displacement} nat (largest 0.01 nat); predicted reduction "
        "over loss stayed below 4 (largest 0.1); the learning rate did not change; "
        "neither the loss nor a gradient nor a weight was NaN or Inf; the loss did not rise far above "
        "its usual level while the alert fired (largest 1e-07).\n"
        "What follows: A slingshot is expected: ≈ 54 steps left (27–109), counted from step 300.\n"
        "What to do: Do this."
    )


def test_what_crossed_when_agrees_with_the_detectors_own_switches(spiking_run: Recorded) -> None:
    """The reference: an alert begins, and a phase is entered, at the step at which its quantity crosses."""
    synthetic = Run(rich_numeric(), NUMERIC)
    phases = {phase: step for step, phase in reversed(synthetic.phases)}
    for name in ("imminent-1", "slingshot-1"):
        explanation = synthetic.explain(name)
        assert at(explanation, "zero_sum_violation_smoothed") == synthetic.alerts["at_risk-1"].first_step
        assert at(explanation, "feature_mean_growth") == phases[Phase.INFLATING]
        assert at(explanation, "logit_displacement") == phases[Phase.IMMINENT]
    monitor = spiking_run.monitor
    absorbed = spiking_run.alert(AlertKind.AT_RISK).first_step
    assert at(monitor.explain("slingshot-1"), "zero_sum_violation_smoothed") == absorbed
    assert at(monitor.explain("at_risk-1"), "zero_sum_violation_smoothed") == absorbed


def test_values_at_the_beginning_are_those_of_the_alerts_own_evidence(spiking_run: Recorded) -> None:
    monitor = spiking_run.monitor
    alert = spiking_run.alert(AlertKind.IMMINENT)
    found = {f.quantity: f for f in monitor.explain(alert).findings if f.quantity != "rms_t_max"}
    for name in ("zero_sum_violation_smoothed", "logit_displacement"):
        assert found[name].began == alert.evidence[name].value
    growth = alert.evidence["feature_mean_growth"].value * spiking_run.context.tau
    assert found["feature_mean_growth"].began == growth


def test_where_readings_are_sampled_a_crossing_lies_between_two_steps() -> None:
    run = Run(rich_numeric(every=4), NUMERIC)
    assert "zero-sum violation rose above 0.1 between steps 129 and 133" in str(run.explain("imminent-1"))


def test_a_value_that_wavers_around_its_threshold_has_crossed_it_once() -> None:
    def wavering() -> Iterable[Reading]:
        for r in rich_numeric(until=390):
            dip = 160 <= r.step < 200 and r.step // 20 % 2
            violation = 0.06 if dip else r.values["zero_sum_violation"]
            yield Reading(r.step, {**r.values, "zero_sum_violation": violation})

    run = Run(wavering(), NUMERIC)
    assert at(run.explain("at_risk-1"), "zero_sum_violation_smoothed") == run.alerts["at_risk-1"].first_step


def test_a_quantity_that_came_back_is_said_to_have() -> None:
    def flickering() -> Iterable[Reading]:
        for r in rich_numeric(until=300):
            curvature = 90.0 if 200 <= r.step < 205 else 1.5
            yield Reading(r.step, {**r.values, "secant_curvature": curvature})

    text = line(Run(flickering(), NUMERIC).explain("imminent-1"), "Also crossed")
    assert text == "secant curvature rose above 38 at step 200 (largest 90, back below at step 205)."


def test_a_slingshots_cause_is_held_against_the_levels_it_was_named_by() -> None:
    explanation = Run(steep_kick(), HINGE).explain("slingshot-1")
    assert "secant curvature rose above 9.5 at step 2,500" in line(explanation, "Also crossed")
    assert "RMS_t rose above 1.3 at step 2,500" in line(explanation, "Crossed")
    assert "curvature" not in line(explanation, "Did not cross")


def test_a_loss_that_never_came_back_is_not_said_to_be_back() -> None:
    def stays() -> Iterable[Reading]:
        return (Reading(step, {"loss": 1e-3 if step < 201 else 2.3}) for step in range(1, 900))

    run = Run(stays(), NUMERIC)
    alert, explanation = run.alerts["slingshot-1"], run.explain("slingshot-1")
    assert alert.state is AlertState.RESOLVED
    after = alert.to_json()["evidence"]["loss_afterwards"]
    assert (after["value"], after["baseline"]) == (2.3, pytest.approx(1e-3))
    assert headline(alert) == (
        "slingshot over, the loss stayed at 2.3, its new level (steps 201–302, 101 steps)"
    )
    assert line(explanation, "What follows") == (
        "It is over, but the loss has not recovered: at step 302 it was 2.3, its new level."
    )
    assert json.loads(json.dumps(explanation.to_json()))["follows"] == line(explanation, "What follows")
    back = Run(rich_numeric(), NUMERIC)
    assert "the loss is back" in headline(back.alerts["slingshot-1"])


def test_an_alert_that_ended_shortly_before_a_slingshot_announced_it() -> None:
    run = Run(rich_numeric(), NUMERIC)
    for ended, said in ((390, "The slingshot came: the loss rose at step 401."), (370, "It ended")):
        alert = replace(run.alerts["at_risk-1"], last_step=ended, outcome=Outcome.PASSED)
        assert line(run.explain(alert), "What follows").startswith(said)


def test_what_is_read_in_the_slingshot_itself_is_no_cause() -> None:
    def bad_batch() -> Iterable[Reading]:
        for step in range(1, 300):
            bad = 200 <= step < 203
            yield Reading(
                step,
                {
                    "zero_sum_violation": 1e-7,
                    "loss": 5.0 if bad else 1e-3,
                    "rms_t_max": 9.0 if bad else 1.0,
                    "head_sqrt_exp_avg_sq_mean": 1.0,
                    "weight_norm": 1.0,
                    "feature_mean_norm": 1.0,
                    "logit_displacement": 0.01,
                    "secant_curvature": 1.0,
                    "learning_rate": 1e-3,
                },
            )

    explanation = Run(bad_batch(), NUMERIC).explain("slingshot-1")
    assert explanation.alert.mechanism is Mechanism.EXTERNAL
    assert (
        explanation.title() == "slingshot-1, steps 200–203 (unusual batch or learning rate, confidence 85%)"
    )
    assert "RMS_t stayed below 2.3 (largest 1)" in line(explanation, "Did not cross")
    assert line(explanation, "Crossed") == (
        "the loss rose above 0.1 at step 200 (largest 5, from 0.001 before)."
    )
    assert explanation.window == (140, 199)


def test_a_learning_rate_that_jumped_is_told_and_a_schedule_is_not() -> None:
    def with_rate(kicked: bool) -> Run:
        rates = lambda step: 1e-3 * 0.999**step * (50 if kicked and step > 220 else 1)  # noqa: E731
        readings = (Reading(r.step, {**r.values, "learning_rate": rates(r.step)}) for r in rich_numeric(300))
        return Run(readings, NUMERIC)

    text = str(with_rate(True).explain("imminent-1"))
    assert "the learning rate went from 0.000802 to 0.0401 at step 221" in text
    unchanged = "the learning rate never changed by a factor of 2 or more (largest: 1)"
    assert unchanged in str(with_rate(False).explain("imminent-1"))


def test_a_kick_from_outside_is_explained_by_what_did_not_precede_it() -> None:
    def kicked(factor: float) -> Run:
        def readings() -> Iterable[Reading]:
            for r in rich_numeric(until=90):
                after = r.step - 80
                rate = 1e-3 * (factor if after >= 0 else 1.0)
                loss = 3.0 if 1 <= after < 5 else 1e-3
                rest = {"learning_rate": rate, "loss": loss, "update_rms": 1e-4}
                yield Reading(r.step, {**r.values, **rest})

        return Run(readings(), NUMERIC)

    by_rate, by_batch = (kicked(factor).explain("slingshot-1") for factor in (50.0, 1.0))
    assert by_rate.alert.mechanism is by_batch.alert.mechanism is Mechanism.EXTERNAL
    text = "the learning rate went from 0.001 to 0.05 at step 80; the loss rose above 0.1 at step 81"
    assert text in line(by_rate, "Crossed")
    text = (
        "the learning rate did not change; the last update in these steps was 1 times as large as the average"
    )
    assert text in line(by_batch, "Did not cross")


def test_a_second_moment_slingshot_is_explained_by_coasting_and_the_kick() -> None:
    run = Run(second_moment_slingshot(300, 2500), HINGE)
    crossed = line(run.explain("imminent-1"), "Crossed")
    assert "RMS_t, averaged, fell below 0.5 at step 334" in crossed
    assert f"fell below 50% at step {run.alerts['at_risk-1'].first_step:,}" in crossed
    assert f"RMS_t rose above {Thresholds().rms_t_steep} at step 2,501 (largest 6, back below at" in crossed
    follows = line(run.explain("imminent-1"), "What follows")
    assert follows == "It happened: the loss jumped ×20,000,000 at step 2,503, 2 steps after the warning."


@pytest.mark.parametrize(
    ("readings", "context", "quantity"),
    [
        (lambda: rich_numeric(until=280), NUMERIC, "logit_displacement"),
        (lambda: rich_numeric(until=300), NUMERIC, "logit_displacement"),
        (lambda: long_memory(rising=True), RunContext(beta2=0.999), "logit_displacement"),
        (lambda: behind_a_layer_norm(1e-3), NUMERIC, "feature_displacement"),
        (oscillation, NUMERIC, "secant_curvature"),
        (lambda: second_moment_slingshot(300, 2500), HINGE, "rms_t_max"),
    ],
)
def test_what_raised_an_imminent_alert_is_among_what_crossed(
    readings: Callable[[], Iterable[Reading]], context: RunContext, quantity: str
) -> None:
    """Each rule has its own level; the alert's evidence and its explanation hold the same."""
    run = Run(readings(), context)
    alert = run.alerts["imminent-1"]
    evidence = alert.evidence[quantity]
    assert evidence.threshold is not None and evidence.value >= evidence.threshold
    crossed = [
        f for f in run.explain(alert).of(Seen.CROSSED) if f.quantity == quantity and f.supports_mechanism
    ]
    assert crossed, str(run.explain(alert))
    assert crossed[-1].at is not None and crossed[-1].at <= alert.first_step


def test_what_the_second_moment_had_forgotten_is_what_the_detector_saw() -> None:
    seen: dict[int, float] = {}
    detector = Detector(None, HINGE)
    readings = list(second_moment_slingshot(300, 2500))
    readings += [Reading(r.step + 3000, r.values) for r in second_moment_slingshot(300, 2500)]
    for reading in readings:
        detector.update(reading)
        seen[reading.step] = detector.signals.decay_lowest
    run = Run(readings, HINGE)
    record = SignalHistory(run.history, run.phases, Thresholds(), HINGE, ())
    starts = set(record.starts)
    assert starts and record.ends, "it goes through a whole slingshot"
    told = dict(zip(*record.series["decay"], strict=True))
    # At the step where it begins the detector has just let go of what was before.
    later = [step for step in told if step not in starts]
    assert {step: told[step] for step in later} == {step: seen[step] for step in later}


def test_the_window_begins_where_the_last_slingshot_ended() -> None:
    # Before the first event the second moment lies far above what follows: each event has its own maximum.
    before = {"head_sqrt_exp_avg_sq_mean": 1.0}
    first = [Reading(r.step, {**r.values, **before}) for r in numeric_slingshot(100, 400) if r.step < 395]
    rest = [r for r in numeric_slingshot(100, 400) if r.step >= 395]
    second = [Reading(r.step + 599, r.values) for r in numeric_slingshot(50, 350)]
    run = Run([*first, *rest, *second], NUMERIC)
    ended = next(
        s for (_, was), (s, _) in zip(run.phases, run.phases[1:], strict=False) if was is Phase.RECOVERING
    )
    explanation = run.explain("slingshot-2")
    assert explanation.window[0] > ended > run.alerts["slingshot-1"].last_step
    for finding in explanation.of(Seen.CROSSED):
        assert finding.at is not None and finding.at > ended, finding
    assert "second_moment_decay" in {finding.quantity for finding in explanation.of(Seen.NOT_CROSSED)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_alert_says_what_was_not_finite_first(value: float) -> None:
    def broken() -> Iterable[Reading]:
        for r in rich_numeric(until=60):
            values = dict(r.values)
            if r.step >= 50:
                values |= {"gradient_norm": value, "non_finite_gradients": 1.0}
            if r.step >= 51:
                values |= {"weight_norm": value}
            yield Reading(r.step, values)

    explanation = Run(broken(), NUMERIC).explain("non_finite-1")
    assert line(explanation, "Crossed") == (
        "the gradient norm was NaN or Inf first at step 50, in 11 readings; the weight norm was NaN or Inf "
        "first at step 51, in 10 readings."
    )
    assert line(explanation, "What follows") == "NaN or Inf up to step 60."
    assert "Cause" not in dict(explanation.lines())
    assert "zero-sum violation stayed below 0.1" in line(explanation, "Did not cross")


def test_what_was_not_measured_is_not_visible_with_the_reason_where_a_note_gives_one() -> None:
    def without(*names: str) -> list[Reading]:
        kept = rich_numeric(until=300)
        return [Reading(r.step, {k: v for k, v in r.values.items() if k not in names}) for r in kept]

    notes = (Note("no_second_moment", "SGD keeps no exp_avg_sq: RMS_t is not available. Rows are.", 5),)
    optimizer = ("rms_t_max", "head_sqrt_exp_avg_sq_mean", "secant_curvature", "learning_rate")
    text = line(Run(without(*optimizer), NUMERIC, notes).explain("imminent-1"), "Not measured")
    assert text == (
        "sqrt(v) against its maximum, RMS_t, averaged, RMS_t, secant curvature: SGD keeps no exp_avg_sq: "
        "RMS_t is not available; learning rate: no reading in these steps."
    )


def test_a_head_read_without_a_probe_batch_is_said_where_its_displacement_stayed_small() -> None:
    small = [Reading(r.step, {**r.values, "logit_displacement": 1e-3}) for r in numeric_slingshot(100, 300)]
    probed = [Reading(r.step, {**r.values, "margin_displacement": 1e-3}) for r in small]
    assert "a LayerNorm before the head hides" in str(Run(small, NUMERIC).explain("at_risk-1"))
    assert "LayerNorm" not in str(Run(probed, NUMERIC).explain("at_risk-1"))


def test_an_alert_from_before_the_record_is_explained_by_its_own_evidence() -> None:
    run = Run(rich_numeric(), NUMERIC)
    run.history = History()
    explanation = run.explain("imminent-1")
    text = str(explanation)
    assert "zero-sum violation 0.582 in the alert's own evidence (threshold 0.1)" in text
    assert "growth of ‖μ_G‖ 12% per τ in the alert's own evidence (threshold 5% per τ)" in text
    assert "the steps before the alert began: the readings begin later" in text
    assert "RMS_t 1 in the alert's own evidence" in line(explanation, "Did not cross")


def test_a_resumed_alert_is_explained_from_where_its_readings_begin() -> None:
    run = Run(rich_numeric(), NUMERIC)
    run.history = History()
    for reading in rich_numeric():
        if reading.step > 200:
            run.history.append(reading.step, reading.values)
    text = str(run.explain("imminent-1"))
    begun = "zero-sum violation was already above 0.1 when the readings began (step 201; 0.404 then"
    assert begun in text
    assert f"logit displacement δ rose above 0.201 nat at step {run.alerts['imminent-1'].first_step}" in text
    assert "the steps before 201: the readings begin there" in text


def test_an_alert_that_passed_says_so() -> None:
    run = Run(rich_numeric(until=300), NUMERIC)
    passed = replace(run.alerts["imminent-1"], state=AlertState.RESOLVED, last_step=290, steps_to_spike=None)
    assert line(run.explain(passed), "What follows") == "It ended at step 290 without a slingshot."
    guess = replace(run.alerts["imminent-1"], steps_to_spike=None)
    assert "cannot be predicted here" in line(run.explain(guess), "What follows")


def test_an_explanation_is_strict_json_and_fits_an_ascii_terminal() -> None:
    run = Run(rich_numeric(), NUMERIC)
    for alert in run.alerts.values():
        explanation = run.explain(replace(alert, confidence=math.nan) if alert.id == "imminent-1" else alert)
        record = json.loads(json.dumps(explanation.to_json(), allow_nan=False))
        assert record == explanation.to_json() and record["id"] == alert.id
        assert {item["quantity"] for item in record["crossed"]} >= {"zero_sum_violation_smoothed"}
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    Console(file=file, width=80).print(run.explain("imminent-1"))
    file.flush()
    shown = raw.getvalue().decode("ascii")
    assert "?" not in shown and max(map(len, shown.splitlines())) <= 80


# --- the monitor, and the run directory ------------------------------------------------------------


def test_the_monitor_explains_alerts_and_their_ids_also_after_close(spiking_run: Recorded) -> None:
    monitor = spiking_run.monitor
    slingshot = spiking_run.alert(AlertKind.SLINGSHOT)
    assert monitor.explain(slingshot) == monitor.explain("slingshot-1")
    assert monitor.explain("slingshot-1").alert == slingshot
    known = ", ".join(alert.id for alert in monitor.alerts)
    for wrong in ("slingshot-9", replace(slingshot, id="slingshot-9")):
        with pytest.raises(ValueError, match=rf"There is no alert 'slingshot-9'\. Known alerts: {known}\."):
            monitor.explain(wrong)


def test_an_alert_can_be_explained_in_the_callback_that_tells_it(spiking_run: Recorded) -> None:
    told = spiking_run.seen_by_callback
    assert told[0].startswith("at_risk-1, since step") and "zero-sum violation rose above 0.1" in told[0]
    assert any(text.startswith("slingshot-1, since step") for text in told)
    assert not [note for note in spiking_run.monitor.notes if note.code.startswith("failed")]


def test_the_run_directory_alone_gives_the_explanations_of_the_live_monitor(spiking_run: Recorded) -> None:
    record = read_run(spiking_run.run_dir)
    parts = (record.info, record.history, record.phases, record.alerts, record.notes)
    for alert in spiking_run.monitor.alerts:
        (offline,) = explain_run(*parts, alert.id)
        assert str(offline) == str(spiking_run.monitor.explain(alert))
    chosen = [explanation.alert.id for explanation in explain_run(*parts)]
    assert "slingshot-1" in chosen and "at_risk-1" not in chosen


def test_report_explains_every_slingshot_and_one_alert_on_request(
    spiking_run: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(spiking_run.run_dir)
    assert main(["report", run, "--no-figure"]) == 0
    out = capsys.readouterr().out
    assert "\nExplanations\nslingshot-1, steps" in out and "Did not cross:" in out
    assert main(["report", run, "--explain", "imminent-1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("imminent-1, steps") and "Key quantities" not in out
    assert main(["report", run, "--explain", "imminent-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "imminent-1"
    assert main(["report", run, "--explain", "imminent-7"]) == 2
    assert "nfi-monitor: There is no alert 'imminent-7'. Known alerts: at_risk-1, " in capsys.readouterr().err


def test_a_run_description_that_cannot_be_read_does_not_prevent_an_explanation() -> None:
    run = Run(rich_numeric(), NUMERIC)
    alerts = list(run.alerts.values())
    for info in ({}, {"thresholds": {"absorbing_enter": "high"}, "optimizer": "Adam", "tau": None}):
        explanations = explain_run(info, run.history, run.phases, alerts, [])
        assert [explanation.alert.id for explanation in explanations] == ["slingshot-1"]
