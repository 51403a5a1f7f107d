"""A smaller learning rate for a while, without the scheduler's noticing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from nfi_monitor.capture.optimizer import unwrap
from nfi_monitor.remedies.handle import Handle

_SCALED: weakref.WeakKeyDictionary[Optimizer, _Scaled] = weakref.WeakKeyDictionary()


def cool_down(optimizer: Any, factor: float = 0.1, steps: int = 100, ramp: int | None = None) -> Handle:
    """For every mechanism, at once: the one thing that still helps a few steps ahead.

    For ``steps`` optimizer steps the learning rate is ``factor`` times what it would be; then it comes back
    over ``ramp`` steps (default a quarter of them), by the same factor each step.  It takes effect inside
    ``optimizer.step()`` alone: schedulers read and write the rate that they know.  Of several, the smallest
    factor counts.  It costs nothing.

    It delays a numeric slingshot and does not avert it: exchange the loss meanwhile.  When not to use it: for
    good.  Source: measured, ``tests/benchmarks/detection/RESULTS.md``.

    Raises ValueError unless 0 < factor ≤ 1, steps ≥ 1 and ramp ≥ 0.
    """
    optimizer = unwrap(optimizer)
    ramp = -(-steps // 4) if ramp is None else ramp
    if not 0.0 < factor <= 1.0:
        raise ValueError(f"factor must be in (0, 1], got {factor!r}.")
    if steps < 1 or ramp < 0:
        raise ValueError(f"steps must be ≥ 1 and ramp ≥ 0, got {steps!r} and {ramp!r}.")
    scaled = _SCALED.get(optimizer)
    if scaled is None:
        scaled = _SCALED[optimizer] = _Scaled(optimizer)

    def now(done: int) -> float | None:
        if done < steps:
            return factor
        left = 1.0 - (done - steps + 1) / (ramp + 1)
        return factor**left if left > 0 else None

    return Handle(f"learning rate × {factor:g} for {steps:,} steps", scaled.add(now))


class _Scaled:
    """One pair of step hooks an optimizer: of two pairs, the second would put back what the first had set."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._active: dict[object, list[Any]] = {}  # key → [factor as a function of steps done, steps done]
        self._own: list[Any] = []  # the groups' rates while a step runs
        self._optimizer = weakref.ref(optimizer)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def add(self, now: Callable[[int], float | None]) -> Callable[[], None]:
        key = object()
        self._active[key] = [now, 0]
        return lambda: self._remove(key)

    def _remove(self, key: object) -> None:
        self._active.pop(key, None)
        if not self._active:
            self._end()

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        optimizer = self._optimizer()
        if optimizer is not None:
            self._restore(optimizer)
            if _SCALED.get(optimizer) is self:
                del _SCALED[optimizer]

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore(optimizer)  # a step that raised left the smaller rates behind
        for key, (now, done) in list(self._active.items()):
            if now(done) is None:
                del self._active[key]
        factor = min((now(done) for now, done in self._active.values()), default=1.0)
        self._own = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore(optimizer)
        for state in self._active.values():
            state[1] += 1
        if not self._active:
            self._end()

    def _restore(self, optimizer: Optimizer) -> None:
        for group, lr in zip(optimizer.param_groups, self._own, strict=False):
            group["lr"] = lr
        self._own = []
