"""The library is there where it can be, and torch operations serve where it is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nfi_monitor import Monitor
from nfi_monitor.capture.sampling import CoordinateSample
from nfi_monitor.native import library
from nfi_monitor.native.gather import Gather
from tests.spiking import division, scene

ROOT = Path(__file__).resolve().parents[2]


def test_where_there_is_a_compiler_the_library_is_built() -> None:
    if os.environ.get(library.SWITCH) == "0" or shutil.which("cc") is None:
        pytest.skip("no C compiler, or switched off")
    assert library.missing() == "", "install the package again: pip install -e ."


def test_the_sources_that_the_build_names_are_all_there() -> None:
    named = (ROOT / "setup.py").read_text(encoding="utf-8")
    for path in (ROOT / "nfi_monitor" / "native").glob("*.[ch]"):
        assert path.name in named


def test_the_switch_leaves_the_library_alone() -> None:
    code = "from nfi_monitor.native import library; print(library.library(), library.missing())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, library.SWITCH: "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"None {library.SWITCH}=0\n"


def readings(steps: int = 12) -> dict[str, tuple[list[int], list[float]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs, targets = torch.randn(32, 6), torch.randint(5, (32,))
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(steps):
            loss = F.cross_entropy(model(inputs), targets)
            monitor.observe_loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert not [note for note in monitor.notes if note.code.startswith("failed")]
        return {name: monitor.history[name] for name in monitor.history}


@pytest.mark.skipif(library.library() is None, reason="no C library")
def test_a_run_records_the_same_quantities_either_way() -> None:
    found = readings()
    with library.disabled():
        known = readings()
    assert found.keys() == known.keys()
    # Rounding of the whole step, divided by small differences.
    rough = ("secant_curvature", "update_rms", "relative_update", "feature_displacement")
    for name, (steps, values) in known.items():
        assert list(found[name][0]) == list(steps), name
        near = 1e-3 if name in rough else 1e-5
        assert list(found[name][1]) == pytest.approx(list(values), rel=near, abs=3e-7, nan_ok=True), name


def alerts(steps: int, seed: int) -> list[tuple[object, ...]]:
    model, optimizer, step = division(seed)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for n in range(1, steps + 1):
            step(monitor, n)
        return [(alert.kind, alert.mechanism, alert.first_step, alert.last_step) for alert in monitor.alerts]


@pytest.mark.skipif(library.library() is None, reason="no C library")
def test_a_slingshot_is_called_the_same_either_way() -> None:
    found = alerts(scene().steps, scene().seed)
    with library.disabled():
        assert alerts(scene().steps, scene().seed) == found
    assert found


@pytest.mark.skipif(library.library() is None, reason="no C library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [5, 300, 50_000])
def test_coordinates_are_gathered_bit_for_bit(dtype: torch.dtype, size: int) -> None:
    tensors = [torch.randn(size, 3).to(dtype), torch.randn(7).to(dtype), torch.tensor(2.0, dtype=dtype)]
    sample = CoordinateSample(tensors)
    found = sample.gather(tensors)
    with library.disabled():
        known = sample.gather(tensors)
    assert found.dtype is known.dtype and torch.equal(found, known)


def test_a_tensor_without_memory_is_not_gathered() -> None:
    tensor = torch.randn(5)
    gather = Gather([1], [5])
    assert library.library() is None or torch.equal(gather.copy([tensor]), tensor)
    tensor.untyped_storage().resize_(0)
    assert gather.copy([tensor]) is None


@pytest.mark.skipif(library.library() is None, reason="no library")
def test_one_error_costs_one_reading_and_the_third_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fault", "failures"):
        monkeypatch.setattr(library._state, name, type(getattr(library._state, name))())
    served = []
    for _ in range(library.MOST_FAILURES):
        served.append(library.library() is not None)
        library.failed(MemoryError("no memory"))
    assert served == [True] * library.MOST_FAILURES and library.library() is None
    assert library.fault() == "MemoryError: no memory"
