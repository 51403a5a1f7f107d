"""What an installed copy promises before anything is trained."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Fixed by the first issue; more may be public, none of these may go away.
PUBLIC = ["Alert", "Mechanism", "Monitor", "Phase", "Severity", "Thresholds", "__version__"]


def python(code: str) -> str:
    """The output of ``code`` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def installed() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("nfi-monitor")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nfi-monitor is not installed here; `make test` installs it")


def test_importing_the_package_imports_neither_torch_nor_numpy_nor_rich() -> None:
    heavy = ("torch", "numpy", "rich", "matplotlib", "tensorboard", "transformers")
    code = f"import sys, nfi_monitor; print([name for name in {heavy!r} if name in sys.modules])"
    assert python(code) == "[]"


def test_importing_the_vocabulary_and_the_detector_imports_no_torch() -> None:
    code = (
        "import sys, nfi_monitor.types, nfi_monitor.quantities, nfi_monitor.detect.detector;"
        "print('torch' in sys.modules)"
    )
    assert python(code) == "False"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_resolves_and_is_listed(name: str) -> None:
    package = importlib.import_module("nfi_monitor")
    assert getattr(package, name) is not None
    assert name in dir(package)


def test_every_listed_name_resolves() -> None:
    package = importlib.import_module("nfi_monitor")
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    package = importlib.import_module("nfi_monitor")
    with pytest.raises(AttributeError, match="Monitr"):
        _ = package.Monitr


def test_a_public_name_can_be_imported_without_the_others_being_asked_for() -> None:
    assert python("from nfi_monitor import Thresholds; import sys; print('torch' in sys.modules)") == "False"


def test_the_version_is_the_one_in_the_metadata() -> None:
    package = importlib.import_module("nfi_monitor")
    assert package.__version__ == installed().version


def test_the_command_is_the_entry_point() -> None:
    scripts = {
        entry.name: entry.value for entry in installed().entry_points if entry.group == "console_scripts"
    }
    assert scripts["nfi-monitor"] == "nfi_monitor.cli:main"
    assert callable(importlib.import_module("nfi_monitor.cli").main)


@pytest.mark.parametrize("name", ["01_plain_loop", "02_modular_division", "03_sparse_parity"])
def test_an_example_is_importable_from_the_installed_package(name: str) -> None:
    installed()
    example = importlib.import_module(f"nfi_monitor.examples.{name}")
    assert callable(example.main)


def test_the_adapters_are_importable_and_import_no_framework() -> None:
    installed()
    heavy = ("torch", "transformers", "lightning", "accelerate")
    code = f"import sys, nfi_monitor.integrations; print([name for name in {heavy!r} if name in sys.modules])"
    assert python(code) == "[]"


def test_the_package_is_marked_as_typed() -> None:
    package = importlib.import_module("nfi_monitor")
    assert (Path(package.__path__[0]) / "py.typed").is_file()


def test_every_package_directory_is_listed_for_the_build() -> None:
    """``packages`` is written by hand: a subpackage that is missing there is missing in the wheel."""
    listing = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = {
        ".".join(("nfi_monitor", *path.parent.relative_to(ROOT / "nfi_monitor").parts))
        for path in (ROOT / "nfi_monitor").rglob("*.py")
    }
    assert {name for name in found if f'"{name}"' not in listing} == set()


def test_the_pins_are_within_the_ranges() -> None:
    """A pin outside the published range would make CI test what no user can install."""
    requirements = pytest.importorskip("packaging.requirements")
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            pin = requirements.Requirement(line)
            pins[pin.name.lower()] = next(iter(pin.specifier)).version
    declared = [requirements.Requirement(line) for line in installed().requires or []]
    outside = [
        f"{item.name}{item.specifier}: {pins[item.name]}"
        for item in declared
        if item.name in pins and not item.specifier.contains(pins[item.name])
    ]
    assert outside == []
