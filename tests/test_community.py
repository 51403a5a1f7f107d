"""What the files around the code say agrees with the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from nfi_monitor._version import __version__

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).resolve().parents[1]


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def jobs() -> dict[str, Any]:
    """The jobs of the workflow, {name: job}."""
    return yaml.safe_load(text(".github/workflows/test.yml"))["jobs"]


def commands(job: dict[str, Any]) -> str:
    """All shell commands of a job, one after the other."""
    return "\n".join(step.get("run", "") for step in job["steps"])


def test_the_citation_and_the_changelog_name_this_version() -> None:
    citation = yaml.safe_load(text("CITATION.cff"))
    newest = re.search(r"^## \[(\d.*?)\] - (\S+)$", text("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert (citation["version"], citation["date-released"]) == newest.groups()
    assert citation["version"] == __version__


def test_the_workflow_tests_every_python_that_is_claimed() -> None:
    project = text("pyproject.toml")
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    oldest = re.search(r'^requires-python = ">=(.*)"$', project, re.MULTILINE)
    assert oldest is not None and claimed[0] == oldest[1]
    assert jobs()["newest"]["strategy"]["matrix"]["python"] == claimed


def test_the_workflow_tests_the_oldest_versions_that_are_claimed() -> None:
    declared = re.search(r"^dependencies = \[(.*)\]$", text("pyproject.toml"), re.MULTILINE)
    assert declared is not None
    claimed = dict(re.findall(r'"(\w+)>=([\d.]+)"', declared[1]))
    tested = dict(re.findall(r"\b(\w+)==([\d.]+)", commands(jobs()["oldest"])))
    assert "torch" in claimed
    assert {name: Version(tested[name]) for name in claimed} == {n: Version(v) for n, v in claimed.items()}


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_a_form_or_workflow_is_a_yaml_mapping(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
