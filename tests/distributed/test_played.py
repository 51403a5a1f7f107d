"""Ranks whose numbers arrive late exchange what ranks on the host exchange."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.distributed.test_ranks import launched
from tests.played.test_kernels import MOST


def test_ranks_on_accelerators_read_what_ranks_on_the_host_read_and_never_wait(tmp_path: Path) -> None:
    outcome = launched(tmp_path, {"played.late": 2})("played.late")
    if "missing" in outcome[0]:
        pytest.skip(outcome[0]["missing"])
    for one in outcome:
        there, here = one["played"], one["cpu"]
        assert not there["waits"] and there["notes"] == here["notes"] and there["step"] == here["step"]
        assert there["phases"] == here["phases"] and there["alerts"] == here["alerts"]
        assert there["history"].keys() == here["history"].keys()
        for name, (steps, values) in here["history"].items():
            if name == "feature_displacement":  # μ_G of all ranks is known some steps later
                assert there["history"][name][0][0] <= 6, name
                continue
            assert there["history"][name][0] == steps, name
            least = 1e-4 * max((abs(x) for x in values if math.isfinite(x)), default=1.0)
            near = pytest.approx(values, rel=1e-3, abs=max(least, 1e-7), nan_ok=True)
            assert there["history"][name][1] == near, name
    assert outcome[0]["played"]["history"] == outcome[1]["played"]["history"]
    assert 0 < outcome[0]["played"]["kernels"] <= MOST
