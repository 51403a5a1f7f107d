"""The README's figures about the warnings are those of the pages that commands wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.detection import readme
from tests.benchmarks.detection.readme import PAGES, README, Page


def test_the_figures_in_the_readme_are_those_of_the_pages() -> None:
    text = README.read_text(encoding="utf-8")
    assert readme.filled(text) == text, "python -m tests.benchmarks.detection.readme"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.stem))
def test_every_page_says_by_which_command_it_was_made(path: Path) -> None:
    assert "Written by `python -m tests.benchmarks.detection" in path.read_text(encoding="utf-8")


def test_a_table_is_read_by_its_title_and_its_first_cells(tmp_path: Path) -> None:
    path = tmp_path / "PAGE.md"
    path.write_text(
        "7 runs\n\n## One\n\n| a | b |\n| --- | --- |\n| P(x \\| y) | 3/4 [0, 1] |\n\n## Two\n", "utf-8"
    )
    page = Page(path)
    assert page.rows("One") == {"P(x \\| y)": ["3/4 [0, 1]"]} and page.rows("Two") == {}
    assert page.found(r"(\d) runs") == ("7",)
    with pytest.raises(KeyError):
        page.rows("Three")
    with pytest.raises(KeyError):
        page.found("stars")


@pytest.mark.parametrize(
    ("cell", "said"),
    [("128 (68) steps, 6.4 (3.4) τ", "6.4 τ"), ("1 (0) steps, 0.0 (0.0) τ", "1 step"), ("–", "–")],
)
def test_a_lead_below_one_tau_is_told_in_steps(cell: str, said: str) -> None:
    assert readme._lead(cell) == said


def test_a_readme_without_the_block_is_refused() -> None:
    with pytest.raises(ValueError, match="figures: first"):
        readme.filled("# nothing")
