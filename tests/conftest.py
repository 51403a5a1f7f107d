"""What every test stands on: one thread, a known seed, no deadline that a busy machine could miss."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from nfi_monitor.native import library
from tests.spiking import Recorded, record

pytest_plugins = ["tests.compatibility", "tests.safety.table"]

# A deadline measures the machine, not the code.  print_blob: a failure can be replayed from the log.
settings.register_profile(
    "nfi-monitor", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("nfi-monitor")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The models of the tests are small: a second thread costs more than it brings."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def spiking_run(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A real run through a slingshot, recorded once for all tests that read it."""
    return record(tmp_path_factory.mktemp("spiking") / "run")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test begins from seed 0 and leaves torch's global settings as it found them."""
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module", params=["library", "torch"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Use the library, then torch operations; one module at a time."""
    if request.param == "torch":
        with library.disabled():
            yield
        return
    if library.library() is None:
        pytest.skip(f"no C library: {library.missing()}")
    yield
    assert not library.fault()
