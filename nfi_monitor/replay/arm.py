"""What an arm of a replay is: one change to the training, open while its steps are done."""

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
    """What an arm may change. The snapshot has been restored when :attr:`Arm.change` is entered."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    head: Head | None
    snapshot: Snapshot
    steps: int  # how many are replayed at most
    data_step: Callable[[int], int] = field(default=lambda step: step)
    """Optimizer step → the step whose data ``step_fn`` is asked for."""
    applied: bool = True
    """An arm sets it to False while it has found nothing to change."""
    note: str = ""
    """What an arm has to say of what it did."""


@dataclass(frozen=True)
class Arm:
    """One variant: ``change(context)`` is a context manager that is open while the arm's steps are done."""

    name: str
    what: str
    """One line for people."""
    change: Callable[[ArmContext], AbstractContextManager[Any]]


def combined(*arms: Arm) -> Arm:
    """Several changes at once; applied if each of them is."""

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
