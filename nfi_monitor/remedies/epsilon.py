"""Raise Adam's ε_A, which is added to the root of the second moment."""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim import Optimizer

from nfi_monitor.capture.unwrap import unwrap
from nfi_monitor.remedies.handle import Handle

_RAISED: weakref.WeakKeyDictionary[Optimizer, _Raised] = weakref.WeakKeyDictionary()


def raise_epsilon(optimizer: Any, eps: float = 1e-6) -> Handle:
    """Raise ``eps`` of every parameter group in which it is smaller. Of several handles the largest counts.

    It is for numerical feature inflation: 1e-6 made slingshots rarer, 1e-5 removed them (Liu et al. 2026). It
    costs no time, but changes the training: coordinates with gradients below ``eps`` hardly move.  When not
    to use it: if gradients are always that small (large models with a sum over many tokens, float16), or
    against other mechanisms, whose slingshots it does not avert (``tests/benchmarks/remedies/RESULTS.md``).

    Raises ValueError for an ``eps`` that is not positive, or an optimizer without one.
    """
    optimizer = unwrap(optimizer)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps!r}.")
    if not any("eps" in group for group in optimizer.param_groups):
        raise ValueError(f"{type(optimizer).__name__} has no eps to raise: it does not divide by a root.")
    raised = _RAISED.setdefault(optimizer, _Raised(optimizer))
    asked = object()
    raised.wanted[asked] = eps
    raised.set()

    def undo() -> None:
        raised.wanted.pop(asked, None)
        raised.set()

    return Handle(f"eps {eps:g}", undo)


class _Raised:
    """Set the largest ``eps`` of all handles on one optimizer, and restore the earlier values.

    The optimizer is referenced weakly.  A value that the user sets in a group meanwhile is kept.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.wanted: dict[object, float] = {}
        self._before: dict[int, tuple[float, float]] = {}  # id of the group → (its own eps, ours)

    def set(self) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        floor = max(self.wanted.values(), default=0.0)
        for group in optimizer.param_groups:
            if "eps" not in group:
                continue
            own, ours = self._before.get(id(group), (group["eps"], group["eps"]))
            if group["eps"] != ours:
                own = group["eps"]
            group["eps"] = max(own, floor)
            self._before[id(group)] = own, group["eps"]
        if not self.wanted:
            _RAISED.pop(optimizer, None)
