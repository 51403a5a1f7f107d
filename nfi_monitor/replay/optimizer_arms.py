"""Change the optimizer in a replay.

Learning rates are changed only inside the step, between a pre-hook and a post-hook, because schedulers read
and write them between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nfi_monitor.capture.second_moment import SECOND_MOMENTS, states
from nfi_monitor.replay.arm import Arm, ArmContext


def _second_moments(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Callable[[], float]]]:
    """Return each second moment v, and a function that returns the present ratio of v to v̂."""
    groups = [group for group in optimizer.param_groups if "betas" in group]
    beta2 = {param: group["betas"][1] for group in groups for param in group["params"]}
    return [
        (state[name], partial(_correction, state, beta2.get(param)))
        for param, state in states(optimizer)
        for name in SECOND_MOMENTS
        if isinstance(state.get(name), Tensor) and state[name].is_floating_point()
    ]


def _correction(state: Mapping[str, Any], beta2: Any) -> float:
    """Return 1 − β2^t, by which Adam divides v in its step t; 1 where it is not known."""
    step = float(state.get("step", 0.0)) if beta2 is not None else 0.0
    return 1.0 - float(beta2) ** step if step > 0 else 1.0


@contextmanager
def second_moment_reset(context: ArmContext) -> Iterator[None]:
    optimizer = context.optimizer
    context.applied = bool(_second_moments(optimizer))
    kept = dict(optimizer.state)  # the tensors themselves: views and compiled steps refer to them
    optimizer.state.clear()
    try:
        yield
    finally:
        optimizer.state.clear()
        optimizer.state.update(kept)


MOST_GIVEN_BACK = 10.0
"""Maximum number of decades of sqrt(v̂) that are restored. More changes no outcome, and 0 · ∞ would be NaN."""


@contextmanager
def second_moment_held(context: ArmContext) -> Iterator[None]:
    # The monitor takes a snapshot when an alert begins, and by then the second moment has decayed.  If it is
    # held at that value, half as many slingshots are averted as at its value from before the decay.
    given_back = 10.0 ** (-2.0 * max(context.snapshot.second_moment_decay, -MOST_GIVEN_BACK))
    if given_back >= 4.0:
        context.note = (
            f"the second moment was set to {given_back:.3g} times its value in the snapshot, which shortens "
            f"the next steps like a learning rate {given_back**0.5:.3g} times smaller"
        )
    # The step divides by v̂, the bias-corrected moment. In the first steps v̂ falls while v rises.
    with torch.no_grad():
        floors = [
            (moment, moment * (given_back / ratio()), ratio)
            for moment, ratio in _second_moments(context.optimizer)
        ]
    context.applied = bool(floors)

    def hold(*_: Any) -> None:
        with torch.no_grad():
            for moment, floor, ratio in floors:
                torch.maximum(moment / ratio(), floor, out=floor)
                moment.copy_(floor * ratio())

    hold()
    # Restore it after each step, which is before the next: the step divides by β2 times the floor or more.
    hook = context.optimizer.register_step_post_hook(hold)
    try:
        yield
    finally:
        hook.remove()


def larger_eps(eps: float = 1e-6) -> Arm:
    """Return an arm that raises Adam's ε_A to ``eps`` where it is smaller."""

    @contextmanager
    def change(context: ArmContext) -> Iterator[None]:
        groups = [group for group in context.optimizer.param_groups if "eps" in group]
        context.applied = any(group["eps"] < eps for group in groups)
        before = [group["eps"] for group in groups]
        for group in groups:
            group["eps"] = max(group["eps"], eps)
        try:
            yield
        finally:
            for group, value in zip(groups, before, strict=True):
                group["eps"] = value

    return Arm("larger_eps", f"Adam's eps {eps:g}", change)


@contextmanager
def _lr(context: ArmContext, lr_of: Callable[[int, Any], Any]) -> Iterator[None]:
    """Use ``lr_of(index of the group, its lr)`` inside each optimizer step only.

    Schedulers read and write ``group["lr"]`` between steps: they must not see the change.
    """
    groups = context.optimizer.param_groups
    before: list[Any] = []

    def pre(*_: Any) -> None:
        before[:] = [group["lr"] for group in groups]
        for index, group in enumerate(groups):
            group["lr"] = lr_of(index, group["lr"])

    def post(*_: Any) -> None:
        for group, lr in zip(groups, before, strict=False):
            group["lr"] = lr
        before.clear()

    hooks = (context.optimizer.register_step_pre_hook(pre), context.optimizer.register_step_post_hook(post))
    try:
        yield
    finally:
        post()
        for hook in hooks:
            hook.remove()


def smaller_lr(factor: float = 0.1, steps: int | None = None) -> Arm:
    """Return an arm that multiplies the learning rate by ``factor`` in ``steps`` steps (None: all)."""

    @contextmanager
    def change(context: ArmContext) -> Iterator[None]:
        done = 0

        def lr_of(index: int, lr: Any) -> Any:
            return lr * factor if steps is None or done < steps else lr

        def count(*_: Any) -> None:
            nonlocal done
            done += 1

        with _lr(context, lr_of):
            hook = context.optimizer.register_step_post_hook(count)
            try:
                yield
            finally:
                hook.remove()

    for_steps = "" if steps is None else f" for {steps:,} steps"
    return Arm("smaller_lr", f"learning rate × {factor:g}{for_steps}", change)


@contextmanager
def lr_held(context: ArmContext) -> Iterator[None]:
    held = context.snapshot.lrs
    with _lr(context, lambda index, lr: held[index].to(lr) if isinstance(lr, Tensor) else held[index]):
        yield
