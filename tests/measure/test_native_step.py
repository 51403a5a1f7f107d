"""The C library against torch operations, on the same steps of real optimizers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nfi_monitor.capture.head import find_head
from nfi_monitor.capture.optimizer import OptimizerReader
from nfi_monitor.capture.update import Update
from nfi_monitor.measure import native_step
from nfi_monitor.measure import step as eager
from nfi_monitor.measure.memory import Memory
from nfi_monitor.native import library

pytestmark = pytest.mark.skipif(library.library() is None, reason=f"no C library: {library.missing()}")

FAST = settings(deadline=None, derandomize=True, max_examples=60)


def by_library(update: Update, *rest) -> tuple[dict[str, Tensor | float], Memory | None]:
    assert native_step._fits(update)
    found = native_step.step_statistics(update, *rest)
    assert library.fault() == ""
    return found


def updates(model: nn.Sequential, optimizer, steps: int, rows: int, closure: bool = False):
    """Yield update, features and their mean, and the number of the step."""
    reader = OptimizerReader(optimizer, find_head(model, str(len(model) - 1)))
    dtype = model[-1].weight.dtype
    for step in range(1, steps + 1):
        x = torch.randn(rows, model[0].in_features).to(dtype)
        y = torch.randint(model[-1].out_features, (rows,))
        optimizer.zero_grad()
        features = model[:-1](x)
        F.cross_entropy(model[-1](features), y).backward()
        start = reader.before(step)
        optimizer.step()
        h = features.detach() if dtype in (torch.float32, torch.float64) else features.detach().float()
        yield reader.after(start, step), h, h.mean(0), step


def same(found: dict[str, Tensor | float], known: dict[str, Tensor], unit: float) -> None:
    assert found.keys() == known.keys()
    for name, value in known.items():
        # A curvature is a quotient of sums that cancel.
        near = (
            1e5 * unit if name in ("secant_curvature", "gradient_alignment", "mean_alignment") else 300 * unit
        )
        close = pytest.approx(
            value.item(), rel=near, abs=300 * unit if "align" in name else 8 * unit, nan_ok=True
        )
        assert float(found[name]) == close, name


def compare(steps) -> None:
    memories: list[Memory | None] = [None, None]
    for update, features, mean, step in steps:
        found, memories[0] = by_library(update, features, mean, memories[0], step)
        known, memories[1] = eager.step_statistics(update, features, mean, memories[1], step)
        same(found, known, torch.finfo(update.grad.dtype).eps)
        if memories[1] is None:
            assert memories[0] is None
            continue
        for name in ("before", "grad", "feature_mean", "rows"):
            one, two = getattr(memories[0], name), getattr(memories[1], name)
            assert one is two or torch.equal(one, two), name
        torch.testing.assert_close(memories[0].preconditioner, memories[1].preconditioner)
        assert memories[0].layout == memories[1].layout


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "amsgrad": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True),
    "l2": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.3),
    "ascent": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, maximize=True),
    "decays": lambda model: torch.optim.NAdam(
        [
            {"params": part.parameters(), "weight_decay": decay}
            for part, decay in zip(model[::2], (0.3, 0.0, 1.0), strict=True)
        ]
    ),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3),
    "centred": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3, centered=True),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=1e-2, lr_decay=0.1),
    "rprop": lambda model: torch.optim.Rprop(model.parameters(), lr=1e-3),
    "rates": lambda model: torch.optim.AdamW(
        [
            {"params": part.parameters(), "lr": lr}
            for part, lr in zip(model[::2], (1e-2, 0.0, 1e-3), strict=True)
        ]
    ),
    "epsilons": lambda model: torch.optim.AdamW(
        [
            {"params": part.parameters(), "eps": eps, "betas": (0.9, beta)}
            for part, eps, beta in zip(model[::2], (1e-8, 1e-3, 1e-5), (0.999, 0.9, 0.95), strict=True)
        ]
    ),
}


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
def test_the_library_measures_what_torch_measures(optimizer, dtype, width, classes, rows, bias, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, classes, bias=bias),
    ).to(dtype)
    compare(updates(model, OPTIMIZERS[optimizer](model), 4, rows))


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_each_instruction_set_gives_the_same_step(level, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 5)).to(dtype)
    with library.at_level(level) as available:
        if not available:
            pytest.skip("not on this processor")
        compare(updates(model, torch.optim.AdamW(model.parameters()), 4, 20))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e30, 1e-30])
@pytest.mark.parametrize("name", ["grad", "before", "after", "exp_avg_sq"])
def test_odd_numbers_show_as_they_do_in_torch(name, value):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 5))
    memory = None
    for update, features, mean, step in updates(model, torch.optim.AdamW(model.parameters()), 3, 20):
        changed = getattr(update, name).clone()
        changed[40] = value
        odd = replace(update, **{name: changed})
        found, _ = by_library(odd, features, mean, memory, step)
        known, memory = eager.step_statistics(odd, features, mean, memory, step)
        for quantity, expected in known.items():
            if math.isfinite(expected):
                assert float(found[quantity]) == pytest.approx(expected.item(), rel=1e-2, abs=1e-6), quantity
            elif abs(value) != 1e30:  # whose square float32 does not hold, and float64 does
                assert not math.isfinite(found[quantity]), quantity


def test_a_reading_without_rows_measures_the_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 5))
    steps = list(updates(model, torch.optim.AdamW(model.parameters()), 3, 20))
    compare((update, None, None, step) for update, _, _, step in steps)
    bare = [replace(update, head_weight=None, head_weight_grad=None) for update, *_ in steps]
    for update, step in zip(bare, itertools.count(1)):
        known, _ = eager.step_statistics(update, None, None, None, step)
        same(by_library(update, None, None, None, step)[0], known, 1e-7)


def test_a_large_head_is_left_to_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2_000))
    compare(updates(model, torch.optim.AdamW(model.parameters()), 3, 64))


def test_an_error_in_the_library_leaves_the_step_to_torch(monkeypatch):
    class Broken:
        def nfi_step(self, address: int) -> int:
            return 1

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    ((update, features, mean, step),) = updates(model, torch.optim.AdamW(model.parameters()), 1, 5)
    with monkeypatch.context() as patch:
        patch.setattr(library, "library", Broken)
        patch.setattr(library._state, "fault", "")
        patch.setattr(library._state, "failures", 0)
        found, _ = native_step.step_statistics(update, features, mean, None, step)
        assert library.fault().startswith("MemoryError")
    known, _ = eager.step_statistics(update, features, mean, None, step)
    assert {name: float(x) for name, x in found.items()} == {name: x.item() for name, x in known.items()}
