"""The C library under the compiler's sanitizers, with random sizes, strides and bits."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import nfi_monitor.native

SOURCES = Path(nfi_monitor.native.__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
CALLS = 24_000


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("no C compiler")
    target = tmp_path_factory.mktemp("sanitized") / "fuzz"
    sources = [*sorted(SOURCES.glob("*.c")), Path(__file__).with_name("fuzz.c")]
    options = ["-std=c11", "-O1", "-g", "-fopenmp-simd", "-Wall", "-Wextra", "-Werror"]
    options += ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    built = subprocess.run(
        [COMPILER, *options, f"-I{SOURCES}", *map(str, sources), "-lm", "-o", str(target)],
        capture_output=True,
        text=True,
    )
    if built.returncode and "sanitize" in built.stderr:
        pytest.skip(f"this compiler has no sanitizers: {built.stderr.splitlines()[0]}")
    assert built.returncode == 0, built.stderr
    return target


def run(program: Path, calls: int, seed: int) -> None:
    done = subprocess.run([program, str(calls), str(seed)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"{calls} calls\n"


def test_a_few_random_calls_touch_no_memory_but_theirs(program: Path) -> None:
    run(program, 300, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_many_random_calls_touch_no_memory_but_theirs(program: Path, seed: int) -> None:
    run(program, CALLS // 2, seed)
