"""Make the families of a half."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.benchmarks.detection.families import Family
from tests.benchmarks.detection.training import LogitChange, Training


def family_of(
    half: str,
    name: str,
    build: Callable[..., Training],
    steps: int,
    *,
    mechanism: str | None = None,
    seeds: int = 1,
    arm: LogitChange | None = None,
    nats: bool = True,
    floor: bool = True,
    **variation: Any,
) -> Family:
    """``seeds`` is how many, from 0; ``variation`` goes to the builder."""
    return Family(
        name, partial(build, **variation), steps, tuple(range(seeds)), mechanism, arm=arm or LogitChange(),
        half=half, nats=nats, floor=floor,
    )  # fmt: skip
