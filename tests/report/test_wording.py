from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nfi_monitor.quantities import QUANTITIES
from nfi_monitor.report import terminal, wording
from nfi_monitor.types import AlertKind, AlertState, Evidence, Mechanism, Outcome, Phase
from tests.report.builders import AT_RISK, IMMINENT, SLINGSHOT, resolved


def test_an_alert_is_one_line_of_headline_mechanism_evidence_and_forecast() -> None:
    assert wording.alert_in_words(AT_RISK, 2) == (
        "at risk: rounding absorbs confident rows and the feature mean grows"
        " · numerical feature inflation (confidence 86%)"
        " · smoothed zero-sum violation 0.134 (threshold 0.1), growth of ‖μ_G‖ 0.0167 (threshold 0.01)"
        " · ≈ 360 steps left (180–720)"
    )


def test_what_the_alert_rests_on_comes_first_in_its_evidence() -> None:
    assert wording.evidence_in_words(SLINGSHOT, 1) == "loss 2.3 (threshold 0.1)"
    assert wording.evidence_in_words(IMMINENT, 1) == "logit displacement δ 0.41 nat (threshold 0.3)"
    behind = replace(
        AT_RISK,
        mechanism=Mechanism.SECOND_MOMENT,
        evidence={"zero_sum_violation": Evidence(1e-8, 0.1), "rms_t_max": Evidence(3.0, 2.3)},
    )
    assert wording.evidence_in_words(behind, 1) == "RMS_t 3 (threshold 2.3)"


def test_fractions_are_percent_and_nats_carry_their_unit() -> None:
    assert wording.one_evidence_in_words("absorbed_fraction", Evidence(0.63, 0.1)) == (
        "absorbed rows 63% (threshold 10%)"
    )
    assert wording.amount("logit_displacement", 0.41) == "0.41 nat"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (math.nan, "NaN"), (math.inf, "Inf"), (-math.inf, "-Inf"), (0.0, "0"), (12345.6, "12,346"),
     (1.2e-7, "1.2e-07"), (-3.0, "-3"), (2e12, "2e+12")],
)  # fmt: skip
def test_every_number_has_a_short_form(value: float | None, text: str) -> None:
    assert wording.number(value) == text


@pytest.mark.parametrize("kind", list(AlertKind))
@pytest.mark.parametrize("mechanism", list(Mechanism))
@pytest.mark.parametrize("phase", list(Phase))
def test_every_alert_has_words_firing_and_resolved(
    kind: AlertKind, mechanism: Mechanism, phase: Phase
) -> None:
    firing = replace(AT_RISK, kind=kind, mechanism=mechanism, phase=phase)
    over = replace(firing, state=AlertState.RESOLVED, last_step=600)
    assert wording.headline(firing) and wording.headline(over) != wording.headline(firing)
    assert "535–600, 65 steps" in wording.headline(over)
    assert wording.forecast_in_words(over) == ""


def test_no_mechanism_has_no_confidence() -> None:
    assert wording.mechanism_in_words(replace(AT_RISK, mechanism=Mechanism.UNKNOWN)) == "mechanism not clear"


def test_an_alert_without_a_forecast_does_not_count_down() -> None:
    assert "left" not in wording.alert_in_words(replace(AT_RISK, steps_to_spike=None))


def test_one_step_is_singular() -> None:
    assert wording.forecast_in_words(replace(AT_RISK, steps_to_spike=(0, 1, 2))) == "≈ 1 step left (0–2)"
    assert "1 step)" in wording.headline(resolved(SLINGSHOT, 896))


def test_strange_names_still_read_well() -> None:
    assert wording.label("quantity_of_tomorrow") == "quantity of tomorrow"
    assert wording.amount("quantity_of_tomorrow", 0.5) == "0.5"


def test_all_words_can_be_said_in_ascii_without_question_marks() -> None:
    alerts = [replace(AT_RISK, kind=k, mechanism=m) for k in AlertKind for m in Mechanism]
    text = " ".join([*map(wording.alert_in_words, alerts), *map(wording.label, QUANTITIES)])
    assert "?" not in terminal.to_ascii(text)
    assert terminal.to_ascii("‖μ_G‖ ≈ 3 日") == "|mu_G| ~ 3 ?"


@pytest.mark.parametrize(
    ("floor", "loss", "said"),
    [
        (1e-7, 0.04, "the loss jumped ×400,000"),
        (0.02, 0.5, "the loss jumped ×25"),
        (2.05, 3.75, "the loss rose from 2.05 to 3.75"),
        (-3.0, 40.0, "the loss rose from -3 to 40"),
        (0.0, 0.5, "the loss rose from 0 to 0.5"),
    ],
)
def test_a_spike_is_told_in_words_that_fit_its_size(floor: float, loss: float, said: str) -> None:
    item = Evidence(loss, None, floor, crossed=True, step=900)
    alert = replace(
        resolved(AT_RISK, 900), outcome=Outcome.BURST, outcome_step=900, evidence={"spike_loss": item}
    )
    after = "at step 900, 365 steps after the run was called at risk"
    assert wording.headline(alert) == f"a smaller burst, no slingshot: {said} {after}"


def test_evidence_in_a_table_names_the_extreme_and_what_has_not_crossed() -> None:
    rose = Evidence(0.134, 0.1, 0.03, crossed=True, step=5, extreme=0.7)
    assert wording.evidence_cells("zero_sum_violation_smoothed", rose) == (
        "0.134 (later up to 0.7)", "0.1", "0.03",
    )  # fmt: skip
    fell = Evidence(0.4, 0.5, crossed=True, below=True, step=5, extreme=0.01)
    assert wording.evidence_cells("rms_t_max", fell)[0] == "0.4 (later down to 0.01)"
    small = Evidence(0.0129, 0.15, crossed=False, step=5)
    assert wording.evidence_cells("logit_displacement", small)[1] == "0.15 nat, not crossed"


def test_the_loss_of_the_spike_comes_last_in_the_warning_and_first_in_the_slingshot() -> None:
    item = Evidence(2.3, 0.1, 1e-7, crossed=True, step=900)
    warning = replace(IMMINENT, evidence={"spike_loss": item, **IMMINENT.evidence})
    slingshot = replace(SLINGSHOT, evidence={**SLINGSHOT.evidence, "loss": item})
    assert [*wording.ordered_evidence(warning)][-1] == "spike_loss"
    assert next(iter(wording.ordered_evidence(slingshot))) == "loss"


def test_evidence_of_which_low_values_are_the_sign_says_below() -> None:
    low = Evidence(0.208, 0.5, crossed=True, below=True, step=5)
    assert wording.one_evidence_in_words("rms_t_max", low) == "RMS_t 0.208 (below the threshold 0.5)"
    assert wording.evidence_cells("rms_t_max", low)[1] == "below 0.5"
    above = replace(low, value=0.8, crossed=False)
    assert wording.one_evidence_in_words("rms_t_max", above) == "RMS_t 0.8 (threshold 0.5, not below it)"
    assert wording.evidence_cells("rms_t_max", above)[1] == "0.5, not below it"


def test_a_growth_is_in_percent_per_tau_as_in_an_explanation() -> None:
    grown = replace(AT_RISK, tau=20.0, evidence={"feature_mean_growth": Evidence(0.0167, 0.01, 0.0)})
    assert wording.evidence_in_words(grown) == "growth of ‖μ_G‖ 33.4% per τ (threshold 20%)"
    assert wording.evidence_cells("feature_mean_growth", grown.evidence["feature_mean_growth"], 20.0) == (
        "33.4% per τ", "20% per τ", "0% per τ",
    )  # fmt: skip


def test_headlines_name_what_happens_without_figures_of_speech() -> None:
    assert wording.headline(SLINGSHOT) == "slingshot: the loss has risen far above its usual level"
    left = replace(SLINGSHOT, outcome=Outcome.OPEN, outcome_step=900)
    assert "since step 895; the loss was still high when the run ended" in wording.headline(left)
    assert wording.mechanism_name(Mechanism.EXTERNAL) == "unusual batch or learning rate"


def test_a_line_has_no_evidence_of_other_mechanisms() -> None:
    both = {
        "second_moment_decay": Evidence(-2.0, -0.3, crossed=True, below=True, step=760),
        "feature_mean_growth": Evidence(0.004, 0.001, crossed=True, step=760),
        "rms_t_max": Evidence(3.0, 2.3, crossed=True, step=760),
        "logit_displacement": Evidence(0.7, 0.6, crossed=True, step=760),
    }
    rounding = replace(IMMINENT, evidence=both)
    optimizer = replace(rounding, mechanism=Mechanism.SECOND_MOMENT)
    line, other = (wording.evidence_in_words(alert, 3) for alert in (rounding, optimizer))
    assert line == "logit displacement δ 0.7 nat (threshold 0.6), growth of ‖μ_G‖ 0.004 (threshold 0.001)"
    assert other.startswith("RMS_t 3 (threshold 2.3), ") and "growth" not in other and "logit" not in other
    for alert in (rounding, optimizer, replace(rounding, mechanism=Mechanism.UNKNOWN)):
        assert wording.evidence_in_words(alert).count("(") == len(both), "without a limit, all are there"
    assert wording.evidence_in_words(replace(rounding, evidence={"rms_t_max": both["rms_t_max"]}), 1)
