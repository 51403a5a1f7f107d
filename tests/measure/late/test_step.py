"""A step reduced for a late host against the same step measured at once."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nfi_monitor.capture.update import Update
from nfi_monitor.measure import step as eager
from nfi_monitor.measure.late.step import late_step
from nfi_monitor.measure.memory import Memory
from tests.measure.late import unexpected
from tests.measure.test_native_step import OPTIMIZERS, same, updates
from tests.own_optimizers import Own

FAST = settings(deadline=None, derandomize=True, max_examples=60)


def arrived(
    update: Update, features: Tensor | None, mean: Tensor | None, memory: Memory | None, step: int
) -> tuple[dict[str, float], Memory | None]:
    late, memory = late_step(update, features, mean, memory, step)
    numbers = torch.cat([*late.flat, torch.ones(1)])
    found, rest = late.outline().read(numbers, unexpected)
    assert rest.tolist() == [1.0]
    return found, memory


def compare(steps, unit: float) -> None:
    memories: list[Memory | None] = [None, None]
    for update, features, mean, step in steps:
        found, memories[0] = arrived(update, features, mean, memories[0], step)
        known, memories[1] = eager.step_statistics(update, features, mean, memories[1], step)
        same(found, known, unit)
        for one, two in zip(memories, memories[::-1], strict=True):
            metrics = [getattr(memory, "preconditioner", None) for memory in (one, two)]
            assert (metrics[0] is None) == (metrics[1] is None)
            assert metrics[0] is None or torch.equal(*metrics)


@FAST
@given(
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    width=st.sampled_from([3, 16, 130, 400]),
    classes=st.sampled_from([1, 2, 5, 70]),
    rows=st.sampled_from([1, 2, 9, 80]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_step_that_arrives_late_is_that_measured_at_once(
    optimizer, dtype, width, classes, rows, bias, seed
):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, classes, bias=bias),
    ).to(dtype)
    # Sampling rates are float32, also where the weights are not.
    unit = 1e-4 if dtype is torch.bfloat16 else torch.finfo(torch.float32).eps
    compare(updates(model, OPTIMIZERS[optimizer](model), 4, rows), unit)


def test_a_step_without_rows_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 5))
    steps = updates(model, torch.optim.AdamW(model.parameters()), 3, 20)
    compare(((update, None, None, step) for update, _, _, step in steps), torch.finfo(torch.float32).eps)


def test_tensors_without_a_second_moment_come_after_those_that_have_one() -> None:
    """The sample holds both: sums over moments are of the first tensors alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 5))
    whole = list(updates(model, torch.optim.AdamW(model.parameters()), 3, 20))
    end = whole[0][0].sample.spans[1][0]
    parts = []
    for update, *rest in whole:
        assert update.exp_avg_sq is not None
        part = {**vars(update), "moments": 1, "exp_avg_sq": update.exp_avg_sq[:end], "params": (1, 2, 3, 4)}
        parts.append((Update(**part), *rest))  # type: ignore[arg-type]
    compare(parts, torch.finfo(torch.float32).eps)


def test_an_optimizer_of_ones_own_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))
    compare(updates(model, Own(model.parameters()), 6, 9), torch.finfo(torch.float32).eps)
