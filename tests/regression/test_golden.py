"""Test that the answers to recorded runs stay the same. A deliberate change must write the answers anew."""

from __future__ import annotations

import copy

import pytest

from tests.regression.golden import NAMES, answers, differences, known


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_to_a_recorded_run_are_unchanged(name: str) -> None:
    """``python -m tests.regression golden`` writes the answers anew. Read ``git diff`` before you commit."""
    found = list(differences(known(name), answers(name)))
    assert not found, "\n".join(
        [f"{len(found)} differ; write them anew with: python -m tests.regression golden", *found[:10]]
    )


def test_the_recorded_runs_contain_three_kinds_of_alert_and_all_phases() -> None:
    alerts = [change[2] for name in NAMES for change in known(name)["changes"]]
    assert {alert["kind"] for alert in alerts} >= {"at_risk", "imminent", "slingshot"}
    assert len({alert["mechanism"] for alert in alerts}) >= 4
    assert len({phase for name in NAMES for _, phase in known(name)["phases"]}) == 6


def test_a_changed_number_a_changed_word_and_a_missing_alert_are_found() -> None:
    old = known(NAMES[0])
    for change in ("number", "word", "missing"):
        new = copy.deepcopy(old)
        if change == "number":
            new["changes"][0][2]["confidence"] *= 1 + 1e-6
        elif change == "word":
            new["explained"][0]["follows"] += "!"
        else:
            new["changes"].pop()
        assert len(list(differences(old, new))) == 1
