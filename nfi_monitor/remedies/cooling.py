"""Lower the learning rate for a while, without any change that schedulers see."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch.optim import Optimizer

from nfi_monitor.capture.unwrap import unwrap
from nfi_monitor.remedies.handle import Handle
from nfi_monitor.remedies.steps import around_steps, step_now
from nfi_monitor.replay.replayed_step import OBJECTIONS, REPLAY

_SCALED: weakref.WeakKeyDictionary[Optimizer, _Scaled] = weakref.WeakKeyDictionary()


class CoolDown(Handle):
    """End a cool-down: gradually with ``release()``, from the next step on, or at once with ``undo()``."""

    def __init__(self, what: str, undo: Callable[[], None], release: Callable[[], None]) -> None:
        super().__init__(what, undo)
        self._release = release

    def release(self) -> None:
        """Let the rate come back from the next step on; do nothing if it is coming back or has come back."""
        self._release()


def cool_down(
    optimizer: Any,
    factor: float = 0.1,
    steps: int | None = 100,
    ramp: int | None = None,
    *,
    failed: Callable[[Exception], None] | None = None,
) -> CoolDown:
    """Multiply the learning rate by ``factor`` for ``steps`` optimizer steps (None: until ``release()``).

    Then the rate comes back over ``ramp`` steps (default: a quarter of ``steps``), by the same factor each
    step. The rate is changed only inside ``optimizer.step()``: schedulers read and write their own rate.  Of
    several cool-downs the smallest factor is used.  It costs no time.

    It is for second-moment slingshots and those at the edge of stability, where no other remedy helps at
    once. A few τ of it only delay a slingshot of any mechanism, and rarely avert it.  So replace the loss
    meanwhile before a numeric slingshot, and keep the rate low (``steps=None``) before the others.  When not
    to use it: from the start of a training, which then learns more slowly.  Source: measured,
    ``tests/benchmarks/remedies/RESULTS.md``.

    After an error inside the cool-down, it ends, the rate comes back, and ``optimizer.step()`` raises the
    error. With ``failed``, that function gets the error instead, and the step goes on.

    Raises ValueError unless 0 < factor ≤ 1, steps ≥ 1 and ramp ≥ 0.
    """
    optimizer = unwrap(optimizer)
    if not 0.0 < factor <= 1.0:
        raise ValueError(f"factor must be in (0, 1], got {factor!r}.")
    if (steps is not None and steps < 1) or (ramp is not None and ramp < 0):
        raise ValueError(f"steps must be ≥ 1 and ramp ≥ 0, got {steps!r} and {ramp!r}.")
    scaled = _SCALED.get(optimizer)
    if scaled is None:
        scaled = _SCALED[optimizer] = _Scaled(optimizer)
    cooling = _Cooling(factor, steps, ramp, failed, step_now(optimizer))
    remove = scaled.add(cooling)
    lasts = "until it is released" if steps is None else f"for {steps:,} steps"
    return CoolDown(f"learning rate × {factor:g} {lasts}", remove, cooling.release)


def undated(optimizer: Optimizer) -> str | None:
    """Return why a replay cannot repeat the cool-downs of this optimizer, or None if it can."""
    scaled = _SCALED.get(optimizer)
    if scaled is None or all(
        cooling.since is not None or cooling.steps is None for cooling in scaled._active
    ):
        return None
    return (
        "A cool_down(...) of this optimizer began while no monitor was open, so its rate in the replayed "
        "steps is unknown. Call undo() on what it returned, then replay."
    )


OBJECTIONS.append(undated)


class _Cooling:
    def __init__(
        self,
        factor: float,
        steps: int | None,
        ramp: int | None,
        failed: Callable[[Exception], None] | None,
        since: int | None,
    ) -> None:
        self.factor, self.steps, self.ramp, self.failed = factor, steps, ramp, failed
        self.done = 0  # optimizer steps taken with the lower rate
        self.since = since  # the last step of the run before it began; None if unknown

    def release(self) -> None:
        if self.steps is None or self.done < self.steps:
            self.steps = self.done

    def now(self) -> float | None:
        """Return the factor of the next or the replayed step; None once the rate is back."""
        done, replayed = self.done, REPLAY.step
        if replayed is not None and self.since is not None:
            done = replayed - 1 - self.since
        if done < 0:
            return None
        if self.steps is None or done < self.steps:
            return self.factor
        ramp = -(-self.steps // 4) if self.ramp is None else self.ramp
        left = 1.0 - (done - self.steps + 1) / (ramp + 1)
        return self.factor**left if left > 0 else None


class _Scaled:
    """Apply all cool-downs of one optimizer with one pair of step hooks.

    A second pair would restore the rate that the first pair had set.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._active: list[_Cooling] = []
        self._own: list[Any] = []  # the rates of the groups, to restore after the step
        self._optimizer = weakref.ref(optimizer)
        self._take_off = around_steps(optimizer, self._before, self._after)

    def add(self, cooling: _Cooling) -> Callable[[], None]:
        self._active.append(cooling)
        return lambda: self._remove(cooling)

    def _remove(self, cooling: _Cooling) -> None:
        if cooling in self._active:
            self._active.remove(cooling)
            if not self._active:
                self._end()

    def _end(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            self._restore(optimizer)
            if _SCALED.get(optimizer) is self:
                del _SCALED[optimizer]
        self._take_off()

    def _before(self, optimizer: Optimizer) -> None:
        active = self._active
        try:
            self._restore(optimizer)  # after a step that raised an error, the smaller rates are still set
            factors = [factor for cooling in self._active if (factor := cooling.now()) is not None]
            if not factors:
                return
            self._own = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * min(factors)
        except Exception as error:
            self._give_up(error, active)

    def _after(self, optimizer: Optimizer) -> None:
        active = self._active
        try:
            self._restore(optimizer)
            if REPLAY.step is not None:
                return
            for cooling in self._active:
                cooling.done += 1
            self._active = [cooling for cooling in self._active if cooling.now() is not None]
            if not self._active:
                self._end()
        except Exception as error:
            self._give_up(error, active)

    def _give_up(self, error: Exception, active: Sequence[_Cooling]) -> None:
        """End all cool-downs after an error, and report it to those in ``active``."""
        self._active = []
        with suppress(Exception):
            self._end()
        callbacks = [cooling.failed for cooling in active]
        for failed in callbacks:
            if failed is not None:
                failed(error)
        if None in callbacks:
            raise error

    def _restore(self, optimizer: Optimizer) -> None:
        for group, lr in zip(optimizer.param_groups, self._own, strict=False):
            group["lr"] = lr
        self._own = []
