"""What ``zero_sum_cross_entropy`` costs beside ``F.cross_entropy``: time and memory, forward and backward."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nfi_monitor.remedies import float64_cross_entropy, zero_sum_cross_entropy

SHAPES = ((128, 10), (1024, 10), (256, 1000), (256, 50_257))
"""Rows and classes."""
LOSSES: dict[str, Callable[..., Tensor]] = {
    "F.cross_entropy": F.cross_entropy,
    "zero_sum_cross_entropy": zero_sum_cross_entropy,
    "float64_cross_entropy": float64_cross_entropy,
}


def measure(rows: int, classes: int, seconds: float = 4.0) -> dict[str, Any]:
    """Per loss: microseconds of a forward and backward pass (median of interleaved passes) and peak bytes."""
    torch.manual_seed(0)
    logits = torch.randn(rows, classes, requires_grad=True)
    target = torch.randint(0, classes, (rows,))
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times["F.cross_entropy"]) < 7:
        for name, loss in LOSSES.items():
            logits.grad = None
            started = time.perf_counter()
            loss(logits, target).backward()
            times[name].append(time.perf_counter() - started)
    return {
        name: {"microseconds": 1e6 * statistics.median(times[name]), "peak_bytes": peak(loss, logits, target)}
        for name, loss in LOSSES.items()
    }


def peak(loss: Callable[..., Tensor], logits: Tensor, target: Tensor) -> int:
    """Largest sum of bytes that were allocated and not freed, the gradient included, during one pass."""
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
    return largest
