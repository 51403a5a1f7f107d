"""Each optimizer of torch is watched rightly; tests/optimizer_sweep.py does the same for other packages."""

from __future__ import annotations

import warnings

import pytest

from tests.optimizer_sweep import classes, compare

OF_TORCH = sorted(name for name in classes() if name.startswith("torch."))


@pytest.mark.parametrize("name", OF_TORCH)
def test_an_optimizer_of_torch_is_watched_rightly(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right, result = compare(name, classes()[name])
    assert right, result
    assert name == "torch.SparseAdam" or "does not run here" not in result
