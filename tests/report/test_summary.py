from __future__ import annotations

import io
import json
import math
from dataclasses import replace

from rich.console import Console

from nfi_monitor.history import History
from nfi_monitor.report.summary import Summary, slingshots, summarize
from nfi_monitor.types import Alert, AlertKind, Evidence, Note, Outcome, Phase, Severity
from tests.report.builders import AT_RISK, IMMINENT, INFO, SLINGSHOT, event, readings, recorded, resolved

TAU = 20.0
AT, IM, SL = AlertKind.AT_RISK, AlertKind.IMMINENT, AlertKind.SLINGSHOT


def a_summary() -> Summary:
    history, phases = recorded(readings(1000))
    alerts = [resolved(AT_RISK, 895), resolved(IMMINENT, 895), resolved(SLINGSHOT, 905)]
    return summarize(INFO, history, phases, alerts, [Note("tied_head", "The head is tied.", 0)])


def test_a_summary_reads_like_this() -> None:
    text = str(a_summary())
    assert text.splitlines()[1:6] == [
        "model      Sequential, 41,879 parameters, float32",
        "head       head (Linear 128→23)",
        "optimizer  Adam (lr 0.001, betas [0.9, 0.95], eps 1e-08)",
        "steps      1,000, with 1,000 readings",
        "",
    ]
    assert (
        """\
Slingshots and their warnings
  #  steps    at-risk lead  imminent lead  mechanism                    confidence
  1  895–905     360 steps      135 steps  numerical feature inflation         86%
"""
        in text
    )
    assert "  slingshot  critical  895–905  numerical feature inflation 86%  loss 2.3" in text
    assert "now recovering · share of steps: healthy 39.9%, absorbing 20%" in text
    assert "3 (812), 17 (640)" in text
    assert "· The head is tied. (step 0)" in text
    assert text.endswith("The monitor took 1.25 s for 100 measured steps, 7.1% of the training's own time.")


def test_json_dumps_a_summary_without_nan() -> None:
    history = History()
    history.append(1, {"loss": math.nan, "rms_t_max": math.inf})
    alert = replace(AT_RISK, confidence=math.nan)
    summary = summarize({**INFO, "lr": math.nan}, history, [(0, Phase.HEALTHY)], [alert], [])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["quantities"]["loss"]["last"] is None
    assert summary["quantities"]["loss"]["not_finite"] == 1
    assert "not finite" in str(summary)


def test_a_run_that_measured_nothing_has_a_summary() -> None:
    summary = summarize({}, History(), [], [], [])
    assert json.loads(json.dumps(summary)) == summary
    assert summary["slingshots"] == [] and summary["last_step"] is None
    assert "no step has been measured yet" in str(summary)


def test_an_ascii_terminal_gets_the_whole_report() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    Console(file=file, width=100).print(a_summary())
    file.flush()
    assert "?" not in raw.getvalue().decode("ascii")


def test_a_lead_is_the_slingshots_start_minus_the_alerts_start() -> None:
    alerts = [event(AT, 535, 895), event(IM, 760, 895), event(SL, 895, 905)]
    assert slingshots(alerts, TAU) == [
        {"id": "slingshot-1", "start": 895, "end": 905, "at_risk_lead": 360, "imminent_lead": 135,
         "mechanism": "numerical_feature_inflation", "confidence": 0.86}
    ]  # fmt: skip


def test_each_slingshot_counts_the_alerts_of_its_own_cycle() -> None:
    alerts = [
        event(AT, 100, 200), event(IM, 180, 200), event(SL, 200, 210),
        event(AT, 300, 400), event(SL, 400, 410, 2),
        event(IM, 500, 500, 2), event(SL, 500, 510, 3),
    ]  # fmt: skip
    rows = slingshots(alerts, TAU)
    assert [row["at_risk_lead"] for row in rows] == [100, 100, None]
    assert [row["imminent_lead"] for row in rows] == [20, None, 0]


def test_an_alert_that_had_ended_is_not_counted_when_a_later_one_fired() -> None:
    alerts = [event(AT, 100, 120), event(AT, 400, 500, 2), event(SL, 500, 510)]
    assert slingshots(alerts, TAU)[0]["at_risk_lead"] == 100


def test_an_alert_that_passed_long_before_a_slingshot_is_no_warning_of_it() -> None:
    alerts = [event(AT, 100, 120), event(IM, 110, 118), event(SL, 5000, 5010)]
    assert [slingshots(alerts, TAU)[0][lead] for lead in ("at_risk_lead", "imminent_lead")] == [None, None]
    assert slingshots([event(AT, 100, 120), event(SL, 140, 150)], TAU)[0]["at_risk_lead"] == 40, "within τ"
    assert slingshots([event(AT, 100, 120), event(SL, 171, 180)], 1e3)[0]["at_risk_lead"] is None


def test_an_alert_that_began_while_a_slingshot_was_not_yet_seen_is_no_warning_of_the_next() -> None:
    """The loss first rises at 300 and is known to be a slingshot at 304."""
    for next_start in (330, 3607):
        alerts = [event(IM, 302, 304), event(SL, 300, 310), event(SL, next_start, next_start + 9, 2)]
        assert [row["imminent_lead"] for row in slingshots(alerts, 1e3)] == [None, None]


def test_an_alert_that_began_after_the_slingshot_does_not_announce_it() -> None:
    assert slingshots([event(SL, 500, 510), event(AT, 501, 600)], TAU)[0]["at_risk_lead"] is None


def test_at_risk_that_never_ended_counts_from_its_own_beginning() -> None:
    alerts = [event(AT, 100, None), event(SL, 200, 210), event(SL, 700, 710, 2)]
    assert [row["at_risk_lead"] for row in slingshots(alerts, TAU)] == [100, 600]
    ended = [event(AT, 100, 205), event(SL, 200, 210), event(SL, 700, 710, 2)]
    assert [row["at_risk_lead"] for row in slingshots(ended, TAU)] == [100, None]


def test_a_loss_that_stayed_where_it_rose_to_is_reported() -> None:
    evidence = {"loss": Evidence(2.4, 0.1, 1e-3), "loss_afterwards": Evidence(2.3, 0.01, 1e-3)}
    alert = replace(resolved(SLINGSHOT, 1400), evidence=evidence)
    assert "loss 2.4, loss afterwards 2.3" in str(
        summarize(INFO, History(), [(0, Phase.HEALTHY)], [alert], [])
    )


def test_a_slingshot_that_lasts_has_no_end() -> None:
    assert slingshots([event(SL, 200, None)], TAU)[0]["end"] is None


def test_shares_of_phases_add_up_and_count_from_the_first_step() -> None:
    phases = [(0, Phase.HEALTHY), (51, Phase.ABSORBING), (76, Phase.HEALTHY)]
    history = History()
    history.append(100, {"loss": 1.0})
    assert summarize({}, history, phases, [], [])["phase_share"] == {"healthy": 0.75, "absorbing": 0.25}


def test_the_extreme_is_on_the_side_that_matters() -> None:
    history = History()
    for step, value in enumerate((0.5, -0.9, 0.1), start=1):
        history.append(step, {"mean_alignment": value, "loss": value + 1})
    quantities = summarize({}, history, [], [], [])["quantities"]
    assert (quantities["mean_alignment"]["value"], quantities["mean_alignment"]["step"]) == (-0.9, 2)
    assert (quantities["loss"]["value"], quantities["loss"]["last"]) == (1.5, 1.1)


def test_the_overhead_of_a_killed_run_is_not_made_up() -> None:
    history, phases = recorded(readings(10))
    info = {**INFO, "overhead": {"seconds": 0.0, "share": None, "measured_steps": 0}}
    assert summarize(info, history, phases, [], [])["overhead"] is None
    assert "is unknown" in str(summarize(info, history, phases, [], []))


def test_two_thousand_alerts_are_all_in_the_data_and_the_last_in_the_text() -> None:
    alerts = [event(kind, 10 * i, 10 * i + 5, i) for i in range(1, 1001) for kind in (AT, SL)]
    summary = summarize({}, History(), [], alerts, [])
    assert len(summary["events"]) == 2000 and len(summary["slingshots"]) == 1000
    text = str(summary)
    assert "1,980 earlier events" in text and "10,000–10,005" in text and len(text.splitlines()) < 80


def endings(*alerts: Alert) -> list[str]:
    return [row["ended"] for row in summarize(INFO, History(), [], alerts, [])["events"]]


def test_an_event_says_how_it_ended() -> None:
    came = replace(resolved(AT_RISK, 895), outcome=Outcome.SLINGSHOT, outcome_step=895)
    burst = replace(came, outcome=Outcome.BURST)
    still = replace(AT_RISK, outcome=Outcome.OPEN, outcome_step=1000)
    lowered = replace(AT_RISK, severity=Severity.INFO, unmoved_since=700)
    passed = replace(event(AT, 100, 200), outcome=Outcome.PASSED)
    assert endings(came, burst, still, lowered, passed, AT_RISK) == [
        "it happened at step 895",
        "a smaller burst at step 895",
        "still firing when the run ended at step 1,000",
        "since step 700 nothing moved",
        "no slingshot came",
        "",
    ]
    assert endings(replace(still, unmoved_since=700)) == [
        "still firing when the run ended at step 1,000; since step 700 nothing moved"
    ]


def test_a_warning_that_had_ended_shortly_before_a_slingshot_is_not_said_to_have_led_to_nothing() -> None:
    passed = replace(event(AT, 700, 890), outcome=Outcome.PASSED)
    early = replace(event(AT, 500, 600), outcome=Outcome.PASSED)
    assert endings(early, passed, event(SL, 895, 905))[:2] == [
        "no slingshot came",
        "a slingshot followed at step 895",
    ]


def test_the_table_of_events_has_what_became_of_each() -> None:
    still = replace(AT_RISK, outcome=Outcome.OPEN, outcome_step=1000)
    text = str(summarize(INFO, History(), [], [still], []))
    assert "still firing when" in text


def test_steps_of_which_only_the_loss_is_known_do_not_count_as_readings() -> None:
    history = History()
    for step in range(1, 2001):
        history.append(step, {"loss": 1.0, "weight_norm": 2.0} if step % 20 == 0 else {"loss": 1.0})
    summary = summarize(INFO, history, [(0, Phase.HEALTHY)], [], [])
    assert summary["readings"] == 100 and len(history) == 2000
    assert "2,000, with 100 readings" in str(summary)
