"""Find the torch optimizer to watch: inside a wrapper, and among several."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from nfi_monitor.capture.head import Head


def unwrap(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside wrappers such as accelerate's, whose own hooks never fire.

    Raises TypeError if there is none.
    """
    seen = optimizer
    while not isinstance(seen, Optimizer):
        inner = getattr(seen, "optimizer", None)
        if inner is None or inner is seen:
            raise TypeError(
                f"Monitor needs a torch.optim.Optimizer, got {type(optimizer).__name__}. "
                "Pass the optimizer whose step() updates the model."
            )
        seen = inner
    # accelerate.AcceleratedOptimizer is an Optimizer subclass that delegates.
    inner = getattr(seen, "optimizer", None)
    return unwrap(inner) if isinstance(inner, Optimizer) else seen


def choose(optimizer: Any, head: Head | None) -> Optimizer:
    """Return the optimizer to watch: the given one, or of several the one that trains the head.

    Without a head, or if none trains it, returns the first.  Raises TypeError as :func:`unwrap`.
    """
    if not isinstance(optimizer, (list, tuple)):
        return unwrap(optimizer)
    if not optimizer:
        raise TypeError("Monitor needs an optimizer, got an empty list. Pass the one that trains the head.")
    several = [unwrap(one) for one in optimizer]
    weight = head.weight if head is not None else None
    trains = [
        one
        for one in several
        if weight is not None and any(p is weight for group in one.param_groups for p in group["params"])
    ]
    return (trains or several)[0]
