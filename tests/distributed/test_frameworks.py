"""The adapters under data parallel training: real Trainers in two processes that have to agree."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest

from tests.compatibility import Recorder
from tests.distributed.test_ranks import Outcome, launched

# Looked for and not imported: these processes only start the ones that do.
MISSING = [name for name in ("transformers", "lightning") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f'pip install "nfi-monitor[{",".join(MISSING)}]"')
STEPS, TURN = 30, 6  # of tests.distributed.frameworks, which only its own processes import


def framework_cases(factory: pytest.TempPathFactory, *cases: str) -> Callable[[str], Outcome]:
    outcome = launched(factory.mktemp("frameworks"), {f"frameworks.{case}": 2 for case in cases})
    return lambda case: outcome(f"frameworks.{case}")


@pytest.fixture(scope="module")
def acting(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    return lambda case: framework_cases(tmp_path_factory, case)(case)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    return framework_cases(tmp_path_factory, "hf_bitwise", "lightning_bitwise")


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("hf_actions", "checkpoint-{}"),
        pytest.param("lightning_actions", "nfi-step={}.ckpt", marks=pytest.mark.slow),
    ],
)
def test_all_ranks_save_and_stop_at_the_step_at_which_one_has_something_to_warn_of(
    case: str, name: str, acting: Callable[[str], Outcome]
) -> None:
    one, two = acting(case)  # None had to be ended, because it waited for the other
    assert one is not None and two is not None
    assert one["alerts"] == two["alerts"] and one["notes"] == two["notes"] == {}
    (alert,) = one["alerts"]
    assert (alert["kind"], alert["rank"]) == ("at_risk", 0)
    step = alert["first_step"]
    assert TURN <= step < STEPS
    assert one["step"] == two["step"] == one["watched"] == two["watched"] == step
    assert one["files"] == two["files"] == [name.format(step)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "framework"), [("hf_bitwise", "Transformers"), ("lightning_bitwise", "Lightning")]
)
def test_data_parallel_training_is_bitwise_equal_with_and_without_the_callback(
    case: str, framework: str, compared: Callable[[str], Outcome], compatibility: Recorder
) -> None:
    one, two = compared(case)
    for rank in (one, two):
        assert rank["state"] == [] and rank["notes"] == {}
        assert rank["step"] == rank["watched"] == STEPS
    assert one["history"] == two["history"]
    compatibility(framework, "DistributedDataParallel, 2 processes", one["history"])
