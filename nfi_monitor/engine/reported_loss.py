"""Find out whether a loss that the loop reports is one that is trained.

A loop may report the cross-entropy and train something else, as preferences.  A gradient that arrives at the
loss shows that it is trained.  If the loss was reported after its backward pass, the autograd graph shows it:
the pass has freed what the nodes of the loss had kept.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nfi_monitor.capture.backward_pass import is_freed
from nfi_monitor.capture.origin import OF_A_WEIGHT, operation

LOOKS = 3
"""Number of optimizer steps in which the loss is looked at, and in a row shows that nobody trains on it."""
NODES = 1000
"""Maximum number of nodes that are searched."""
_OF_LOSSES = OF_A_WEIGHT | {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Mean",
    "Sum",
    "Stack",
    "Cat",
    "Where",
    "NanToNum",
    "Neg",
}
"""Operations by which a loop averages or adds losses before it reports them; no backward pass frees those."""


class ReportedLoss:
    """Look at the losses of the first steps.

    ``untrained``: whether no gradient has arrived at them.
    """

    def __init__(self) -> None:
        self.untrained = False
        self._steps = self._looks = 0
        self._arrived = self._done = False
        self._node: Any = None

    def watch(self, loss: Tensor) -> None:
        """Watch a loss, before or after its backward pass."""
        if self._done or loss.grad_fn is None:
            return
        self._node = loss.grad_fn
        loss.register_hook(self._on_gradient)

    def _on_gradient(self, grad: Tensor) -> None:
        self._arrived = True

    def end_step(self) -> None:
        """Look at what has arrived until the optimizer's step, and drop the graph."""
        node, self._node = self._node, None
        if self._done or node is None:
            return
        trained = True if self._arrived else _is_trained(node)
        self._looks += 1
        if trained is False:
            self._steps += 1
        self.untrained = self._steps >= LOOKS
        self._done = bool(trained) or self._looks >= LOOKS


def _is_trained(loss: Any) -> bool | None:
    """Return whether a backward pass went through the node of a loss; None if the graph does not tell.

    False: a pass went through nodes that it depends on, and not through its own.
    """
    seen, ahead, kept = {loss}, [loss], []
    while ahead and len(seen) < NODES:
        node = ahead.pop()
        freed = None if operation(node) in _OF_LOSSES else is_freed(node)
        if freed:
            return True
        if freed is not None:
            kept.append(node)
            continue
        ahead += _before(node, seen)
    ahead = kept
    while ahead and len(seen) < NODES:
        node = ahead.pop()
        if node not in kept and is_freed(node):
            return False
        ahead += _before(node, seen)
    return None


def _before(node: Any, seen: set[Any]) -> list[Any]:
    found = [before for before, _ in node.next_functions if before is not None and before not in seen]
    seen.update(found)
    return found
