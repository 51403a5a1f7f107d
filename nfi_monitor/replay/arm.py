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
    """The objects that an arm may change. The replay restores the snapshot before it enters the arm."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    head: Head | None
    snapshot: Snapshot
    steps: int  # maximum number of optimizer steps to replay
    data_step: Callable[[int], int] = field(default=lambda step: step)
    """Optimizer step → the step number that is passed to ``step_fn``, whose data it should use."""
    applied: bool = True
    """The arm sets this to False if it found nothing to change."""
    note: str = ""
    """A remark on the outcome for people; may be empty."""


@dataclass(frozen=True)
class Arm:
    """One variant of the replay. ``change(context)`` is a context manager around the arm's steps."""

    name: str
    what: str
    """Description in one line, for people."""
    change: Callable[[ArmContext], AbstractContextManager[Any]]
    may_sag: bool = False
    """Whether the arm shortens the updates, but not the weight decay. Then a slow rise of the loss is its own
    (:mod:`nfi_monitor.replay.sag`)."""


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
