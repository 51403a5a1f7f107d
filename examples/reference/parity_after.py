"""Analyse the states around each slingshot after the run: test loss, jumps, resets, complexity."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from examples.reference.intervals import intervals
from examples.reference.local_learning import Sampler
from examples.reference.results import episodes
from examples.reference.slingshot_log import EARLY, LOW, Continuation, MakeOptimizer, SlingshotLog, jump
from examples.reference.training import Record

HORIZON = 150
"""Steps of each continuation."""
TINY = 1e-300
"""Replaces a test loss of exactly 0, which has no logarithm."""


@dataclass(frozen=True)
class Task:
    """Hold what the continuations need of the training."""

    loss: Callable[[nn.Module], Tensor]
    test_loss: Callable[[nn.Module], Tensor]
    make_optimizer: MakeOptimizer
    log: SlingshotLog
    rows: tuple[Tensor, Tensor]
    lr: float
    decay: float
    samplers: Mapping[str, Sampler]
    jumps: int


def after(task: Task, record: Record) -> dict[str, Any]:
    """Return the values of a run; ``record.training.model`` itself does not change."""
    model = copy.deepcopy(record.training.model)
    on = Continuation(model, task.make_optimizer, task.loss)
    kept = [_around(task, on, item, index + 10 * record.seed) for index, item in enumerate(task.log.kept)]
    return {
        "final_test_loss": float(record.series["test_loss"][1][-1]),
        "kept": kept,
        "intervals": _test_loss_intervals(record),
    }


def _test_loss_intervals(record: Record) -> dict[str, list[float]]:
    """Return log ratios of test loss, after over before."""
    steps, test = record.series["test_loss"]
    logs = np.log(np.maximum(test, TINY))
    closed = [(first, end) for first, end, _ in episodes(record.loss) if end is not None]
    return intervals(
        record.loss, closed, int(steps[1] - steps[0]), lambda a, b: float(logs[b] - logs[a]), record.seed
    )


def _around(task: Task, on: Continuation, item: Mapping[str, Any], seed: int) -> dict[str, Any]:
    before, end = item["before"]["weights"], item["after"]["weights"]
    sizes = [p.numel() for p in on.model.parameters()]
    test_before, test_after = _test(task, on, item["before"]), _test(task, on, item["after"])
    found: dict[str, Any] = {
        "start": item["start"],
        "end": item["end"],
        "left_floor": item["before"]["step"],
        "test_before": test_before,
        "test_after": test_after,
        "norm_ratio": float(end.norm() / before.norm()),
        "distance": float((end - before).norm()),
        **_kick(task, item),
        "peaks": _resets(on, item),
    }
    for name, layers in (("global", False), ("layers", True)):
        jumped = [
            _jumped(
                task, on, item, jump(before, end - before, sizes, layers, 100 * seed + number), test_before
            )
            for number in range(task.jumps)
        ]
        found[f"jump_{name}"] = [ratio for ratio in jumped if ratio is not None]
        found[f"jump_{name}_lost"] = sum(ratio is None for ratio in jumped)
    if task.samplers:
        # Sample before the slingshot begins and after training has settled. At the edges of a slingshot the
        # loss has no minimum to sample around.
        on.train(on.begin(item["after"]), HORIZON)
        settled = torch.cat([p.detach().reshape(-1) for p in on.model.parameters()])
        found["coefficients"] = {
            name: [
                _coefficient(sampler, task, on.model, w, seed) for w in (item["early"]["weights"], settled)
            ]
            for name, sampler in task.samplers.items()
        }
    return found


def _test(task: Task, on: Continuation, state: Mapping[str, Any]) -> float:
    on.begin(state)
    with torch.no_grad():
        return float(task.test_loss(on.model))


def _kick(task: Task, item: Mapping[str, Any]) -> dict[str, float]:
    """Return the optimizer's part of the updates on the way out, in units of lr.

    A settled Adam takes at most 1.
    """
    state, largest, alignment = item["early"]["weights"], [], []
    earlier = None
    for update in item["updates"]:
        kick = (update + task.lr * task.decay * state) / task.lr
        largest.append(float(kick.abs().quantile(0.99)))
        if earlier is not None:
            alignment.append(float(torch.nn.functional.cosine_similarity(kick, earlier, dim=0)))
        state, earlier = state + update, kick
    return {
        "kick": max(largest),
        "kick_quiet": float(np.median(largest[:EARLY])),
        "alignment": max(alignment),
    }


def _resets(on: Continuation, item: Mapping[str, Any]) -> dict[str, float]:
    """Return the highest loss of the steps after the early state, without a reset and with each reset."""
    return {
        name: max(on.train(on.begin(item["early"], reset), HORIZON))
        for name, reset in (("as_it_was", ""), ("state", "state"), ("count", "count"))
    }


def _jumped(
    task: Task, on: Continuation, item: Mapping[str, Any], weights: Tensor, test_before: float
) -> float | None:
    """Return the log ratio of test loss once the loss is below 1e-2 again; None if that takes too long."""
    optimizer = on.begin({**item["before"], "weights": weights})
    losses = on.train(optimizer, 4 * HORIZON, until=lambda loss: loss < LOW)
    if losses[-1] >= LOW:
        return None
    with torch.no_grad():
        return math.log(max(float(task.test_loss(on.model)), TINY) / max(test_before, TINY))


def _coefficient(sampler: Sampler, task: Task, model: nn.Module, weights: Tensor, seed: int) -> float:
    """Return λ̂ of the training loss around these weights, in float64."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]
    x, y = task.rows
    wide = copy.deepcopy(model).double()

    def one(flat: Tensor) -> Tensor:
        parts = {n: f.reshape(s) for n, f, s in zip(names, flat.split(sizes), shapes, strict=True)}
        return torch.nn.functional.cross_entropy(functional_call(wide, parts, (x.double(),)), y)

    def loss(flat: Tensor) -> Tensor:
        return torch.stack([one(row) for row in flat])

    return sampler.estimate(loss, weights.double(), len(y), seed)
