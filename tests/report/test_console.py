from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from rich.progress import Progress

from nfi_monitor.report.console import ConsoleSink
from nfi_monitor.report.summary import Summary
from nfi_monitor.types import Change, Evidence, Note, Outcome, Phase, Reading, Severity
from tests.report.builders import AT_RISK, IMMINENT, INFO, SLINGSHOT, resolved


def terminal(width: int = 100, file: io.StringIO | None = None) -> Console:
    return Console(file=file or io.StringIO(), width=width, force_terminal=True, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def a_whole_run(sink: ConsoleSink) -> None:
    sink.start(INFO)
    for step in range(1, 500):
        sink.reading(Reading(step, {"loss": 1.0}), Phase.HEALTHY)
    sink.note(Note("tied_head", "The head is tied.", 500))
    begun = replace(AT_RISK, severity=Severity.INFO, phase=Phase.ABSORBING, steps_to_spike=None)
    sink.alert(begun, Change.BEGIN)
    sink.alert(replace(AT_RISK, last_step=700), Change.UPDATE)
    sink.alert(resolved(AT_RISK, 895), Change.END)
    sink.alert(SLINGSHOT, Change.BEGIN)
    sink.alert(resolved(SLINGSHOT, 905), Change.END)
    sink.close({**INFO, "run_dir": "runs/one"}, Summary())


def test_a_run_on_a_terminal_reads_like_this() -> None:
    console = terminal()
    a_whole_run(ConsoleSink(console))
    assert text_of(console) == (
        """\
nfi  watching head (Linear 128→23), reads every 5th step, and every step once something changes ·
     time constant τ = 20 steps
nfi  note: The head is tied.
nfi  step 535  INFO  at risk: rounding absorbs confident rows: their gradients no longer sum to zero
     · numerical feature inflation (confidence 86%) · smoothed zero-sum violation 0.134 (threshold
     0.1), growth of ‖μ_G‖ 0.0167 (threshold 0.01), absorbed rows 63%
     → Compute the loss in float64.
nfi  step 700  WARNING  at risk: rounding absorbs confident rows and the feature mean grows ·
     numerical feature inflation (confidence 86%) · smoothed zero-sum violation 0.134 (threshold
     0.1), growth of ‖μ_G‖ 0.0167 (threshold 0.01), absorbed rows 63% · ≈ 360 steps left (180–720)
nfi  step 895  resolved  was at risk (steps 535–895, 360 steps)
nfi  step 895  CRITICAL  slingshot: the loss has risen far above its usual level · numerical feature
     inflation (confidence 86%) · loss 2.3 (threshold 0.1), smoothed zero-sum violation 0.5
     (threshold 0.1)
     → Compute the loss in float64.
nfi  step 905  resolved  slingshot over, the loss is back (steps 895–905, 10 steps)
nfi  run directory: runs/one"""
    )


def test_in_a_log_file_each_event_is_one_line() -> None:
    console = Console(file=io.StringIO(), width=60)
    a_whole_run(ConsoleSink(console))
    lines = text_of(console).splitlines()
    assert [line[:5].strip() for line in lines] == [
        "nfi",
        "nfi",
        "nfi",
        "",
        "nfi",
        "nfi",
        "nfi",
        "",
        "nfi",
        "nfi",
    ]
    assert "\x1b" not in text_of(console)


def test_an_update_that_does_not_rise_is_silent() -> None:
    console = terminal()
    sink = ConsoleSink(console)
    sink.alert(AT_RISK, Change.BEGIN)
    before = text_of(console)
    for step in range(600, 700):
        sink.alert(replace(AT_RISK, last_step=step, phase=Phase.ABSORBING), Change.UPDATE)
    assert text_of(console) == before
    sink.alert(replace(AT_RISK, last_step=700, phase=Phase.IMMINENT), Change.UPDATE)
    assert text_of(console) != before


def test_an_ascii_terminal_gets_every_word_and_no_error() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    a_whole_run(ConsoleSink(Console(file=file, width=100, force_terminal=True)))
    file.flush()
    text = raw.getvalue().decode("ascii")
    assert "-> " in text and "|mu_G|" in text and "?" not in text and "tau = 20" in text


def test_severity_is_a_word_and_a_colour() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    ConsoleSink(console).alert(IMMINENT, Change.BEGIN)
    assert "\x1b[1;31mCRITICAL" in text_of(console)


def test_an_alert_lands_above_an_open_progress_bar() -> None:
    console = terminal()
    with Progress(console=console, auto_refresh=False) as progress:
        progress.add_task("training", total=10)
        ConsoleSink(console).alert(AT_RISK, Change.BEGIN)
    text = text_of(console)
    assert text.index("nfi  step 535") < text.rindex("training")


def test_markup_in_a_message_is_printed_as_it_is() -> None:
    console = terminal()
    ConsoleSink(console).note(Note("x", "group['eps'] [bold]not bold[/bold] [0, 1]", 1))
    assert "group['eps'] [bold]not bold[/bold] [0, 1]" in text_of(console)


def test_quiet_says_alerts_and_nothing_else() -> None:
    console = terminal()
    a_whole_run(ConsoleSink(console, quiet=True))
    assert all("step" in line or line.startswith("     ") for line in text_of(console).splitlines())


def test_stdout_stays_the_users_own(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleSink().alert(AT_RISK, Change.BEGIN)
    out, err = capsys.readouterr()
    assert out == "" and "at risk" in err


def test_many_alerts_leave_nothing_behind() -> None:
    sink = ConsoleSink(terminal())
    for number in range(300):
        alert = replace(AT_RISK, id=f"at_risk-{number}")
        sink.alert(alert, Change.BEGIN)
        sink.alert(resolved(alert, 600), Change.END)
    assert not sink._printed


def test_a_warning_that_came_true_says_what_happened_and_how_long_before_it_warned() -> None:
    console = terminal(width=200)
    loss = {"spike_loss": Evidence(0.05, 0.02, 1.25e-7, crossed=True, step=905)}
    over = replace(
        resolved(replace(IMMINENT, first_step=628), 905),
        outcome=Outcome.SLINGSHOT, outcome_step=905, evidence={**IMMINENT.evidence, **loss},
    )  # fmt: skip
    sink = ConsoleSink(console)
    sink.alert(over, Change.END)
    sink.close(INFO, Summary())  # no slingshot's line has followed
    assert text_of(console) == (
        "nfi  step 905  it happened: the loss jumped ×400,000 at step 905, 277 steps after the warning"
    )


def test_the_line_of_a_slingshot_comes_before_those_of_the_warnings_that_came_true() -> None:
    console = terminal(width=300)
    sink = ConsoleSink(console)
    sink.alert(AT_RISK, Change.BEGIN)
    sink.alert(IMMINENT, Change.BEGIN)
    before = text_of(console)
    for warning in (AT_RISK, IMMINENT):
        ended = replace(resolved(warning, 897), outcome=Outcome.SLINGSHOT, outcome_step=895)
        sink.alert(ended, Change.END)
    assert text_of(console) == before
    sink.alert(replace(SLINGSHOT, advice=()), Change.BEGIN)
    lines = text_of(console).removeprefix(before).strip().splitlines()
    assert lines[0].startswith("nfi  step 895  CRITICAL  slingshot: ")
    assert [line[: len("nfi  step 897  it happened")] for line in lines[1:]] == [
        "nfi  step 897  it happened"
    ] * 2
    assert not sink._printed.keys() & {AT_RISK.id, IMMINENT.id}


def test_an_alert_that_passed_is_resolved_and_says_that_nothing_came() -> None:
    console = terminal(width=200)
    ConsoleSink(console).alert(replace(resolved(IMMINENT, 930), outcome=Outcome.PASSED), Change.END)
    assert text_of(console) == (
        "nfi  step 930  resolved  was imminent, no slingshot came (steps 760–930, 170 steps)"
    )


def test_an_alert_that_fires_when_the_run_ends_is_not_resolved() -> None:
    console = terminal(width=200)
    sink = ConsoleSink(console)
    sink.alert(AT_RISK, Change.BEGIN)
    before = text_of(console)
    open_alert = replace(AT_RISK, last_step=1000, outcome=Outcome.OPEN, outcome_step=1000)
    sink.alert(open_alert, Change.UPDATE)
    assert text_of(console).removeprefix(before).strip() == (
        "nfi  step 1,000  still firing: at risk since step 535 when the run ended at step 1,000"
    )


def test_a_severity_that_falls_is_one_short_line_and_none_at_info() -> None:
    console = terminal(width=200)
    sink = ConsoleSink(console)
    for severity, said in (
        (Severity.CRITICAL, None),
        (Severity.WARNING, "nfi  step 900  WARNING  imminent, but less severe: since step 800 nothing moved"),
        (Severity.INFO, ""),
    ):
        before = text_of(console)
        lowered = replace(IMMINENT, severity=severity, last_step=900, unmoved_since=800)
        sink.alert(lowered, Change.UPDATE)
        assert said is None or text_of(console).removeprefix(before).strip() == said
    sink.alert(replace(IMMINENT, last_step=950), Change.UPDATE)
    assert text_of(console).splitlines()[-2].startswith("nfi  step 950  CRITICAL")


def test_a_line_has_what_crossed_and_not_what_lies_far_below() -> None:
    console = terminal(width=300)
    evidence = {
        "logit_displacement": Evidence(0.0129, 0.15, crossed=False, step=760),
        "feature_mean_growth": Evidence(0.004, 0.001, crossed=True, step=760),
        "zero_sum_violation_smoothed": Evidence(0.3, 0.1, crossed=True, step=760),
    }
    ConsoleSink(console).alert(replace(IMMINENT, evidence=evidence), Change.BEGIN)
    line = text_of(console).splitlines()[0]
    assert "growth of ‖μ_G‖ 0.004 (threshold 0.001)" in line and "logit displacement" not in line
