"""What is demanded of every file in ``integrations/`` that adapts a framework."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import compatibility

ROOT = Path(__file__).parents[2]
ADAPTERS = sorted(
    path.stem for path in (ROOT / "integrations").glob("*.py") if path.stem not in ("__init__", "attach")
)
each = pytest.mark.parametrize("name", ADAPTERS)


def source_of(name: str) -> str:
    path = ROOT / "tests" / "integrations" / f"test_{name}.py"
    assert path.is_file(), f"integrations/{name}.py has no tests: write {path.relative_to(ROOT)}"
    return path.read_text(encoding="utf-8")


def test_there_are_adapters() -> None:
    assert {"accelerate", "lightning", "transformers"} <= set(ADAPTERS)


@each
def test_an_adapter_is_thin_and_goes_through_an_attachment(name: str) -> None:
    text = (ROOT / "integrations" / f"{name}.py").read_text(encoding="utf-8")
    assert "from .attach import Attachment" in text, "all logic is there: a fix reaches every adapter"
    assert "guarded(" in text, "what a framework calls must not stop its training"
    assert len(text.splitlines()) <= 180


@each
def test_an_adapter_has_a_row_in_the_table_of_what_is_seen_where(name: str) -> None:
    assert "compatibility" in source_of(name), "without the fixture `compatibility` the table has no row"
    assert name in compatibility._PACKAGES
    assert f"| {name}" in (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8").lower()


@each
@pytest.mark.parametrize("claim", ["differences(", "load_state|resume"])
def test_an_adapter_is_tested_for_equal_bits_and_resume(name: str, claim: str) -> None:
    assert any(part in source_of(name) for part in claim.split("|")), f"test_{name}.py never mentions {claim}"


@each
def test_faults_are_injected_into_trainings_with_the_adapter(name: str) -> None:
    scenes = (ROOT / "tests" / "safety" / "scenes.py").read_text(encoding="utf-8")
    assert f"nfi_monitor.integrations.{name} import" in scenes, "add a scene for tests/safety/test_faults.py"


@each
def test_an_adapter_has_an_extra_of_its_own(name: str) -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"\n{name} = [" in pyproject and f'"{name}.*"' in pyproject
