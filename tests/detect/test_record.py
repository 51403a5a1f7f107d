"""An alarm that led to nothing raises its rule's level; time and a slingshot lower it again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

import pytest

from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.record import Record
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.types import AlertKind, Outcome, Reading, Severity, Thresholds

NUMERIC = RunContext(beta2=0.95)
FULL = Thresholds(imminent_rise=1e9)
"""Without a rise that lowers it, the level of δ is ``imminent_displacement``, .6 nat, times the factor."""
EPISODE = 300
"""Steps from one peak of δ to the next."""


# --- the factor alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("times", range(7))
def test_each_alarm_that_led_to_nothing_doubles_the_level_up_to_sixteenfold(times: int) -> None:
    record = Record()
    for _ in range(times):
        record.disappoint("imminent", 1000, 20.0)
    assert record.factor("imminent", 1000, 20.0) == min(2.0**times, 16.0)
    assert record.factor("kicking", 1000, 20.0) == 1.0, "each rule has a factor of its own"
    assert record.led_to_nothing.get("imminent", 0) == times


@pytest.mark.parametrize(("tau", "half"), [(20.0, 5000), (50.0, 5000), (1000.0, 100_000)])
@pytest.mark.parametrize("later", [0, 100, 5000, 40_000, 10**7])
def test_the_factor_halves_in_a_hundred_tau_but_at_least_five_thousand_steps(
    tau: float, half: int, later: int
) -> None:
    record = Record()
    for _ in range(3):
        record.disappoint("imminent", 700, tau)
    expected = max(8.0 * math.exp(-math.log(2.0) * later / half), 1.0)
    assert record.factor("imminent", 700 + later, tau) == pytest.approx(expected)


def test_an_alarm_doubles_what_is_left_of_the_factor() -> None:
    record = Record()
    record.disappoint("imminent", 0, 20.0)
    record.disappoint("imminent", 2500, 20.0)  # half of the half-life: 2 has become √2
    assert record.factor("imminent", 2500, 20.0) == pytest.approx(2.0 * math.sqrt(2.0))


def test_a_step_counter_that_is_set_back_does_not_raise_the_factor() -> None:
    record = Record()
    record.disappoint("imminent", 9000, 20.0)
    assert record.factor("imminent", 0, 20.0) == 2.0


def test_a_slingshot_resets_the_factor() -> None:
    record = Record()
    for _ in range(3):
        record.disappoint("imminent", 100, 20.0)
    record.update(AlertKind.IMMINENT, ["imminent"], 140, 20.0, loss=1.0, burst=False)
    record.slingshot(150, 20.0)
    assert record.factor("imminent", 150, 20.0) == 1.0


@pytest.mark.parametrize(("ended", "factor"), [(120, 2.0), (140, 1.0)])
def test_a_slingshot_resets_the_factors_of_warnings_that_ended_at_most_a_tau_before(
    ended: int, factor: float
) -> None:
    record = Record()
    record.update(AlertKind.AT_RISK, ["coasting"], 100, 20.0, loss=1.0, burst=False)
    record.update(AlertKind.AT_RISK, [], ended, 20.0, loss=1.0, burst=False)
    record.slingshot(150, 20.0)
    assert record.factor("coasting", 150, 20.0) == pytest.approx(factor, rel=0.01)
    assert record.came_true == {}


@pytest.mark.parametrize(("burst", "factor"), [(True, 1.0), (False, 2.0)])
def test_each_rule_that_has_held_a_warning_is_judged_once_when_the_warning_ends(
    burst: bool, factor: float
) -> None:
    record = Record()
    for step, holding in enumerate([["inflating"], ["absorbing"], [], [], []], 100):
        record.update(AlertKind.AT_RISK, holding, step, 20.0, loss=1.0, burst=burst)
    assert record.factor("inflating", 102, 20.0) == record.factor("absorbing", 102, 20.0) == factor


def test_a_rule_is_doubtful_while_more_of_its_alarms_led_to_nothing_than_came_true() -> None:
    record = Record()
    assert not record.is_doubtful("imminent")
    record.disappoint("imminent", 100, 20.0)
    assert record.is_doubtful("imminent") and not record.is_doubtful("kicking")
    record.update(AlertKind.IMMINENT, ["imminent"], 200, 20.0, loss=1.0, burst=False)
    record.slingshot(210, 20.0)
    assert not record.is_doubtful("imminent")


def test_a_record_survives_a_checkpoint() -> None:
    record, restored = Record(), Record()
    for step in (100, 900):
        record.disappoint("imminent", step, 20.0)
    record.update(AlertKind.IMMINENT, ["kicking"], 950, 20.0, loss=1.0, burst=False)
    restored.load_state_dict(json.loads(json.dumps(record.state_dict())))
    assert restored.state_dict() == record.state_dict()
    assert restored.factor("imminent", 3000, 20.0) == record.factor("imminent", 3000, 20.0)


def passed_alarm(record: Record, loss: float, step: int, *, burst: bool = False) -> None:
    record.update(AlertKind.IMMINENT, ["diverging"], step, 20.0, loss=loss, burst=burst)
    record.update(AlertKind.IMMINENT, [], step + 1, 20.0, loss=loss / 2, burst=burst)


@pytest.mark.parametrize("burst", [False, True])
def test_the_highest_loss_of_alarms_that_passed_is_kept_for_a_hundred_tau_but_at_least_five_thousand_steps(
    burst: bool,
) -> None:
    record = Record()
    assert record.passed("diverging", 10, 20.0) == 0.0
    passed_alarm(record, 0.3, 100, burst=burst)
    passed_alarm(record, 0.1, 200, burst=burst)
    assert record.passed("diverging", 5201, 20.0) == 0.3
    assert record.passed("diverging", 5202, 20.0) == 0.0
    assert record.passed("diverging", 5202, 100.0) == 0.3
    assert record.passed("kicking", 201, 20.0) == 0.0, "each rule has one of its own"


def test_a_slingshot_forgets_the_highest_loss_of_alarms_that_ended_at_most_a_tau_before() -> None:
    record = Record()
    passed_alarm(record, 0.3, 100)
    record.slingshot(122, 20.0)
    assert record.passed("diverging", 123, 20.0) == 0.3
    record.slingshot(121, 20.0)
    assert record.passed("diverging", 123, 20.0) == 0.0


def test_the_highest_loss_of_an_alarm_that_still_fires_survives_a_checkpoint() -> None:
    record, restored = Record(), Record()
    record.update(AlertKind.IMMINENT, ["diverging"], 100, 20.0, loss=0.3, burst=False)
    restored.load_state_dict(json.loads(json.dumps(record.state_dict())))
    restored.update(AlertKind.IMMINENT, [], 101, 20.0, loss=0.1, burst=False)
    assert restored.passed("diverging", 102, 20.0) == 0.3


def test_the_highest_loss_survives_a_checkpoint_and_an_earlier_one_has_none() -> None:
    record, restored, earlier = Record(), Record(), Record()
    passed_alarm(record, 0.3, 100)
    state = json.loads(json.dumps(record.state_dict()))
    restored.load_state_dict(state)
    assert restored.passed("diverging", 102, 20.0) == 0.3
    del state["passed"]
    earlier.load_state_dict(state)
    assert earlier.passed("diverging", 102, 20.0) == 0.0


# --- the factor in the detector ------------------------------------------------------------------------


def episodes(peaks: Sequence[float], losses: Sequence[float] = ()) -> Iterator[Reading]:
    """Yield an absorbing run whose δ rises to each of ``peaks`` in turn, for 60 steps of EPISODE.

    ``losses``: the loss in the last five steps of each peak.  Otherwise it is 1e-7.
    """
    for number, peak in enumerate(peaks):
        for at in range(EPISODE):
            step = 1 + number * EPISODE + at
            high = at >= EPISODE - 60
            event = at >= EPISODE - 5 and number < len(losses)
            values = {
                "zero_sum_violation": 0.5,
                "feature_mean_norm": math.exp(2e-3 * step),
                "logit_displacement": peak if high else 0.01,
                "rms_t_max": 0.1,
                "loss": losses[number] if event else 1e-7,
            }
            yield Reading(step, values)
    # The last peak needs an end, too.
    for at in range(60):
        yield Reading(step + 1 + at, {**values, "logit_displacement": 0.01, "loss": 1e-7})


def after(readings: Iterator[Reading]) -> Detector:
    detector = Detector(FULL, NUMERIC)
    for reading in readings:
        detector.update(reading)
    return detector


def alarmed(detector: Detector) -> list[int]:
    """Return the number of the episode of each *imminent* alert."""
    alerts = [alert for alert in detector.alerts if alert.kind is AlertKind.IMMINENT]
    return [alert.first_step // EPISODE for alert in alerts]


def test_after_a_false_alarm_twice_the_displacement_is_imminent() -> None:
    """The levels are .6, 1.2 and 2.4 nat, apart from 4% that fade from one episode to the next."""
    assert alarmed(after(episodes([0.8, 0.8, 1.0, 1.4, 1.9, 2.8]))) == [0, 3, 5]
    assert alarmed(after(episodes([1.1, 1.1, 2.8]))) == [0, 2], "it counts that there was an alarm, not its δ"


def test_evidence_has_the_raised_level() -> None:
    detector = after(episodes([0.8, 2.0]))
    first, second = (alert for alert in detector.alerts if alert.kind is AlertKind.IMMINENT)
    assert first.evidence["logit_displacement"].threshold == pytest.approx(0.6)
    since = second.first_step - first.last_step
    raised = second.evidence["logit_displacement"].threshold
    assert raised == pytest.approx(1.2 * 0.5 ** (since / 5000), rel=1e-3)


def test_a_slingshot_resets_the_level() -> None:
    detector = after(episodes([0.8, 2.0, 0.8], losses=[1e-7, 0.5]))
    assert alarmed(detector) == [0, 1, 2]
    outcomes = [alert.outcome for alert in detector.alerts if alert.kind is AlertKind.IMMINENT]
    assert outcomes == [Outcome.PASSED, Outcome.SLINGSHOT, Outcome.PASSED]
    assert detector.record.came_true["imminent"] == 1
    assert detector.record.led_to_nothing["imminent"] == 2


def test_an_alarm_before_a_burst_counts_as_neither() -> None:
    detector = after(episodes([0.8, 0.8], losses=[2e-4]))
    outcomes = [alert.outcome for alert in detector.alerts if alert.kind is AlertKind.IMMINENT]
    assert outcomes == [Outcome.BURST, Outcome.PASSED]
    assert detector.record.came_true == {} and detector.record.led_to_nothing["imminent"] == 1


@pytest.mark.parametrize("at", [EPISODE - 30, EPISODE + 100, 2 * EPISODE - 30])
def test_a_resumed_detector_remembers_its_false_alarms(at: int) -> None:
    """The first checkpoint is taken while the alarm fires: how it ends counts after the resume."""
    readings = list(episodes([0.8, 0.8, 1.4]))
    detector = after(iter(readings[:at]))
    resumed = Detector(FULL, NUMERIC)
    resumed.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    for reading in readings[at:]:
        resumed.update(reading)
    assert alarmed(resumed) == [0, 2]
    assert json.dumps(resumed.state_dict()) == json.dumps(after(iter(readings)).state_dict())


def test_a_warning_that_led_to_nothing_comes_back_as_information_unless_the_mean_grows_twice_as_fast() -> (
    None
):
    def run(*growths: float) -> list[Severity]:
        detector, mean = Detector(None, NUMERIC), 0.0
        for number, growth in enumerate(growths):
            for at in range(EPISODE):
                absorbs = 100 <= at < 200
                mean += growth if absorbs else 0.0
                values = {"zero_sum_violation": 0.5 if absorbs else 1e-8, "feature_mean_norm": math.exp(mean)}
                detector.update(Reading(1 + number * EPISODE + at, {**values, "loss": 1e-7}))
        return [alert.severity for alert in detector.alerts]

    level = Thresholds().inflating_growth / NUMERIC.tau
    assert run(1.5 * level, 1.5 * level) == [Severity.WARNING, Severity.INFO]
    assert run(1.5 * level, 2.5 * level) == [Severity.WARNING, Severity.WARNING]
