"""What alerts advise is what the benchmark found to help: the texts are held to ``RESULTS.md``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nfi_monitor import AlertKind, Mechanism, remedies
from nfi_monitor.detect.advice import advice_for
from nfi_monitor.report import wording
from tests.benchmarks.remedies import page
from tests.report.builders import IMMINENT

RESULTS = Path(page.__file__).with_name("RESULTS.md").read_text(encoding="utf-8")
VERDICTS = page.read_verdicts(RESULTS)
MOMENTS = {AlertKind.AT_RISK: "at risk", AlertKind.IMMINENT: "imminent", AlertKind.SLINGSHOT: page.START}
"""What is done after a slingshot is there from the start of the next one."""
CASES = [
    (kind, mechanism)
    for mechanism in (
        Mechanism.NUMERICAL_FEATURE_INFLATION,
        Mechanism.SECOND_MOMENT,
        Mechanism.EDGE_OF_STABILITY,
    )
    for kind in MOMENTS
]


def named(text: str) -> Iterator[str]:
    """The remedies of a line as the table calls them; what is not separated by "or" belongs together."""
    for part in re.split(r"\bor\b", text, flags=re.IGNORECASE):
        found = []
        for name, arguments in re.findall(r"\b(\w+)\(([^()]*)\)", part):
            if name in remedies.__all__:
                found.append(_as_in_the_table(name, arguments))
        if "logits.double()" in part:
            found.append("float64_cross_entropy")
        if found:
            yield " + ".join(sorted(found, reverse=True))


def _as_in_the_table(name: str, arguments: str) -> str:
    last = arguments.rpartition(", ")[2]
    if name == "cool_down":
        return "cool_down (for good)" if last == "None" else name
    return f"{name} ({last})" if name == "raise_epsilon" else name


def test_remedies_are_found_in_a_text_with_their_options_and_what_belongs_together() -> None:
    assert list(named("cool_down(optimizer, 0.1, 40) now and zero_sum_cross_entropy(logits, target).")) == [
        "zero_sum_cross_entropy + cool_down"
    ]
    text = "raise_epsilon(optimizer, 1e-5) or criterion(logits.double(), target). Or cool_down(o, 0.1, None)"
    assert list(named(text)) == ["raise_epsilon (1e-5)", "float64_cross_entropy", "cool_down (for good)"]


@pytest.mark.parametrize(("kind", "mechanism"), CASES)
def test_every_remedy_that_is_advised_averts_at_least_half_of_the_slingshots(
    kind: AlertKind, mechanism: Mechanism
) -> None:
    lines = advice_for(kind, mechanism, tau=20.0)
    advised = [name for line in lines for name in named(line)]
    assert advised, "an alert with a mechanism says what to do"
    for name in advised:
        verdict = VERDICTS.get((name, mechanism.value), {}).get(MOMENTS[kind])
        assert verdict in (page.AVERTS, page.HELPS), f"{name} is {verdict or 'not tried'}"


@pytest.mark.parametrize(("kind", "mechanism"), CASES)
def test_what_comes_first_is_as_good_as_anything_after_it(kind: AlertKind, mechanism: Mechanism) -> None:
    order = [page.AVERTS, page.HELPS]
    ranks = [
        order.index(VERDICTS[name, mechanism.value][MOMENTS[kind]])
        for line in advice_for(kind, mechanism, tau=20.0)
        for name in named(line)
    ]
    assert ranks[0] == min(ranks)


@pytest.mark.parametrize("mechanism", [Mechanism.SECOND_MOMENT, Mechanism.EDGE_OF_STABILITY])
def test_what_does_not_help_is_said_where_it_does_not(mechanism: Mechanism) -> None:
    """A larger eps and resetting the optimizer were tried there; nobody should try them again."""
    for remedy in ("raise_epsilon (1e-5)", "reset_second_moment"):
        moments = VERDICTS[remedy, mechanism.value]
        assert moments and set(moments.values()) <= {page.USELESS, page.WORSE}, (remedy, moments)
    for kind in (AlertKind.AT_RISK, AlertKind.IMMINENT, AlertKind.SLINGSHOT):
        text = " ".join(advice_for(kind, mechanism, tau=20.0))
        assert "Float64 does not help here" in text and "Neither does a larger eps" in text


def test_at_the_edge_of_stability_nothing_is_claimed_of_a_curvature_that_may_be_unread() -> None:
    said = "uccessive updates overshoot along the gradient"
    for kind in (AlertKind.AT_RISK, AlertKind.IMMINENT):
        assert said in wording.headline(replace(IMMINENT, kind=kind, mechanism=Mechanism.EDGE_OF_STABILITY))
    for kind in (AlertKind.AT_RISK, AlertKind.SLINGSHOT):
        text = " ".join(advice_for(kind, Mechanism.EDGE_OF_STABILITY, tau=20.0))
        assert said in text and "curvature" not in text


def test_what_is_said_of_the_last_moment_before_a_numeric_slingshot_is_in_the_table() -> None:
    [last] = [line for line in advice_for(AlertKind.IMMINENT, Mechanism.NUMERICAL_FEATURE_INFLATION, 20.0)
              if "less than 1.25 τ" in line]  # fmt: skip
    half_a_tau = {
        name: VERDICTS[name, Mechanism.NUMERICAL_FEATURE_INFLATION.value]["0.5 τ before"]
        for name in ("raise_epsilon (1e-5)", "zero_sum_cross_entropy", "cool_down")
    }
    assert "raise_epsilon (1e-5)" in named(last) and "only delays" in last
    assert half_a_tau.pop("raise_epsilon (1e-5)") in (page.AVERTS, page.HELPS)
    assert set(half_a_tau.values()) == {page.USELESS}


def test_brief_cooling_is_not_advised_alone_where_it_only_delays() -> None:
    for mechanism in (Mechanism.SECOND_MOMENT, Mechanism.EDGE_OF_STABILITY):
        assert VERDICTS["cool_down", mechanism.value]["imminent"] == page.USELESS
        assert "only delay" in " ".join(advice_for(AlertKind.IMMINENT, mechanism, tau=20.0))


def test_numbers_in_advice_look_as_in_the_header_and_code_stays_code() -> None:
    stay, cool = (
        " ".join(advice_for(AlertKind.IMMINENT, mechanism, tau=1000.0))
        for mechanism in (Mechanism.SECOND_MOMENT, Mechanism.UNKNOWN)
    )
    assert "(τ = 1,000 steps)" in stay
    assert "for about 2,000 steps now" in cool and "cool_down(optimizer, 0.1, 2000)" in cool
