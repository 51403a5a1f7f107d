"""Test that docs/compatibility.md is what its two records make, and that the zoo reaches its targets."""

from __future__ import annotations

import json

from tests.zoo import page

RESULTS = json.loads(page.RESULTS.read_text(encoding="utf-8"))["configurations"]


def test_the_page_is_made_from_its_records() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.current()


def test_each_configuration_has_a_name_of_its_own() -> None:
    names = [(row["library"], row["name"]) for row in RESULTS]
    assert len(set(names)) == len(names) >= 150
