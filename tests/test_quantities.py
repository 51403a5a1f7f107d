"""Each declaration is complete, what it names exists, and its reference test is about it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from nfi_monitor.measure import declared
from nfi_monitor.quantities import QUANTITIES, READING_ORDER, Merge, Quantity
from nfi_monitor.quantities.declaration import LAST
from nfi_monitor.report.tensorboard.tab_data import CHARTS

ROOT = Path(__file__).parents[1]
HELPERS = "tests/measure/reference.py"
"""Its functions hold references for several test files."""
each = pytest.mark.parametrize("quantity", QUANTITIES.values(), ids=QUANTITIES)


@cache
def functions(file: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def words_of(file: str, test: str) -> set[str]:
    """Names and strings in a test, and in the functions of its file and of ``HELPERS`` that it calls."""
    known, found = functions(HELPERS) | functions(file), set[str]()
    left, seen = [test], {test}
    while left:
        for word in _words(known[left.pop()]):
            found.add(word)
            if word in known and word not in seen:
                seen.add(word)
                left.append(word)
    return found


def _words(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from node.value.replace("`", " ").split()


@each
def test_a_quantity_has_a_unit_a_label_a_meaning_and_a_range(quantity: Quantity) -> None:
    assert quantity.name.isidentifier() and quantity.unit and quantity.label and quantity.meaning
    low, high = quantity.within
    assert low < high
    assert "_" not in quantity.label.replace("W_G", "").replace("μ_G", "").replace("RMS_t", "")


@each
def test_a_quantity_has_a_reference_test_or_a_reason_why_not(quantity: Quantity) -> None:
    assert bool(quantity.reference) != bool(quantity.no_reference)
    if quantity.reference:
        file, _, test = quantity.reference.partition("::")
        assert (ROOT / file).is_file(), f"{quantity.name}: write its reference test into {file}"
        assert test in functions(file), f"{quantity.name}: there is no test {quantity.reference}"
        measured_by = (quantity.per_row.function if quantity.per_row else quantity.per_step).rpartition(":")[
            2
        ]
        name = quantity.name
        assert {name, measured_by} & words_of(file, test) - {""}, f"{test} does not mention {name}"


@each
def test_what_measures_a_quantity_can_be_imported_and_merged(quantity: Quantity) -> None:
    assert not (quantity.per_row and quantity.per_step)
    if quantity.per_row:
        assert callable(declared.function(quantity.per_row.function))
        assert quantity.merge is Merge.ROW_SUMS, "a per_row quantity needs merge=Merge.ROW_SUMS"
    if quantity.per_step:
        assert callable(declared.function(quantity.per_step))
        assert quantity.merge in (Merge.RANK_MEAN, Merge.FIRST_RANK, Merge.LARGEST_RANK)


@each
def test_a_quantity_that_names_a_chart_has_a_curve_in_one_that_exists(quantity: Quantity) -> None:
    assert bool(quantity.chart) == bool(quantity.curve)
    assert not quantity.chart or quantity.chart in {chart.title for chart in CHARTS}


def test_every_chart_has_curves_whose_words_differ() -> None:
    for chart in CHARTS:
        assert chart.curves, chart.title
        assert len(set(chart.curves.values())) == len(chart.curves), chart.title


def test_no_two_quantities_have_one_name_one_label_or_one_place() -> None:
    everything = list(QUANTITIES.values())
    assert len({quantity.label for quantity in everything}) == len(everything)
    places = [quantity.place for quantity in everything if quantity.place != LAST]
    assert len(set(places)) == len(places)
    assert set(READING_ORDER) == set(everything)


def test_the_catalogue_needs_no_torch() -> None:
    code = "import sys, nfi_monitor.quantities; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_new_quantity_needs_a_declaration_and_a_function_and_nothing_else(tmp_path: Path) -> None:
    script = [sys.executable, "-W", "ignore", "-m", "tests.new_quantities", str(tmp_path / "run")]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    first, *tail = done.stdout.splitlines()
    found = json.loads(first)
    for name, value in found["expected"].items():
        assert found["history"][name] == pytest.approx(value, rel=1e-6)
        assert found["readings"][name] == pytest.approx(value, rel=1e-6)
    assert found["curves"] == {"largest_logit": "largest logit", "largest_move": "largest"}
    assert found["summary"] == ["largest_logit"]  # the other one asks for no line there
    assert found["live"]
    assert "largest logit" in tail[-1] and "largest move" not in tail[-1]
    assert found["of_shards"] == []  # no rank has all classes of a row: absent, never 0
