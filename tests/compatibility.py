"""The compatibility matrix: what the monitor sees, framework by framework, taken from the tests that passed.

    python -m tests.compatibility            # run those tests, slow ones too, and write docs/compatibility.md
    python -m tests.compatibility --print    # print the table instead

A test adds its row with the ``compatibility`` fixture, after it has shown that weights, optimizer and random
state are bitwise those of the same training without the monitor.  In an ordinary test run the fixture holds
each row against the table in docs/compatibility.md, so that the table cannot go stale.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "compatibility.md"
_ROW = "nfi_compatibility"
_ORDER = ("PyTorch", "Transformers", "Lightning", "Accelerate")
_PACKAGES = ("torch", "transformers", "lightning", "accelerate")


@dataclass(frozen=True)
class Row:
    """What one training showed. Each of the last four says whether it was there in every step read."""

    framework: str
    mode: str
    rows: bool
    weight_gradient: bool
    second_moment: bool
    loss: bool
    recomputed: bool = False
    """Whether the rows were recomputed, because the loss makes no logits."""

    @classmethod
    def of(cls, framework: str, mode: str, seen: Mapping[str, Any]) -> Row:
        """``seen``: a monitor's ``history``, or any mapping from a quantity to (steps, values)."""

        def has(*names: str) -> bool:
            return any(name in seen and len(seen[name][0]) > 0 for name in names)

        return cls(
            framework,
            mode,
            rows=has("live_fraction"),
            weight_gradient=has("zero_sum_violation_weight"),
            second_moment=has("sqrt_exp_avg_sq_median"),
            loss=has("loss"),
            recomputed=has("recomputed_fraction"),
        )

    def line(self) -> str:
        """The row of the table."""
        marks = [
            "yes" if seen else "–"
            for seen in (self.rows, self.weight_gradient, self.second_moment, self.loss)
        ]
        if self.recomputed:
            marks[0] = "recomputed"
        return f"| {self.framework} | {self.mode} | {' | '.join(marks)} | yes |"


class Recorder:
    """The ``compatibility`` fixture: ``compatibility(framework, mode, monitor.history)``."""

    def __init__(self, record: Callable[[str, object], None], table: str | None) -> None:
        self._record = record
        self._table = table

    def __call__(self, framework: str, mode: str, seen: Mapping[str, Any]) -> Row:
        """Call it last: a test that fails has shown nothing."""
        row = Row.of(framework, mode, seen)
        self._record(_ROW, asdict(row))
        assert self._table is None or row.line() in self._table, (
            f"{TABLE.relative_to(ROOT)} does not say so:\n{row.line()}\n"
            "If that is what should be seen, renew it: python -m tests.compatibility"
        )
        return row


@pytest.fixture
def compatibility(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Recorder:
    renewing = request.config.getoption("--matrix") is not None
    return Recorder(record_property, None if renewing else TABLE.read_text(encoding="utf-8"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix", metavar="FILE", help="run the tests that make compatibility rows, write them to FILE"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--matrix") is not None:
        items[:] = [item for item in items if "compatibility" in getattr(item, "fixturenames", ())]


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--matrix")
    if path is not None and not hasattr(config, "workerinput"):  # a worker of xdist reports to its controller
        config.pluginmanager.register(_Collector(Path(path)))


class _Collector:
    """Keeps the rows of passed tests; they travel as user properties, also from xdist's workers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[object] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._rows += [value for name, value in report.user_properties if name == _ROW]

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps(self._rows), encoding="utf-8")


def render(rows: list[Row]) -> str:
    """The page: frameworks in a fixed order, modes in that of the tests."""

    def rank(row: Row) -> int:
        return _ORDER.index(row.framework) if row.framework in _ORDER else len(_ORDER)

    versions = ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in _PACKAGES)
    lines = [row.line() for row in sorted(dict.fromkeys(rows), key=rank)]
    return "\n".join(
        [
            "# What is seen where",
            "",
            "Made from the tests that passed (`python -m tests.compatibility`), with " + versions + ".",
            "",
            "*rows*: zero-sum, absorption and margins of single rows; *recomputed*: the loss makes no",
            "logits, and those of up to 64 rows are computed once more. *head's gradient*: the zero-sum of",
            "the head's weight gradient, at batch level; it means nothing for a tied head. *second moment*:",
            "sqrt(v̂), RMS_t and what follows from them. *loss*: of every step, without a call of yours.",
            "*bitwise*: weights, optimizer and random state are those of the training without the monitor.",
            "",
            "| framework | mode | rows | head's gradient | second moment | loss | bitwise |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--print", action="store_true", help="print the table, write nothing")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        failed = pytest.main(["-q", "-m", "slow or not slow", "--matrix", str(file), str(ROOT / "tests")])
        rows = [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []
    if failed or not rows:
        print("The table is left as it was: not all tests passed.", file=sys.stderr)
        return 1
    page = render(rows)
    if arguments.print:
        print(page)
    else:
        TABLE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
