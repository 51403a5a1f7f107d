"""Start an example as ``python examples/NAME.py ARGUMENTS`` does, in a process forked from this one.

What only a fresh interpreter can show, that an example finds all it imports, one of them shows
(test_examples.py), and torchrun the slow tests of test_ddp.py.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {"COLUMNS": "120", "NO_COLOR": "1", "MPLBACKEND": "Agg"}
"""A wide terminal without colours."""
HEAVY = ("torch._dynamo", "matplotlib.pyplot", "sklearn.datasets", "torch.utils.tensorboard")
"""What examples import at once or on their way."""


def started(name: str, *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None) -> Forked:
    def program() -> None:
        sys.argv = [str(ROOT / "examples" / f"{name}.py"), *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")

    return Forked(program, cwd, PLAIN | dict(environment or {}), HEAVY)
