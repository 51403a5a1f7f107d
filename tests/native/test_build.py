"""The package is built with the library where there is a C compiler, and without it where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("nfi_monitor", "integrations", "examples", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def wheel(folder: Path, compiler: str | None) -> tuple[str, list[str], str]:
    """Build a wheel. Returns its name, its files of native/, and what the build said."""
    pytest.importorskip("setuptools")
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "_nfi.*", "integrations")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored if name == "nfi_monitor" else None)
        else:
            shutil.copy(ROOT / name, folder / name)
    environment = dict(os.environ) if compiler is None else {**os.environ, "CC": compiler}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(folder / "out")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (found,) = (folder / "out").glob("*.whl")
    names = [name for name in zipfile.ZipFile(found).namelist() if "/native/" in name]
    return found.name, names, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_one_wheel_serves_all_pythons_of_a_platform(tmp_path: Path) -> None:
    name, files, _ = wheel(tmp_path, None)
    assert "-py3-none-" in name and not name.endswith("-any.whl")
    assert "nfi_monitor/native/_nfi.so" in files


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("false") is None, reason="no command that always fails")
def test_without_a_compiler_the_package_is_built_and_one_line_says_what_that_costs(tmp_path: Path) -> None:
    _, files, said = wheel(tmp_path, shutil.which("false"))
    assert "nfi_monitor/native/library.py" in files and "nfi_monitor/native/_nfi.so" not in files
    (line,) = [line for line in said.splitlines() if line.startswith("nfi-monitor:")]
    assert "install a C compiler" in line
