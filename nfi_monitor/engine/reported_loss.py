"""Find out whether a loss that the loop reports is one that is trained.

A loop may report the cross-entropy and train something else, as preferences.  A gradient that arrives at the
loss shows that it is trained.  If the loss was reported after its backward pass, the autograd graph shows it:
the pass has freed what the nodes of the loss had kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nfi_monitor.capture import devices
from nfi_monitor.capture.backward_pass import is_freed, nearest_parameter
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

Look = Callable[[Any], object]
"""Looks at the graph of a loss that is trained, by the node of the loss."""


class ReportedLoss:
    """Look at the losses of the first steps.

    ``untrained``: whether no gradient has arrived at them.
    """

    def __init__(self, passed: Callable[[], bool], *, untrained: bool = False) -> None:
        """``passed``: whether a forward pass was seen since the last step.

        ``untrained``: what was known before, of a run that is resumed.
        """
        self.untrained, self._passed = untrained, passed
        self._steps = self._looks = 0
        self._done = False
        self._seen: tuple[weakref.ref[Tensor], int] | None = (
            None  # the gradient of the last step, its version
        )
        self._forget()

    def _forget(self) -> None:
        self._node: Any = None  # of the last loss
        self._parameter: Any = None  # the node of the parameter nearest to it
        self._handle: Any = None
        self._arrived = False  # a gradient at a loss of this step
        self._elsewhere = False  # a gradient at that parameter, since the last loss was reported
        self._known: bool | None = None  # whether the last loss was trained when it was reported
        self._fresh = False  # whether no backward pass can have run through it before that

    def watch(self, loss: Tensor, look: Look | None) -> None:
        """Watch a loss, before or after its backward pass. ``look`` is called if it is trained."""
        node = loss.grad_fn
        if node is None:  # a number: the graph does not tell, and the user may have corrected the loop
            self.untrained &= self._done
            return
        if self._done:
            if look is not None and not self.untrained:
                look(node)
            return
        self._let_go()
        self._node, self._parameter, self._elsewhere = node, nearest_parameter(loss), False
        self._known = _is_trained(node)
        self._fresh = self._known is None and self._is_fresh()
        if self._fresh and self._parameter is not None and self._passed():
            self._handle = self._parameter.register_prehook(self._on_parameter)
        later = look if self._fresh else None
        if look is not None and not self._fresh and self._known is not False:
            look(node)

        def on_gradient(grad: Tensor) -> None:
            # No reference to the node: this function is kept by it, and the cycle would never be freed.
            self._arrived = True
            if torch.compiler.is_compiling():  # compiled autograd traces this hook
                return
            if later is not None and self._node is not None:
                later(self._node)

        loss.register_hook(on_gradient)

    def _on_parameter(self, gradients: tuple[Tensor | None, ...]) -> None:
        self._elsewhere = True

    def _is_fresh(self) -> bool:
        """Return whether the nearest parameter shows that no backward pass has run in this step."""
        grad = _gradient(self._parameter)
        if grad is None or (
            self._seen is not None and self._seen[0]() is grad and self._seen[1] == grad._version
        ):
            return True
        return devices.on_host(grad) and not grad.any()  # zero_grad(set_to_none=False)

    def end_step(self) -> None:
        """Look at what has arrived until the optimizer's step, and drop the graph."""
        node, grad = self._node, _gradient(self._parameter)
        self._seen = None if grad is None else (weakref.ref(grad), grad._version)
        if self._done or node is None:
            self._let_go()
            return
        trained = True if self._arrived else self._known
        if trained is None and self._fresh:  # else a kept graph may have been freed by a further pass
            trained = False if self._elsewhere else _is_trained(node)
        self._let_go()
        self._forget()
        self._looks += 1
        if trained is False:
            self._steps += 1
        elif trained:
            self.untrained = False
        self.untrained |= self._steps >= LOOKS
        self._done = bool(trained) or self._looks >= LOOKS

    def _let_go(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _gradient(parameter: Any) -> Tensor | None:
    """Return the gradient of a parameter, of its node in the graph."""
    grad = None if parameter is None else parameter.variable.grad
    return grad if grad is None or devices.has_numbers(grad) else None


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
