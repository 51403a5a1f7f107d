"""What ``zero_sum_cross_entropy`` costs beside ``F.cross_entropy``: time and memory, forward and backward."""

from __future__ import annotations

import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nfi_monitor.remedies import float64_cross_entropy, zero_sum_cross_entropy
from nfi_monitor.remedies.few_rows import SMALL

SHAPES = ((32, 10), (128, 10), (512, 10), (1024, 10), (256, 1000), (256, 50_257))
"""Rows and classes."""
BASE, NOTHING_COMPUTED = "F.cross_entropy", "autograd.Function, nothing computed"
LOSSES: dict[str, Callable[..., Tensor]] = {
    BASE: F.cross_entropy,
    "zero_sum_cross_entropy": zero_sum_cross_entropy,
    "float64_cross_entropy": float64_cross_entropy,
}


def measure(rows: int, classes: int, seconds: float = 6.0) -> dict[str, Any]:
    """Per loss: µs of a forward and backward pass (median), its ratio to F.cross_entropy's, peak bytes.

    Ratios, as quartiles, are of one round's passes, whose order is drawn anew each time: what a pass leaves
    in the caches, and a neighbour's work, then fall on all alike.
    """
    torch.manual_seed(0)
    logits = torch.randn(rows, classes, requires_grad=True)
    target = torch.randint(0, classes, (rows,))
    losses = dict(LOSSES)
    if logits.numel() <= SMALL:
        given = np.zeros((), np.float32), torch.zeros_like(logits)
        losses[NOTHING_COMPUTED] = lambda z, _: _Given.apply(z, *given)
    times: dict[str, list[float]] = {name: [] for name in losses}
    order, draw = list(losses), random.Random(0)

    def round_of_passes() -> None:
        draw.shuffle(order)
        for name in order:
            logits.grad = None
            started = time.perf_counter()
            losses[name](logits, target).backward()
            times[name].append(time.perf_counter() - started)

    round_of_passes()
    for spent in times.values():
        spent.clear()  # the first finds nothing loaded
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times[BASE]) < 7:
        round_of_passes()
    return {
        name: {
            "microseconds": 1e6 * statistics.median(times[name]),
            "ratio": statistics.quantiles([a / b for a, b in zip(times[name], times[BASE], strict=True)]),
            "peak_bytes": peak(loss, logits, target),
        }
        for name, loss in losses.items()
    }


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: np.ndarray[Any, Any], gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return torch.from_numpy(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0], None, None


def peak(loss: Callable[..., Tensor], logits: Tensor, target: Tensor) -> int:
    """Most bytes held at once in a pass, the gradient included: torch's, and Python's with NumPy's arrays.

    The two are not told apart in time: it is at most their sum.
    """
    logits.grad = None
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss(logits, target).backward()
    held = largest = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    logits.grad = None
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        loss(logits, target).backward()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    logits.grad = None
    return largest + most - before
