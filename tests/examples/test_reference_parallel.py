"""Calls over processes: nothing is lost, and a backend that is not installed is named."""

from __future__ import annotations

import sys

import pytest
from joblib import delayed

from examples.reference.parallel import BackendError, as_completed


def test_every_call_is_done_once() -> None:
    found = as_completed((delayed(pow)(number, 2) for number in range(20)), jobs=2)
    assert sorted(found) == [number**2 for number in range(20)]


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.util.joblib", None)
    with pytest.raises(BackendError, match=r'pip install "ray\[default\]"'):
        list(as_completed([delayed(pow)(2, 2)], jobs=2, backend="ray"))


@pytest.mark.slow
def test_rays_backend_gives_the_same_results() -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    found = as_completed((delayed(pow)(number, 2) for number in range(20)), jobs=2, backend="ray")
    assert sorted(found) == [number**2 for number in range(20)]
