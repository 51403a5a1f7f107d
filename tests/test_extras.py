"""Only a package that is missing is to be installed; another error of an import says why itself."""

from __future__ import annotations

import builtins
import importlib
import sys
from typing import Any

import pytest

from nfi_monitor.extras import raise_missing

ADVICE = 'pip install "nfi-monitor[some]"'


def test_a_missing_package_gets_the_advice() -> None:
    missing = ModuleNotFoundError("No module named 'some'", name="some")
    with pytest.raises(ImportError, match=r"nfi-monitor\[some\]") as raised:
        raise_missing(missing, ("some", "other"), ADVICE)
    assert raised.value.__cause__ is missing


@pytest.mark.parametrize(
    "error",
    [
        ImportError("cannot import name 'TrainerCallback' from 'some'", name="some"),
        ModuleNotFoundError("No module named 'json.part'", name="json.part"),
        ModuleNotFoundError("No module named 'unrelated'", name="unrelated"),
        ModuleNotFoundError("Could not import module 'X'. Are its requirements defined correctly?"),
    ],
)
def test_any_other_error_is_raised_as_it_is(error: ImportError) -> None:
    with pytest.raises(ImportError) as raised:
        raise_missing(error, ("some", "json"), ADVICE)
    assert raised.value is error


@pytest.mark.parametrize("adapter", ["transformers", "lightning", "accelerate"])
def test_an_adapter_whose_package_is_broken_says_the_packages_own_reason(
    adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(adapter)
    name = f"nfi_monitor.integrations.{adapter}"
    before = builtins.__import__

    def broken(module: str, *arguments: Any, **keywords: Any) -> Any:
        if module.partition(".")[0] == adapter:
            raise ImportError("torchvision::nms does not exist")
        return before(module, *arguments, **keywords)

    kept = sys.modules.pop(name, None)
    monkeypatch.setattr(builtins, "__import__", broken)
    try:
        with pytest.raises(ImportError, match="torchvision::nms does not exist"):
            importlib.import_module(name)
    finally:
        monkeypatch.undo()
        if kept is not None:
            sys.modules[name] = kept
