"""Define an arm of a replay: one change to the training while some of its steps are repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nfi_monitor.capture.head import Head
from nfi_monitor.replay.snapshots import Snapshot


@dataclass
class ArmContext:
    """What an arm may change. The replay restores the snapshot before it enters :attr:`Arm.change`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    head: Head | None
    snapshot: Snapshot
    steps: int  # most optimizer steps that are replayed
    data_step: Callable[[int], int] = field(default=lambda step: step)
    """Optimizer step → the number that ``step_fn`` gets: the step whose data it should use."""
    applied: bool = True
    """An arm sets it to False if it found nothing to change."""
    note: str = ""
    """What else a reader of the outcome must know of the arm; empty if there is nothing."""


@dataclass(frozen=True)
class Arm:
    """One variant. ``change(context)`` is a context manager that is open while the arm's steps run."""

    name: str
    what: str
    """One line for people."""
    change: Callable[[ArmContext], AbstractContextManager[Any]]


def combined(*arms: Arm) -> Arm:
    """Return an arm that makes several changes at once; it counts as applied if each of them does."""

    @contextmanager
    def change(context: ArmContext) -> Iterator[None]:
        applied: list[bool] = []
        with ExitStack() as stack:
            for arm in arms:
                stack.enter_context(_noting(arm, context, applied))
            yield
        context.applied = all(applied)

    return Arm("+".join(arm.name for arm in arms), " and ".join(arm.what for arm in arms), change)


@contextmanager
def _noting(arm: Arm, context: ArmContext, applied: list[bool]) -> Iterator[None]:
    context.applied = True
    inner = arm.change(context)
    inner.__enter__()
    entered = context.applied
    try:
        yield
    finally:
        context.applied = entered
        inner.__exit__(None, None, None)
        applied.append(context.applied)
