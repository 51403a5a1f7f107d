"""RMS_t, alignment and curvature are of the gradient that the optimizer steps by, against float64 by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import Optimizer

from nfi_monitor.measure.sharded.step import finish_step, step_parts
from tests import own_optimizers as own
from tests.measure.late.test_step import arrived
from tests.measure.test_optimizers import Trained, flat

optim = torch.optim
EPS = 1e-8
Make = Callable[[Any], Optimizer]

ADAMS: dict[str, tuple[Make, float, float]] = {
    "adam": (lambda p: optim.Adam(p, 1e-2, betas=(0.9, 0.99), weight_decay=0.5), 0.5, 1.0),
    "nadam": (lambda p: optim.NAdam(p, 1e-2, betas=(0.9, 0.99), weight_decay=0.5), 0.5, 1.0),
    "radam": (lambda p: optim.RAdam(p, 1e-2, betas=(0.9, 0.99), weight_decay=0.5), 0.5, 1.0),
    "decoupled": (
        lambda p: optim.NAdam(
            p, 1e-2, betas=(0.9, 0.99), weight_decay=0.5, decoupled_weight_decay=True
        ), 0.0, 1.0,
    ),
    "adamw": (lambda p: optim.AdamW(p, 1e-2, betas=(0.9, 0.99), weight_decay=0.5), 0.0, 1.0),
    "maximize": (
        lambda p: optim.Adam(p, 1e-2, betas=(0.9, 0.99), weight_decay=0.5, maximize=True), 0.5, -1.0,
    ),
    "ascent": (lambda p: optim.AdamW(p, 1e-2, betas=(0.9, 0.99), maximize=True), 0.0, -1.0),
}  # fmt: skip
"""Optimizer, its coupled decay, and the sign of the gradient in its step."""
OTHERS: dict[str, tuple[Make, float, Callable[[dict[str, Any]], torch.Tensor | float]]] = {
    "sgd": (lambda p: optim.SGD(p, 1e-2, weight_decay=0.5), 1.0, lambda state: 1.0),
    "sgd upwards": (lambda p: optim.SGD(p, 1e-2, weight_decay=0.5, maximize=True), -1.0, lambda state: 1.0),
    "rmsprop": (
        lambda p: optim.RMSprop(p, 1e-2, weight_decay=0.5),
        1.0,
        lambda state: state["square_avg"].sqrt() + EPS,
    ),
    "adagrad": (
        lambda p: optim.Adagrad(p, 1e-2, weight_decay=0.5, eps=EPS),
        1.0,
        lambda state: state["sum"].sqrt() + EPS,
    ),
}  # fmt: skip
HEAD = slice(63, 99)  # the head's weight among the coordinates


def roots(optimizer: Optimizer) -> np.ndarray:
    """sqrt(v̂) of all coordinates, from the optimizer's state."""
    states = optimizer.state.values()
    return flat((state["exp_avg_sq"] / (1 - 0.99 ** float(state["step"]))).sqrt() for state in states)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("name", ADAMS)
def test_rms_t_alignment_and_curvature_are_of_the_gradient_in_the_step(name: str) -> None:
    make, decay, sign = ADAMS[name]
    run, last = Trained(make), None
    for number in range(1, 6):
        found = run.step(number)
        got, root = sign * run.grad + decay * run.before, roots(run.optimizer)
        ratio = got[HEAD] / np.maximum(root[HEAD], EPS)
        assert found["rms_t_head"] == pytest.approx(np.sqrt(np.mean(ratio**2)), rel=1e-9)
        assert found["gradient_norm"] == pytest.approx(np.linalg.norm(run.grad), rel=1e-9)
        if last is not None:
            before, was, divided_by = last
            moved = run.before - before
            assert found["gradient_alignment"] == pytest.approx(cosine(got, was), rel=1e-9)
            curved = 1e-2 * (moved @ (got - was)) / (moved @ (divided_by * moved))
            assert found["secant_curvature"] == pytest.approx(curved, rel=1e-9)
        last = run.before, got, root + EPS


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("name", OTHERS)
def test_so_is_the_curvature_under_other_optimizers(name: str) -> None:
    make, sign, metric = OTHERS[name]
    run, last = Trained(make), None
    for number in range(1, 5):
        found = run.step(number)
        got = sign * run.grad + 0.5 * run.before
        assert found["gradient_norm"] == pytest.approx(np.linalg.norm(run.grad), rel=1e-9)
        if last is not None:
            before, was, divided_by = last
            moved = run.before - before
            assert found["gradient_alignment"] == pytest.approx(cosine(got, was), rel=1e-9)
            curved = 1e-2 * (moved @ (got - was)) / (moved @ (divided_by * moved))
            assert found["secant_curvature"] == pytest.approx(curved, rel=1e-9)
        params = list(run.model.parameters())
        states = [run.optimizer.state.get(param, {}) for param in params]
        each = [torch.ones_like(p) * metric(state) for p, state in zip(params, states, strict=True)]
        last = run.before, got, flat(each)


def test_each_group_has_its_own_decay_and_sign() -> None:
    def make(params: Any) -> Optimizer:
        body, bias, *head = params
        groups = [
            {"params": [body, bias], "weight_decay": 0.2, "maximize": True},
            {"params": head, "weight_decay": 0.7},
        ]
        return optim.Adam(groups, 1e-2, betas=(0.9, 0.99))

    run = Trained(make)
    for number in range(1, 4):
        found = run.step(number)
        got = np.concatenate([0.2 * run.before[:63] - run.grad[:63], 0.7 * run.before[63:] + run.grad[63:]])
        ratio = got / np.maximum(roots(run.optimizer), EPS)
        each = [np.sqrt(np.mean(part**2)) for part in np.split(ratio, [54, 63, 99])]
        assert found["rms_t_max"] == pytest.approx(max(each), rel=1e-9)


def test_a_decay_that_the_check_of_the_moment_has_found_counts_too() -> None:
    """The optimizer is not torch's: that it couples its decay is seen in how its moment moves."""
    run = Trained(lambda p: own.Coupled(p, lr=1e-2, weight_decay=0.5))
    for number in range(1, 12):
        found = run.step(number)
    got = run.grad[HEAD] + 0.5 * run.before[HEAD]
    ratio = got / np.maximum(roots(run.optimizer)[HEAD], EPS)
    assert found["rms_t_head"] == pytest.approx(np.sqrt(np.mean(ratio**2)), rel=1e-6)


@pytest.mark.parametrize("name", ["adam", "maximize"])
def test_late_and_sharded_steps_are_of_it_too(name: str) -> None:
    run = Trained(ADAMS[name][0])
    memories: list[Any] = [None, None]
    for number in range(1, 4):
        known, reader = run.memory, run.reader
        kept, after = [], reader.after

        def read(*given: Any, after: Any = after, kept: list[Any] = kept) -> Any:
            kept.append(after(*given))
            return kept[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reader, "after", read)
            found = run.step(number)
        late, memories[0] = arrived(kept[0], run.features, run.features.mean(0), memories[0], number)
        parts, memories[1] = step_parts(kept[0], range(4), [1.0] * 4, 4, memories[1], number)
        shards = finish_step(parts.sums, parts.tensors, [True, False, True, False], 2, 1e-2)
        names = ["rms_t_head", "rms_t_max", "gradient_norm"]
        names += [] if known is None else ["gradient_alignment", "secant_curvature"]
        for values in (late, shards):
            for at in names:
                assert values[at] == pytest.approx(found[at], rel=1e-5), at
